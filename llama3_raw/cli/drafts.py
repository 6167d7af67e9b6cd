"""From --draft to a draft by a model: what it asks for is checked before the model is loaded."""

from __future__ import annotations

import argparse
import re
from typing import NamedTuple

from ..backends.choose import ops_for
from ..decoding.draft_model import DraftModel, first_layers, int4_copy
from ..errors import UserError
from ..quantization.matrix import nbytes_of
from ..system.machine import free_memory
from ..weights import Model, format_of
from .memory_plan import MemoryPlan, RunShape, needed
from .models import PROGRESS_BAR_FROM, ChosenModel, choose_model, load_model


class ChosenDraft(NamedTuple):
    """What --draft asks for: the first layers, another model, or with neither an int4 copy."""

    n_layers: int | None = None
    model: ChosenModel | None = None


def choose_draft(options: argparse.Namespace, chosen: ChosenModel, shape: RunShape) -> ChosenDraft | None:
    """Return the draft that --draft names, for a run of this shape; None without the option.

    Raises UserError for options that do not go with it, a number of layers that the model does not have, an int4 copy
    of an int4 model, and a draft that does not fit into memory beside the model.
    """
    name = options.draft
    if name is None:
        return None
    for option in ("lookup", "max_ram", "gpu_layers"):
        if getattr(options, option):
            raise UserError(f"--draft does not go with --{option.replace('_', '-')}; leave one of them out")
    n_layers = chosen.checkpoint.params.n_layers
    if name.startswith("layers:"):
        number = name.removeprefix("layers:")
        if not re.fullmatch("[0-9]{1,6}", number) or not 1 <= int(number) < n_layers:
            raise UserError(f"--draft {name}: the model has {n_layers} layers; give layers:N with N below that")
        return ChosenDraft(n_layers=int(number))
    if name == "int4":
        if chosen.quantize == "int4":
            raise UserError("--draft int4: the model is in int4 already; leave it out, or give --draft layers:N")
        _check_memory(name, chosen, shape, _int4_bytes(chosen))
        return ChosenDraft()
    others = {"weights": name, **dict.fromkeys(("format", "adapter", "tokenizer", "quantize", "layers"))}
    draft = choose_model(argparse.Namespace(**{**vars(options), **others}), needs_tokenizer=False, named_by="--draft")
    _check_memory(name, chosen, shape, _needed(draft, shape))
    return ChosenDraft(model=draft)


def load_draft(draft: ChosenDraft | None, model: Model, shape: RunShape, captured: bool) -> DraftModel | None:
    """Make or load the draft of a loaded model. Raises UserError if the draft has other tokens.

    captured: whether its passes on a GPU are replayed from a CUDA graph.
    """
    if draft is None:
        return None
    if draft.model is not None:
        small, ops, _ = load_model(draft.model, shape)
    else:
        n_bytes = sum(matrix.nbytes for layer in model.weights.layers for matrix in layer)
        with_bar = n_bytes >= PROGRESS_BAR_FROM
        small = first_layers(model, draft.n_layers) if draft.n_layers else int4_copy(model, progress=with_bar)
        ops = ops_for(small.weights)
    return DraftModel(small, model, ops._replace(can_capture=ops.can_capture and captured))


def _needed(chosen: ChosenModel, shape: RunShape) -> int:
    use = needed(MemoryPlan(chosen.checkpoint, chosen.device, chosen.dtype, shape, quantize=chosen.quantize))
    return use.mapped + use.allocated


def _int4_bytes(chosen: ChosenModel) -> int:
    """Return the bytes of the matrices of an int4 copy."""
    of_output = "tok_embeddings" if chosen.checkpoint.tied else "output"
    specs = chosen.checkpoint.shards
    formats = [(format_of("output" if spec.field == of_output else spec.field, "int4"), spec.shape) for spec in specs]
    return sum(nbytes_of(name, tuple(shape)) for name, shape in formats if name is not None)


def _check_memory(name: str, chosen: ChosenModel, shape: RunShape, n_bytes: int) -> None:
    """Raise UserError if a draft of `n_bytes` does not fit beside the model."""
    model, free = _needed(chosen, shape), free_memory(chosen.device)
    if model + n_bytes > free:
        raise UserError(
            f"--draft {name}: {n_bytes / 1e9:.2f} GB are needed beside the model's {model / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free; give --draft layers:N, which needs none, or leave it out"
        )
