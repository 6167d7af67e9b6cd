"""Gradients of the loss, compared by name: the first, from the logits backwards, at which another run diverges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..model import REFERENCE, forward
from ..ops import Ops
from ..params import Params
from ..tracing.names import FIRST, NamedTensor, named_tensors
from ..tracing.record import check_trace
from ..weights import LayerWeights, Model, TensorSpec, Weights, tensor_specs
from .comparison import Comparison, Padding, Step, check_mapping, check_settings, checked_prompt, shared_tensors
from .difference import Measured, incomparable, measure
from .files import as_tensor
from .forms import Reader
from .names import Renamed
from .rounding import Limits, Noise, Precision, eps_of, other_arithmetic

_PASS_FIRST = "and whether the pass itself agrees"
_LOSS = f"the loss: the mean cross-entropy of the next token, over all positions but the last; {_PASS_FIRST}"


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token: logits [..., T, vocab_size], ids [..., T]; summed over rows."""
    losses = F.cross_entropy(logits[..., :-1, :].flatten(0, -2), ids[..., 1:].flatten(), reduction="sum")
    return losses / (ids.shape[-1] - 1)


def compare_gradients(
    model: Model,
    ids: Sequence[int] | Tensor,
    other: Mapping[str, Tensor],
    *,
    tolerance: float | None = None,
    rounding: torch.dtype | str | None = None,
    padding: Padding | None = None,
    ops: Ops = REFERENCE,
) -> Comparison:
    """Compare the gradients of another run with the model's own, and find where they diverge on the way back.

    The loss is the mean cross-entropy of the next token over the prompt. Four passes forwards and back: alone, and with
    the other run's gradient put in at each name; and each again, with tensors and gradients perturbed as rounding does.

    Args:
        model: the weights; where `other` has the gradient of a weight, that is no quantized matrix.
        ids: the prompt, [T], at least two tokens.
        other: gradients by tap name, or of weights by Meta's or Hugging Face's name; with or without .grad after it or
            grad. before it. If some names have that, the others are left out.
        tolerance: as in `compare`.
        rounding: as in `compare`.
        padding: as in `compare`.
        ops: as in `compare`; they must be differentiable, as the exact ones are.

    Raises:
        UserError: as in `compare`, or `other` has the gradient of a quantized matrix, or the prompt has one token.
    """
    params = model.params
    tokens = checked_prompt(ids, params)
    rounding = check_settings(tolerance, rounding, padding)
    check_mapping(other)
    if len(tokens) < 2:
        raise UserError("gradients are of a loss on the next token; give a prompt of at least two tokens")
    tied = model.weights.output is model.weights.tok_embeddings
    of_weights, of_tensors = _by_kind(other, params, tied)
    named = Renamed({}, {}, (), ())
    if of_tensors or not of_weights:
        named = shared_tensors(of_tensors, params, ops)
    weights_dtype = model.weights.norm.dtype
    precision = Precision.of(weights_dtype, {**named.tensors, **of_weights}, rounding)
    check_trace(params, precision.run, 2 * len(tokens), ops=ops)
    reader = Reader(named, params, len(tokens), padding, of_gradients=True)
    passes = _Passes(model, tokens, ops, precision, tuple(of_weights))
    fed = passes.run(lambda name, gradient: _read_and_put(reader, name, gradient))
    theirs = {**reader.others, **of_weights}

    def put(name: str, gradient: Tensor) -> Tensor:
        return reader.others[name].to(gradient) if _fits(reader, name, gradient) else gradient

    alone, fed_noisy, noisy = passes.run(None), passes.run(put, noisy=True), passes.run(None, noisy=True)
    made = _made(params, of_weights)
    steps = []
    for name in (name for name in made if name in theirs):
        own, whole = (_measured(name, ours[name], theirs[name], reader) for ours in (fed, alone))
        level, whole_level = (
            Limits(*_measured(name, shaken[name], exact[name], reader).figures)
            for shaken, exact in ((fed_noisy, fed), (noisy, alone))
        )
        # without the gradient that it is computed from, a step alone is one from the last that there is
        limits = _twice(precision.limits(name, level, end_to_end=not set(made[name].inputs) <= set(theirs)))
        whole_limits = _twice(precision.limits(name, whole_level, end_to_end=True))
        shapes = tuple(alone[name].shape), tuple(theirs[name].shape)
        steps.append(Step.of(name, shapes, (whole, whole_limits), (own, limits)))
    return Comparison(
        steps=tuple(steps),
        missing=tuple(name for name in named_tensors(params) if name not in reader.others),
        unknown=named.unknown,
        logits=None,
        dtype=precision.rounding,
        tolerance=tolerance,
        made=made,
        notes=tuple(filter(None, (precision.note, *named.notes, *reader.understood()))),
        rounded=tuple(precision.of_tensor),
    )


def _by_kind(other: Mapping[str, Any], params: Params, tied: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the gradients of weights by Meta's name, in Meta's order of rows, and those of tensors by their names.

    Of tied embeddings there is one, the sum of both uses; a run that has them twice is not yet added up.
    """
    other = {str(name): value for name, value in other.items()}
    marked = {name: value for name, value in other.items() if "grad" in name.split(".")}
    plain = {
        ".".join(part for part in name.split(".") if part != "grad"): value for name, value in (marked or other).items()
    }
    of_weights: dict[str, Tensor] = {}
    for spec in tensor_specs(params):
        for name in (spec.meta_name, spec.hf_name):
            if name in plain:
                gradient = as_tensor(name, plain.pop(name))
                if name == spec.hf_name and spec.field in ("wq", "wk") and gradient.shape == spec.shape:
                    gradient = (
                        gradient.view(-1, 2, params.head_dim // 2, params.dim).transpose(1, 2).reshape(spec.shape)
                    )
                same = of_weights.get(spec.meta_name, gradient)
                if same.shape != gradient.shape or not torch.allclose(same, gradient, rtol=0, atol=0, equal_nan=True):
                    raise UserError(f"{spec.meta_name} and {spec.hf_name} are the same weight, with other gradients")
                of_weights[spec.meta_name] = gradient
    if tied and "output.weight" in of_weights:
        output, both = of_weights.pop("output.weight"), of_weights.get("tok_embeddings.weight")
        if both is None or not torch.equal(both, output):
            of_weights["tok_embeddings.weight"] = output if both is None else both + output
    return of_weights, plain


def _read_and_put(reader: Reader, name: str, gradient: Tensor) -> Tensor:
    if name in reader.others:
        reader.read(name, gradient, gradient)
    return reader.others[name].to(gradient) if _fits(reader, name, gradient) else gradient


def _fits(reader: Reader, name: str, gradient: Tensor) -> bool:
    return name in reader.others and name not in reader.unlike and reader.others[name].shape == gradient.shape


def _twice(limits: Limits) -> Limits:
    """Return the limits for gradients, which add up roundings of the pass and of the way back. (Measured)"""
    return Limits(*(2 * limit for limit in limits))


def _measured(name: str, ours: Tensor, theirs: Tensor, reader: Reader) -> Measured:
    if name in reader.unlike:
        return incomparable(reader.unlike[name])
    if name.endswith(".weight") and ours.shape == theirs.shape:  # as one row: most of those of a table are not used
        ours, theirs = ours.reshape(1, -1), theirs.reshape(1, -1)
    return measure(ours, theirs)


class _Passes:
    """Passes forwards and back over a prompt. Each returns the gradients by name, on the CPU."""

    def __init__(self, model: Model, ids: Sequence[int], ops: Ops, precision: Precision, of_weights: Sequence[str]):
        self._model, self._ids, self._ops, self._precision = model, ids, ops, precision
        self._of_weights = of_weights

    def run(self, put: Callable[[str, Tensor], Tensor] | None, noisy: bool = False) -> dict[str, Tensor]:
        """Return the gradients before `put` replaces them. noisy: perturb every tensor and gradient by up to eps."""
        params, weights = self._model.params, self._model.weights
        tokens = torch.tensor(self._ids, device=weights.norm.device)
        gradients: dict[str, Tensor] = {}
        noise, eps = Noise(), eps_of(self._precision.rounding)

        def shaken(tensor: Tensor) -> Tensor:
            return (tensor * noise(eps, tensor)).to(tensor.dtype) if noisy else tensor

        def keep(name: str, gradient: Tensor) -> Tensor:
            gradients[name] = gradient.detach().cpu().clone()
            return shaken(put(name, gradient) if put else gradient)

        def tap(name: str, tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            tensor = shaken(tensor)
            tensor.register_hook(partial(keep, name))
            return tensor

        leaves, weights = _leaves(weights, params, self._of_weights, self._precision.run)
        ops = self._ops
        if self._precision.run != weights.norm.dtype:
            ops = ops._replace(embed=lambda ids, table: self._ops.embed(ids, table).float())
        if noisy:
            ops = other_arithmetic(ops, params, eps, noise, lambda x, change: change(x))
        with torch.enable_grad():
            loss = next_token_loss(forward(weights, params, tokens, ops=ops, tap=tap), tokens)
            loss.backward()
        return gradients | {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


def _leaves(
    weights: Weights, params: Params, names: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Weights]:
    """Return the tensors of these names, each to get its gradient, which is in `dtype`, and the weights with them."""
    leaves: dict[str, Tensor] = {}
    layers, top = [layer._asdict() for layer in weights.layers], weights._asdict()

    def leaf(spec: TensorSpec, tensor: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise UserError(f"{spec.meta_name} is quantized, so it has no gradient; give the original weights")
        leaves[spec.meta_name] = tensor.detach().to(dtype).requires_grad_()
        return leaves[spec.meta_name]

    tied = weights.output is weights.tok_embeddings
    for spec in tensor_specs(params, tied):
        fields = top if spec.layer is None else layers[spec.layer]
        if spec.meta_name in names:
            fields[spec.field] = leaf(spec, fields[spec.field])
    if tied:
        top["output"] = top["tok_embeddings"]
    return leaves, Weights(**{**top, "layers": tuple(LayerWeights(**fields) for fields in layers)})


_WEIGHT_OF = {  # the tensor that a matrix or norm makes, in a layer
    "wq": "attention.q",
    "wk": "attention.k",
    "wv": "attention.v",
    "wo": "attention.out",
    "w1": "feed_forward.gate",
    "w2": "feed_forward.out",
    "w3": "feed_forward.up",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}


def _made(params: Params, of_weights: Mapping[str, Tensor]) -> dict[str, NamedTensor]:
    """Return the gradients in the order in which they are computed: from the logits back, a weight's after its product.

    Each is made by going back through what is computed from the tensor.
    """
    forwards = named_tensors(params)
    used_by: dict[str, list[str]] = {name: [] for name in forwards}
    for name, tensor in forwards.items():
        for before in tensor.inputs:
            used_by[before].append(name)
    weights: dict[str, list[str]] = {}
    for spec in tensor_specs(params):
        at = "" if spec.layer is None else f"layers.{spec.layer}."
        top = {"tok_embeddings": FIRST, "norm": "norm", "output": "logits"}
        made = top[spec.field] if spec.layer is None else at + _WEIGHT_OF[spec.field]
        if spec.meta_name in of_weights:
            weights.setdefault(made, []).append(spec.meta_name)
    gradients: dict[str, NamedTensor] = {}
    for name in reversed(list(forwards)):
        through = used_by[name]
        by = " and ".join(forwards[after].made_by for after in through) or "the loss"
        check = "; ".join(dict.fromkeys(forwards[after].check for after in through)) or _LOSS
        gradients[name] = NamedTensor(forwards[name].shape, f"back through {by}", tuple(through), check)
        for weight in weights.get(name, ()):
            gradients[weight] = NamedTensor(
                "", f"back through {forwards[name].made_by}", (name,), f"the sum over positions, {_PASS_FIRST}"
            )
    return gradients
