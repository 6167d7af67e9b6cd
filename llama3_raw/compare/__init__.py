"""Where two runs of a model diverge: `compare`, and the command python -m llama3_raw.compare."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import assert_matches as assert_matches
    from .comparison import compare as compare
    from .gradients import compare_gradients as compare_gradients

_MODULE_OF = {"assert_matches": "comparison", "compare": "comparison", "compare_gradients": "gradients"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, because the command's --help does without torch."""
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
