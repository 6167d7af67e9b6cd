"""`compare`: the first tensor at which another run of a model diverges from this one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..model import REFERENCE, forward
from ..ops import Ops, Tap
from ..tracing.names import FIRST, LAST, NamedTensor, named_tensors
from ..tracing.record import Trace, check_trace, count_layers, tokens_of_one_prompt
from ..tracing.taps import chain
from ..weights import Model, dtype_name
from .difference import Difference, Logits, difference, in_our_layout

_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A step may differ by this multiple of what simulated rounding does to it (`_rounding`). The largest that was measured,
# on three trained models (4, 6 and 30 layers) and prompts of 1 to 128 tokens, against transformers, the fast operations
# and other dtypes: 2.8 in fp32, where sums have another order, 1.4 in bf16 and fp16.
_ALLOWED, _ALLOWED_IN_16_BITS = 8.0, 2.5

# End to end, where differences accumulate, twice as much is allowed; the largest measured were 3.7 and 2.4.
_ALLOWED_END_TO_END = 2.0


class Step(NamedTuple):
    """A tensor of the pass in both runs, and the relative differences that rounding explains."""

    name: str
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]
    whole: Difference  # end to end: each run continues with its own tensors
    rounding_end_to_end: float
    own: Difference  # the step alone: computed from the other run's tensors
    rounding: float

    @property
    def diverges(self) -> bool:
        """Whether the step alone differs by more than rounding explains."""
        return self.own.relative > self.rounding


class Comparison(NamedTuple):
    """The result of `compare`. The steps are in the order of the pass."""

    steps: tuple[Step, ...]
    missing: tuple[str, ...]  # tensors of the pass that the other run does not have
    unknown: tuple[str, ...]  # tensors of the other run that no pass has
    logits: Logits | None  # None if the other run has none of the same shape
    dtype: torch.dtype  # its rounding is allowed
    tolerance: float | None  # None: what rounding explains
    made: Mapping[str, NamedTensor]

    @property
    def diverged(self) -> list[Step]:
        """The steps that alone differ by more than rounding explains; the runs diverge at the first."""
        return [step for step in self.steps if step.diverges]

    @property
    def worst(self) -> Step:
        """The step with the largest difference end to end, relative to rounding if there is no tolerance."""
        if self.tolerance is not None:
            return max(self.steps, key=lambda step: step.whole.relative)
        return max(self.steps, key=lambda step: step.whole.relative / step.rounding_end_to_end)

    @property
    def first_beyond_tolerance(self) -> Step | None:
        """The first step that differs by more than the tolerance, if there is a tolerance and such a step."""
        if self.tolerance is None:
            return None
        return next((step for step in self.steps if step.whole.relative > self.tolerance), None)

    @property
    def agree(self) -> bool:
        """Whether no tensor differs by more than the tolerance, or without one, by more than rounding explains."""
        if self.tolerance is not None:
            return self.first_beyond_tolerance is None
        return not self.diverged and self.worst.whole.relative <= self.worst.rounding_end_to_end

    def verdict(self, other: str = "the other run") -> str:
        """Return a few lines that say where the runs diverge; `other` is the name of the other run."""
        if not self.diverged and all(step.whole.relative == 0 for step in self.steps):
            return f"They are equal: all {len(self.steps)} tensors, value by value."
        worst, rounding = self.worst, f"rounding in {dtype_name(self.dtype)} explains"
        at_worst = f"{worst.whole.relative:.2g} (relative) at {worst.name}"
        if self.tolerance is not None and self.agree:
            text = f"They agree within a tolerance of {self.tolerance:g}: the runs differ by at most {at_worst}."
            if self.diverged:
                text += f"\nThe first step that differs alone is {self._first_place(other)}"
        elif self.diverged:
            text = f"They diverge first at {self._first_place(other)}"
        elif self.agree:
            text = (
                f"They agree: no step alone differs by more than {rounding}.\nEnd to end, the runs differ by at most "
                f"{at_worst}, where rounding explains {worst.rounding_end_to_end:.2g}."
            )
        elif self.tolerance is not None:
            text = f"They differ by up to {at_worst}, but no step alone by more than {rounding}."
        else:
            text = (
                f"They drift apart: no step alone differs by more than {rounding}.\nBut differences accumulate to "
                f"{at_worst}, where rounding explains {worst.rounding_end_to_end:.2g}."
            )
        beyond = self.first_beyond_tolerance
        if beyond is not None:
            text += f"\nThe first tensor beyond the tolerance of {self.tolerance:g} is {beyond.name}, "
            text += f"with a relative difference of {beyond.whole.relative:.2g}."
        return text

    def _first_place(self, other: str) -> str:
        first, *others = self.diverged
        made = self.made[first.name]
        check, largest = made.check, f"{first.own.absolute:.2g}"
        if first.own.unlike:
            differs = f"cannot be compared: in {other}, {first.own.unlike}"
            if first.shape != first.their_shape:
                check = "its layout, which should be that of model.py"
                if first.name == FIRST and first.shape[1:] == first.their_shape[-1:]:
                    check = "the tokens, of which one run has more (BOS?)"
        elif math.isinf(first.own.relative):
            differs = f"has rows that are all zeros in {other} but not here (up to {largest})"
        else:
            differs = (
                f"differs by {first.own.relative:.2g} (relative; {largest} absolute); rounding in "
                f"{dtype_name(self.dtype)} explains {first.rounding:.2g}"
            )
        text = f"{first.name} (in model.py, {made.made_by}).\nFrom the same input, it {differs}.\nLook at: {check}."
        unseen = self._unseen_before(first.name)
        if unseen:
            where = unseen[0] if len(unseen) == 1 else f"{unseen[0]} … {unseen[-1]}"
            text += f"\nThe cause may also be {where}, which {other} does not have."
        places = Counter(of_any_layer(step.name) for step in others)
        if places:
            listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in places.items())
            text += f"\nThese differ alone too: {listed}."
        return text

    def _unseen_before(self, name: str) -> list[str]:
        """Return the tensors between this one and those before it that the other run has, in the order of the pass."""
        missing, waiting = set(self.missing), [name]
        unseen: set[str] = set()
        while waiting:
            new = missing.intersection(self.made[waiting.pop()].inputs) - unseen
            unseen |= new
            waiting += new
        return [it for it in self.made if it in unseen]

    def to_json(self) -> dict[str, Any]:
        """Return the figures to print as JSON; infinite ones are None."""
        logits = self.logits and {key: _finite(value) for key, value in self.logits._asdict().items()}
        first, beyond, worst = next(iter(self.diverged), None), self.first_beyond_tolerance, self.worst
        return {
            "agree": self.agree,
            "first": first and first.name,
            "first_beyond_tolerance": beyond and beyond.name,
            "made_by": first and self.made[first.name].made_by,
            "relative": first and _finite(first.own.relative),
            "absolute": first and _finite(first.own.absolute),
            "rounding": first and _finite(first.rounding),
            "parted": [step.name for step in self.diverged],
            "worst": worst.name,
            "worst_relative": _finite(worst.whole.relative),
            "worst_rounding": _finite(worst.rounding_end_to_end),
            "tolerance": self.tolerance,
            "dtype": dtype_name(self.dtype),
            "tensors": len(self.steps),
            "missing": len(self.missing),
            "unknown": len(self.unknown),
            "logits": logits,
        }


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def compare(
    model: Model,
    ids: Sequence[int] | Tensor,
    other: Mapping[str, Tensor],
    *,
    tolerance: float | None = None,
    rounding: torch.dtype | None = None,
    ops: Ops = REFERENCE,
    progress: bool = False,
) -> Comparison:
    """Compare another run over the prompt with the model's own, and find where it diverges.

    The model runs twice over the prompt: alone, and with the other run's tensor put in at each name, so that an error
    does not reach the next step. It runs twice more, over two rows each, with every tensor of one row perturbed as
    rounding does, to measure what rounding explains.

    Args:
        model: the weights to run; a mapping cannot tell whether it is of the same ones.
        ids: the prompt, [T].
        other: tensors or arrays of the other run by tap name, any subset, in the layout of model.py. A batch dimension
            of 1, joined heads, and scores masked by a large negative number are accepted.
        tolerance: the largest relative difference that counts as agreement. None: what rounding explains, end to end
            and for each step alone.
        rounding: the dtype whose rounding to expect. None: the coarsest of the model and the tensors.
        ops: the operations of the model's own run.
        progress: show bars on stderr.

    Raises:
        UserError: no name is a tap name, a tensor is not floating point of 16 bits or more or only of the last
            position, the tolerance is below 0, or `trace` raises it.
    """
    params = model.params
    ids = tokens_of_one_prompt(ids, params)
    _check_settings(tolerance, rounding)
    made = named_tensors(params)
    shared = shared_tensors(other, made)
    dtype = rounding or max((model.weights.norm.dtype, *(shared[name].dtype for name in shared)), key=_eps)
    # two rows take as much memory as somewhat more tokens, since scores grow with the square
    check_trace(params, model.weights.norm.dtype, math.ceil(1.5 * len(ids)), LAST, ops=ops)
    shapes: dict[str, tuple[int, ...]] = {}
    whole: dict[str, Difference] = {}
    own: dict[str, Difference] = {}
    logits: list[Logits] = []

    def measure(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            shapes[name] = tuple(tensor.shape)
            shared[name] = in_our_layout(shared[name], tensor.shape)
            whole[name] = difference(tensor, shared[name])
            if name == LAST and shared[name].shape == tensor.shape:
                logits.append(Logits.of(tensor.cpu(), shared[name].cpu()))
        return tensor

    def measure_and_replace(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            own[name] = difference(tensor, shared[name])
        return _replaced(name, tensor, shared)

    def run(tap: Tap, rows: int | None = None) -> None:
        tokens = torch.tensor(ids if rows is None else [ids] * rows, device=model.weights.norm.device)
        with count_layers(params, progress) as count, torch.no_grad():
            forward(model.weights, params, tokens, ops=ops, tap=chain(tap, count))

    run(measure)
    run(measure_and_replace)
    allowed = _ALLOWED if _eps(dtype) <= _eps(torch.float32) else _ALLOWED_IN_16_BITS
    explained: list[dict[str, float]] = []
    for fed in (shared, {}):
        levels: dict[str, float] = {}
        run(_rounding(fed, _eps(dtype), levels), rows=2)
        explained.append({name: allowed * level for name, level in levels.items()})
    steps = tuple(
        Step(
            name,
            shapes[name],
            tuple(shared[name].shape),
            whole[name],
            _ALLOWED_END_TO_END * explained[1][name],
            own[name],
            explained[0][name],
        )
        for name in made
        if name in shared
    )
    return Comparison(
        steps=steps,
        missing=tuple(name for name in made if name not in shared),
        unknown=tuple(name for name in other if name not in made),
        logits=logits[0] if logits else None,
        dtype=dtype,
        tolerance=tolerance,
        made=made,
    )


def _check_settings(tolerance: float | None, rounding: torch.dtype | None) -> None:
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"the tolerance should be a number of 0 or more, such as 0.01, is {tolerance}")
    if rounding is not None and rounding not in _COMPARABLE:
        raise UserError(f"the rounding should be that of a dtype such as torch.bfloat16, is {rounding!r}")


def shared_tensors(other: Mapping[str, Tensor], made: Mapping[str, NamedTensor]) -> dict[str, Tensor]:
    """Return the other run's tensors that a pass has too. Raises UserError if there are none, or for other dtypes."""
    if isinstance(other, Trace) and other.last_position:
        what = "the trace is of the last position only; make one without {argument}"
        raise UserError(what, argument="last_position")
    shared = {name: _as_floats(name, other[name]) for name in other if name in made}
    if not shared:
        names = ", ".join(in_short(name) for name in list(other)[:3])
        raise UserError(
            f"none of the {len(other)} tensors to compare with has a name of this pass ({names or 'there are none'}); "
            f"it has {FIRST}, layers.0.attention_norm, layers.0.attention.q, … {LAST} (see docs/tracing.md)"
        )
    return shared


def _as_floats(name: str, given: Any) -> Tensor:
    try:
        tensor = given if isinstance(given, Tensor) else torch.tensor(numpy.asarray(given))
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or tensor.dtype not in _COMPARABLE:
        kind = getattr(given, "dtype", type(given).__name__)
        raise UserError(f"the tensor {name} to compare with is {kind}; it should be of floats in 16 or 32 bits")
    return tensor


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _replaced(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """Return the other run's tensor if it has one of the same shape, else `tensor`."""
    theirs = others.get(name)
    return tensor if theirs is None or theirs.shape != tensor.shape else theirs.to(tensor)


def _rounding(others: Mapping[str, Tensor], eps: float, levels: dict[str, float]) -> Tap:
    """Return a tap for two rows [2, T] that perturbs every tensor of the second by up to eps, as rounding does.

    `levels` gets the relative difference that this causes in each tensor. Both rows continue with the other run's
    tensor if there is one, so that the sensitivity of each step is measured: a sum of two large opposite terms, for
    example, passes on much more rounding than it adds.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def perturb(name: str, rows: Tensor) -> Tensor:
        exact, perturbed = rows
        levels[name] = difference(perturbed, exact).relative + eps
        exact, perturbed = _replaced(name, exact, others), _replaced(name, perturbed, others)
        generator = generators.setdefault(rows.device, torch.Generator(rows.device).manual_seed(0))
        noise = torch.rand(perturbed.shape, generator=generator, device=rows.device).mul_(2 * eps).add_(1 - eps)
        return torch.stack((exact, (perturbed * noise).to(rows.dtype)))

    return perturb


def of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
