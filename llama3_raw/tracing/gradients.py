"""Gradients by tap name: `trace_gradients`, and `estimate_sweep`, which estimates a sweep from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..model import REFERENCE, forward
from ..ops import Ops, Tap, accumulate_dtype, no_tap
from ..quantization.matrix import tensors_of
from ..weights import Model, matrices_of
from .padding import Ids, read_prompts, tokens_of_one_prompt
from .patching import STREAM, Base, By, Metric, cells_of, checked_values, layer_of, tap_names
from .record import Origin, Trace, trace
from .taps import Patterns, chain


def trace_gradients(
    model: Model,
    ids: Ids | Sequence[Ids],
    of: Callable[[Tensor], Tensor],
    *patterns: str,
    lengths: Ids | None = None,
    ops: Ops = REFERENCE,
    tap: Tap = no_tap,
) -> tuple[Trace, Trace]:
    """Run a pass and its backward pass; return the tensors that match the patterns, and the gradients of `of` by them.

    The gradients have the names, shapes and dtypes of the tensors. The weights need no gradients and get none.

    Args:
        model: the model to run.
        ids: the prompt [T], a batch [B, T], or a list of prompts of any length, which are padded as `pad` does.
        of: a function of the logits [..., T, vocab_size] that returns a scalar, such as
            `lambda logits: logits[-1, answer] - logits[-1, other]`.
        patterns: tap names, with the wildcards of `Patterns`; without any, every tensor. The pass is differentiated
            from the first of them on.
        lengths: as in `trace`; `of` gets the logits of the padding too.
        ops: the operations, which must be differentiable: the fast ones are not.
        tap: sees each tensor first, so that the gradients are those at what a `patch` made.

    Raises:
        UserError: before anything is computed, if a pattern matches nothing or an id is not in the vocabulary; and if
            `of` returns no scalar that depends on the logits. Also if the model was loaded in torch.inference_mode().
    """
    prompts = read_prompts(ids, lengths, model.params)
    tokens = prompts.tokens.to(model.weights.norm.device)
    tap_names(model.params, *patterns)  # raises for a pattern that matches nothing
    kept, gradients = Trace(*patterns), Trace()
    watched: dict[str, Tensor] = {}
    with _differentiating(model):
        seeing = chain(tap, _watching(watched, *patterns), kept)
        value = of(forward(model.weights, model.params, tokens, ops=ops, tap=seeing))
        for name, gradient in _gradients(value, watched, "of").items():
            gradients(name, gradient)
    kept.origin = gradients.origin = Origin.of(model, prompts.ids)
    kept.lengths = gradients.lengths = prompts.lengths
    return kept, gradients


def estimate_sweep(
    model: Model,
    ids: Sequence[int] | Tensor,
    source: Mapping[str, Tensor],
    names: str | Sequence[str],
    metric: Metric,
    *,
    by: By = "position",
    steps: int | None = None,
) -> Tensor:
    """Estimate what `sweep` would return, from gradients: the metric plus the slice's change times its gradient.

    Attribution patching (Nanda 2023; Syed et al. 2023): one pass and one backward pass for all slices. It is exact
    where the metric is linear in the tensor, and worst for large changes of early layers.

    Args:
        model: the model to run.
        ids: as in `sweep`.
        source: as in `sweep`.
        names: as in `sweep`.
        metric: as in `sweep`; its rows are independent.
        by: as in `sweep`.
        steps: None for the gradients in the unchanged pass. A number for integrated gradients (Sundararajan et al.
            2017, eq. 3): for each name, the mean of the gradients at that number of points on the way from its tensor
            to that of `source`, in one batch. The changes of all positions then sum to the effect of patching the
            whole tensor.

    Returns:
        The estimates, in the shape of what `sweep` returns.

    Raises:
        UserError: as `sweep` does; steps are no number from 1 on; or a value is or becomes infinite or NaN, as a
            score that is masked in one of both only.
    """
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise UserError(f"{steps}: should be a number from 1 on, or None", argument="steps")
    ids = tokens_of_one_prompt(ids, model.params)
    cells, sizes = cells_of(model.params, len(ids), source, names, by)
    names = list(dict.fromkeys(change.name for row in cells for cell in row for change in cell))
    wide = accumulate_dtype(model.weights.norm.dtype)
    watched: dict[str, Tensor] = {}
    with _differentiating(model):
        base = Base(model, ids, trace(model, ids, *STREAM, *names, ops=REFERENCE), REFERENCE)
        changes = {name: _change(name, source[name], x).to(wide) for name, x in base.kept.items() if name in names}
        value = checked_values(metric(base.run(0, 1, _watching(watched, *names))), 1)
        gradients = {name: gradient[0].to(wide) for name, gradient in _gradients(value, watched, "metric").items()}
        if steps is not None:
            gradients = {name: _mean_gradient(base, name, changes[name], metric, steps) for name in names}
    products = {name: changes[name] * gradients[name] for name in names}
    effects = [[sum(float(products[name][where].sum()) for name, where, _ in cell) for cell in row] for row in cells]
    return value.detach() + value.new_tensor(effects).view(len(effects), *sizes)


def _change(name: str, to: Tensor, x: Tensor) -> Tensor:
    """Return the difference to x, 0 where both are masked scores. Raises UserError if it is not finite."""
    to = to.to(x.device)
    change = torch.where(to == x, 0.0, to - x)
    if not change.isfinite().all():
        raise UserError(f"{name} is or becomes infinite or NaN, so there is no estimate; use sweep, or patch its probs")
    return change


@contextlib.contextmanager
def _differentiating(model: Model) -> Iterator[None]:
    """Let autograd see the block, also in torch.inference_mode(). Raises UserError if the weights were made in that."""
    if any(tensor.is_inference() for matrix in matrices_of(model.weights) for tensor in tensors_of(matrix)):
        raise UserError("the model was made in torch.inference_mode(), so it has no gradients; load it outside")
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _mean_gradient(base: Base, name: str, change: Tensor, metric: Metric, steps: int) -> Tensor:
    """Return the mean of the metric's gradients by a tensor, at the middles of `steps` parts of its change."""
    middles = (torch.arange(steps, device=change.device, dtype=change.dtype) + 0.5) / steps
    watched: dict[str, Tensor] = {}

    def move(at: str, tensor: Tensor) -> Tensor:
        if at != name:
            return tensor
        return (tensor + middles.view(-1, *[1] * change.dim()) * change).to(tensor.dtype)

    first = layer_of(name, base.model.params.n_layers)
    values = checked_values(metric(base.run(first, steps, chain(move, _watching(watched, name)))), steps)
    return _gradients(values.sum(), watched, "metric")[name].to(change.dtype).mean(0)


def _watching(watched: dict[str, Tensor], *patterns: str) -> Tap:
    """Return the tap that puts the tensors that match into `watched`, as part of autograd from the first of them on."""
    wanted = Patterns(patterns or ("*",))

    def watch(name: str, tensor: Tensor) -> Tensor:
        if wanted.matching(name):
            watched[name] = tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return tensor

    return watch


def _gradients(value: Tensor, watched: Mapping[str, Tensor], argument: str) -> dict[str, Tensor]:
    """Return the gradients of a scalar by the tensors, 0 where it does not depend on one."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"should return a scalar that is computed from the logits, returns {got}", argument=argument)
    found = torch.autograd.grad(value.sum(), list(watched.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(watched, found, strict=True))
