"""What --with names: another run of a model, checked before it is loaded."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.gguf_reading import is_gguf
from ..cli.memory_plan import RunShape
from ..cli.models import DTYPES_BY_NAME, ChosenModel, choose_model, load_model
from ..errors import UserError
from ..params import Params
from ..quantization.matrix import FORMATS
from ..tracing.gradients import trace_gradients
from ..tracing.record import Origin, Trace, shape_difference, trace
from ..weights import Model
from .comparison import shared_tensors
from .files import SUFFIXES, load_tensors
from .generation import Continued, continued
from .gradients import next_token_loss
from .references import (
    check_hf,
    check_meta,
    continue_hf,
    continue_meta,
    gradients_hf,
    gradients_meta,
    trace_hf,
    trace_meta,
)

Tensors = Mapping[str, Tensor]


class Other(NamedTuple):
    """What --with names, before it runs."""

    name: str
    run: Callable[[], Tensors]
    origin: Origin | None = None  # of a file, which may be of other weights or another prompt by mistake
    params: Params | None = None  # if they may differ from the model's
    format: str | None = None  # of its matrices, if they are quantized
    is_file: bool = False

    @property
    def by_layer(self) -> bool:
        """Whether our own weights may be converted layer by layer, as transformers' are."""
        return self.is_file or self.name == "hf"


class _Implementation(NamedTuple):
    """What transformers' or Meta's code does with a model and a prompt."""

    trace: Callable[..., Trace]
    gradients: Callable[[Model, Sequence[int]], Tensors]
    continued: Callable[[Model, Sequence[int], int], Iterator[Continued]]


_IMPLEMENTATIONS = {
    "hf": _Implementation(trace_hf, gradients_hf, continue_hf),
    "meta": _Implementation(trace_meta, gradients_meta, continue_meta),
}


def choose_other(options: Namespace, chosen: ChosenModel, ids: Sequence[int]) -> Other:
    """Return the other run that --with names, checked without reading its weights. Raises UserError."""
    name: str = options.other
    file = Path(name)
    if (file.is_file() and not is_gguf(file)) or file.suffix in SUFFIXES:
        loaded = load_tensors(file)
        if not options.backward:
            shared_tensors(loaded, chosen.checkpoint.params)
        origin = loaded.origin if isinstance(loaded, Trace) else None
        return Other(name, lambda: loaded, origin, origin.params if origin else None, is_file=True)
    if options.padding:
        raise UserError("--padding: is of the tensors in a file; leave it out")
    if name in _IMPLEMENTATIONS:
        _check_reference(name, chosen)
        return Other(name, lambda: _run_implementation(name, chosen, ids, options.backward))
    if name == "fast" and options.backward:
        raise UserError("--with fast: the fast operations compute no gradients; leave --backward out")
    others = _choose_own(options, chosen)
    run_own = _own_gradients if options.backward else _run_own
    return Other(
        name,
        lambda: run_own(others, ids, reference=name != "fast"),
        params=others.checkpoint.params,
        format=others.quantize or others.checkpoint.format,
    )


def continue_other(options: Namespace, chosen: ChosenModel, ids: Sequence[int], n: int) -> Iterator[Continued]:
    """Yield the next n tokens of a greedy text of the other run, and the tensors of each pass. Raises UserError."""
    name: str = options.other
    shape = RunShape(prompt=len(ids), text=len(ids) + n, least=len(ids) + 1, scored=len(ids))
    if name in _IMPLEMENTATIONS:
        model, _, _ = load_model(chosen._replace(quantize=None), shape, reference=True)
        yield from _IMPLEMENTATIONS[name].continued(model, ids, n)
    else:
        model, ops, _ = load_model(_choose_own(options, chosen), shape, reference=name != "fast")
        yield from continued(model, ids, n, ops)


def _choose_own(options: Namespace, chosen: ChosenModel) -> ChosenModel:
    """Return another model of the same shape, or the same in another form, for this program to run."""
    name: str = options.other
    changes: dict[str, Any] = {"tokenizer": None}
    if name in DTYPES_BY_NAME:
        changes |= {"dtype": name, "quantize": None}
    elif name in FORMATS:
        changes |= {"quantize": name}
    elif name != "fast":
        changes |= {"weights": name, "adapter": None, "format": None}
    with_changes = Namespace(**{**vars(options), **changes})
    others = choose_model(with_changes, needs_tokenizer=False, named_by="--with")
    unlike = shape_difference(others.checkpoint.params, chosen.checkpoint.params)
    if unlike:
        raise UserError(f"--with {name}: is another model, with {unlike}; compare models of the same shape")
    return others


def _check_reference(name: str, chosen: ChosenModel) -> None:
    """Raise UserError if transformers' or Meta's code cannot run the model as it was chosen."""
    if chosen.checkpoint.format:
        raise UserError(
            f"--with {name}: does not support this {chosen.checkpoint.format} format; give the folder with the "
            "original weights"
        )
    if chosen.max_ram is not None:
        raise UserError(f"--with {name}: needs all weights in memory; leave --max-ram out")
    if chosen.gpu_layers is not None:
        raise UserError(f"--with {name}: needs all weights on one device; leave --gpu-layers out")
    if name == "hf":
        check_hf("--with hf")
    else:
        check_meta(chosen.checkpoint.params, "--with meta")


def _run_own(chosen: ChosenModel, ids: Sequence[int], reference: bool) -> Trace:
    model, ops, _ = load_model(chosen, RunShape.of_one_pass(len(ids)), reference)
    return trace(model, ids, ops=ops, device="cpu", progress=True)


def _own_gradients(chosen: ChosenModel, ids: Sequence[int], reference: bool) -> Trace:
    model, ops, _ = load_model(chosen, RunShape.of_one_pass(len(ids)), reference)
    tokens = torch.tensor(ids, device=model.weights.norm.device)
    _, gradients = trace_gradients(model, ids, lambda logits: next_token_loss(logits, tokens), ops=ops)
    return gradients


def by_layer(chosen: ChosenModel) -> tuple[ChosenModel, torch.dtype | None]:
    """Return the model to load for a run in fp32, and the dtype if its weights are to be converted as they are used.

    In fp32, weights of 16 bits would take twice their size besides; those of 8B would not fit into 32 GB.
    """
    checkpoint = chosen.checkpoint
    stored_in_16_bits = checkpoint.dtype.itemsize == 2 and not checkpoint.blocks and not checkpoint.format
    if chosen.dtype == torch.float32 and stored_in_16_bits and not chosen.quantize:
        return chosen._replace(dtype=None), torch.float32
    return chosen, None


def _run_implementation(name: str, chosen: ChosenModel, ids: Sequence[int], backward: bool) -> Tensors:
    chosen, shape = chosen._replace(quantize=None), RunShape.of_one_pass(len(ids))
    if name == "hf" and not backward:
        chosen, dtype = by_layer(chosen)
        model, _, _ = load_model(chosen, shape, reference=True)
        return trace_hf(model, ids, progress=True, dtype=dtype)
    model, _, _ = load_model(chosen, shape, reference=True)
    run = _IMPLEMENTATIONS[name].gradients if backward else _IMPLEMENTATIONS[name].trace
    return run(model, ids)
