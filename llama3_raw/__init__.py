"""llama3_raw: Llama 3 as plain functions over plain tensors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .generation import StopReason, generate
    from .model import REFERENCE, KVCache, forward
    from .params import Params
    from .tokenizer import Tokenizer
    from .tracing import Trace, break_at, chain, load_trace, patch, trace
    from .weights import LayerWeights, Model, Weights, load

__all__ = [
    "REFERENCE",
    "KVCache",
    "LayerWeights",
    "Model",
    "Params",
    "StopReason",
    "Tokenizer",
    "Trace",
    "UserError",
    "Weights",
    "break_at",
    "chain",
    "forward",
    "generate",
    "load",
    "load_trace",
    "patch",
    "trace",
]
_ROOMS = (
    "errors",
    "params",
    "tokenizer",
    "sampling",
    "weights",
    "ops",
    "model",
    "generation",
    "machine",
    "tracing",
    "plots",
)


def __getattr__(name: str) -> Any:
    """What is asked for, from the room it lives in, imported only now: a download must not wait seconds for torch."""
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in __all__:
        for room in _ROOMS:
            found = vars(import_module(f".{room}", __name__))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
