"""Where two runs of a model diverge: `compare`, and the command python -m llama3_raw.compare."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare as compare


def __getattr__(name: str) -> Any:
    """Import `compare` when it is first used, because the command's --help does without torch."""
    if name == "compare":
        from .comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
