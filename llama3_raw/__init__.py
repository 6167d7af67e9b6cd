"""llama3_raw: Llama 3 as plain functions over plain tensors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.loading import load as load
    from .checkpoint.moving import to as to
    from .decoding.batch import Row as Row
    from .decoding.batch import generate_batch as generate_batch
    from .decoding.loop import StopReason as StopReason
    from .decoding.loop import generate as generate
    from .decoding.scoring import score as score
    from .errors import UserError as UserError
    from .model import REFERENCE as REFERENCE
    from .model import KVCache as KVCache
    from .model import forward as forward
    from .params import Params as Params
    from .tokenizer import Tokenizer as Tokenizer
    from .tracing import plots as plots
    from .tracing.attribution import attribute as attribute
    from .tracing.attribution import head_results as head_results
    from .tracing.attribution import logit_direction as logit_direction
    from .tracing.circuits import attention_at as attention_at
    from .tracing.circuits import by_head as by_head
    from .tracing.circuits import composition as composition
    from .tracing.circuits import fold_norms as fold_norms
    from .tracing.circuits import induction_scores as induction_scores
    from .tracing.circuits import ov_circuits as ov_circuits
    from .tracing.circuits import qk_circuits as qk_circuits
    from .tracing.circuits import repeated_tokens as repeated_tokens
    from .tracing.collect import Collection as Collection
    from .tracing.collect import collect as collect
    from .tracing.collect import load_collection as load_collection
    from .tracing.debugger import break_at as break_at
    from .tracing.gradients import estimate_sweep as estimate_sweep
    from .tracing.gradients import trace_gradients as trace_gradients
    from .tracing.padding import pad as pad
    from .tracing.patching import ablation as ablation
    from .tracing.patching import path_patch as path_patch
    from .tracing.patching import sweep as sweep
    from .tracing.patching import tap_names as tap_names
    from .tracing.record import Trace as Trace
    from .tracing.record import load_trace as load_trace
    from .tracing.record import trace as trace
    from .tracing.taps import chain as chain
    from .tracing.taps import patch as patch
    from .weights import LayerWeights as LayerWeights
    from .weights import Model as Model
    from .weights import Weights as Weights

_PUBLIC_NAMES = {  # module -> the public names defined there
    "checkpoint.loading": ("load",),
    "checkpoint.moving": ("to",),
    "decoding.batch": ("Row", "generate_batch"),
    "decoding.loop": ("StopReason", "generate"),
    "decoding.scoring": ("score",),
    "errors": ("UserError",),
    "model": ("REFERENCE", "KVCache", "forward"),
    "params": ("Params",),
    "tokenizer": ("Tokenizer",),
    "tracing.attribution": ("attribute", "head_results", "logit_direction"),
    "tracing.circuits": (
        "attention_at",
        "by_head",
        "composition",
        "fold_norms",
        "induction_scores",
        "ov_circuits",
        "qk_circuits",
        "repeated_tokens",
    ),
    "tracing.debugger": ("break_at",),
    "tracing.padding": ("pad",),
    "tracing.gradients": ("estimate_sweep", "trace_gradients"),
    "tracing.patching": ("ablation", "path_patch", "sweep", "tap_names"),
    "tracing.collect": ("Collection", "collect", "load_collection"),
    "tracing.record": ("Trace", "load_trace", "trace"),
    "tracing.taps": ("chain", "patch"),
    "weights": ("LayerWeights", "Model", "Weights"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}
_MODULES = {"plots": "tracing.plots"} | {
    name: name for name in ("errors", "model", "ops", "params", "tokenizer", "weights")
}

__all__ = [*_MODULE_OF, "plots"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a download need not wait seconds for torch."""
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, which are all that Tab should show."""
    return sorted(__all__)
