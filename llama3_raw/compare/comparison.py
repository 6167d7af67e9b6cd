"""`compare`: where another run of the same model diverges from this one, step by step."""

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
from ..weights import Model, in_words
from .difference import Difference, Logits, difference, in_our_layout

_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What rounding does to each tensor is tried (`_rounding`); a step may differ by so many times that. Measured, at most,
# on three trained models (4, 6 and 30 layers) and prompts of 1 to 128 tokens, against transformers, the fast operations
# and other dtypes: 2.8 times in fp32, where sums are taken in other orders, 1.4 times in bf16 and fp16.
_TIMES, _TIMES_IN_16_BITS = 8.0, 2.5

# What adds up over the layers varies more: 3.7 and 2.4 times, so it may be twice that.
_TIMES_IN_ALL = 2.0


class Step(NamedTuple):
    """A tensor of the pass, in both runs. What rounding explains is of the relative differences."""

    name: str
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]
    whole: Difference  # where each run goes on with its own tensors
    rounding_in_all: float
    own: Difference  # where the other run's tensors went into the step
    rounding: float

    @property
    def parts(self) -> bool:
        """Whether the step by itself differs by more than rounding."""
        return self.own.relative > self.rounding


class Comparison(NamedTuple):
    """What `compare` finds. The steps are in the order of the pass."""

    steps: tuple[Step, ...]
    missing: tuple[str, ...]  # tensors of the pass that the other run does not have
    unknown: tuple[str, ...]  # and those of the other run that no pass has
    logits: Logits | None  # None: the other run has none of the same shape
    dtype: torch.dtype  # whose rounding is allowed
    tolerance: float | None  # None: what rounding explains
    made: Mapping[str, NamedTensor]

    @property
    def parted(self) -> list[Step]:
        """The steps that by themselves differ by more than rounding; the first is where the two part ways."""
        return [step for step in self.steps if step.parts]

    @property
    def worst(self) -> Step:
        """Where the runs are furthest apart: beyond what rounding explains, or, with a tolerance, at all."""
        if self.tolerance is not None:
            return max(self.steps, key=lambda step: step.whole.relative)
        return max(self.steps, key=lambda step: step.whole.relative / step.rounding_in_all)

    @property
    def first_beyond_tolerance(self) -> Step | None:
        """The first tensor in which the runs are further apart than the tolerance; None: there is no such, or none."""
        if self.tolerance is None:
            return None
        return next((step for step in self.steps if step.whole.relative > self.tolerance), None)

    @property
    def agree(self) -> bool:
        """Whether no tensor of the runs differs by more than the tolerance, or than rounding where there is none."""
        if self.tolerance is not None:
            return self.first_beyond_tolerance is None
        return not self.parted and self.worst.whole.relative <= self.worst.rounding_in_all

    def verdict(self, other: str = "the other run") -> str:
        """Where the two part ways, in a few lines; `other` is what the other run is called."""
        if not self.parted and all(step.whole.relative == 0 for step in self.steps):
            return f"They are the same: all {len(self.steps)} tensors, value by value."
        worst, rounding = self.worst, f"rounding in {in_words(self.dtype)} explains"
        at_worst = f"{worst.whole.relative:.2g} of its size at {worst.name}"
        if self.tolerance is not None and self.agree:
            text = f"They agree within a tolerance of {self.tolerance:g}: the runs differ by at most {at_worst}."
            if self.parted:
                text += f"\nBy itself, the first step to differ is {self._first_place(other)}"
        elif self.parted:
            text = f"They part ways first at {self._first_place(other)}"
        elif self.agree:
            text = (
                f"They agree: no step by itself differs by more than {rounding}.\nTo the end, the runs come closest to "
                f"it with {at_worst}, where {worst.rounding_in_all:.2g} is explained."
            )
        elif self.tolerance is not None:
            text = f"They differ by up to {at_worst}, but no step by itself by more than {rounding}."
        else:
            text = (
                f"They drift apart: no step by itself differs by more than {rounding}.\nBut it adds up to {at_worst}, "
                f"where {worst.rounding_in_all:.2g} is explained."
            )
        beyond = self.first_beyond_tolerance
        if beyond is not None:
            text += f"\nThe first beyond the tolerance of {self.tolerance:g} is {beyond.name}, "
            text += f"{beyond.whole.relative:.2g} of its size off."
        return text

    def _first_place(self, other: str) -> str:
        first, *others = self.parted
        made = self.made[first.name]
        check, most = made.check, f"{first.own.absolute:.2g}"
        if first.own.unlike:
            differs = f"cannot be compared: in {other}, {first.own.unlike}"
            if first.shape != first.their_shape:
                check = "its layout, which should be that of model.py"
                if first.name == FIRST and first.shape[1:] == first.their_shape[-1:]:
                    check = "the tokens, of which one run has more (BOS?)"
        elif math.isinf(first.own.relative):
            differs = f"has rows that are all zeros in {other} and are not here ({most} at most)"
        else:
            size = f"{first.own.relative:.2g}"
            differs = (
                f"is {size} of its size off ({most} at most); rounding in {in_words(self.dtype)} explains "
                f"{first.rounding:.2g}"
            )
        text = f"{first.name} (in model.py, {made.made_by}).\nFrom the same input, it {differs}.\nLook at: {check}."
        unseen = self._unseen_before(first.name)
        if unseen:
            where = unseen[0] if len(unseen) == 1 else f"{unseen[0]} … {unseen[-1]}"
            text += f"\nIt may as well come from {where}, which {other} does not have."
        places = Counter(of_any_layer(step.name) for step in others)
        if places:
            listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in places.items())
            text += f"\nBy themselves, these differ too: {listed}."
        return text

    def _unseen_before(self, name: str) -> list[str]:
        """The tensors between those that the other run has and this one, in the order of the pass."""
        missing, waiting = set(self.missing), [name]
        unseen: set[str] = set()
        while waiting:
            new = missing.intersection(self.made[waiting.pop()].inputs) - unseen
            unseen |= new
            waiting += new
        return [it for it in self.made if it in unseen]

    def to_json(self) -> dict[str, Any]:
        """The figures to print as JSON; what is infinite is None."""
        logits = self.logits and {key: _finite(value) for key, value in self.logits._asdict().items()}
        first, beyond, worst = next(iter(self.parted), None), self.first_beyond_tolerance, self.worst
        return {
            "agree": self.agree,
            "first": first and first.name,
            "first_beyond_tolerance": beyond and beyond.name,
            "made_by": first and self.made[first.name].made_by,
            "relative": first and _finite(first.own.relative),
            "absolute": first and _finite(first.own.absolute),
            "rounding": first and _finite(first.rounding),
            "parted": [step.name for step in self.parted],
            "worst": worst.name,
            "worst_relative": _finite(worst.whole.relative),
            "worst_rounding": _finite(worst.rounding_in_all),
            "tolerance": self.tolerance,
            "dtype": in_words(self.dtype),
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
    """Where another run over the prompt, ids [T], parts ways with the model's own.

    other: the tensors of that run, or arrays, as many as there are, by the names of a tap and in its layout; a batch
        dimension of 1 and heads joined into one dimension are understood, and scores may be hidden by any large
        negative number.
    tolerance: how far apart, relatively, any tensor of the two runs may be; None: as far as rounding explains, and
        each step by itself too.
    rounding: the dtype whose rounding is to be expected; None: the coarsest of the model and the tensors.
    progress: bars on stderr.

    The model runs two times and, for two rows each, two times more: alone; with the other's tensor put in the place of
    each that it has; and both with every tensor shaken by as much as rounding can do.

    Raises UserError where no name is one of a pass, for tensors that are not of floats in 16 bits or more or of the
    last position only, for a tolerance below 0, and for what `trace` raises it.
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

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            shapes[name] = tuple(tensor.shape)
            shared[name] = in_our_layout(shared[name], tensor.shape)
            whole[name] = difference(tensor, shared[name])
            if name == LAST and shared[name].shape == tensor.shape:
                logits.append(Logits.of(tensor.cpu(), shared[name].cpu()))
        return tensor

    def look_and_replace(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            own[name] = difference(tensor, shared[name])
        return _replaced(name, tensor, shared)

    def run(tap: Tap, rows: int | None = None) -> None:
        tokens = torch.tensor(ids if rows is None else [ids] * rows, device=model.weights.norm.device)
        with count_layers(params, progress) as count, torch.no_grad():
            forward(model.weights, params, tokens, ops=ops, tap=chain(tap, count))

    run(look)
    run(look_and_replace)
    times = _TIMES if _eps(dtype) <= _eps(torch.float32) else _TIMES_IN_16_BITS
    explained: list[dict[str, float]] = []
    for fed in (shared, {}):
        levels: dict[str, float] = {}
        run(_rounding(fed, _eps(dtype), levels), rows=2)
        explained.append({name: times * level for name, level in levels.items()})
    steps = tuple(
        Step(
            name,
            shapes[name],
            tuple(shared[name].shape),
            whole[name],
            _TIMES_IN_ALL * explained[1][name],
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
    """Those of the other run's tensors that a pass has. Raises UserError where there is none, or one is no floats."""
    if isinstance(other, Trace) and other.last_position:
        raise UserError("the trace is of the last position only; trace all positions to compare")
    shared = {name: _as_floats(name, other[name]) for name in other if name in made}
    if not shared:
        names = ", ".join(in_short(name) for name in list(other)[:3])
        raise UserError(
            f"none of the {len(other)} tensors to compare with has a name of this pass ({names or 'there are none'}); "
            f"it has {FIRST}, layers.0.attention_norm, layers.0.attention.q, … {LAST}: see the README's list"
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
    """The other run's tensor in the place of ours, where it has one of the same shape."""
    theirs = others.get(name)
    return tensor if theirs is None or theirs.shape != tensor.shape else theirs.to(tensor)


def _rounding(others: Mapping[str, Tensor], eps: float, levels: dict[str, float]) -> Tap:
    """A tap for two rows [2, T], the second with every tensor moved by up to eps; notes how far that moves the next.

    Both go on with the other run's tensor where there is one. So each step's own sensitivity is seen: a sum of two
    large opposite terms, say, passes on much more rounding than it makes.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def shake(name: str, rows: Tensor) -> Tensor:
        exact, shaken = rows
        levels[name] = difference(shaken, exact).relative + eps
        exact, shaken = _replaced(name, exact, others), _replaced(name, shaken, others)
        generator = generators.setdefault(rows.device, torch.Generator(rows.device).manual_seed(0))
        noise = torch.rand(shaken.shape, generator=generator, device=rows.device).mul_(2 * eps).add_(1 - eps)
        return torch.stack((exact, (shaken * noise).to(rows.dtype)))

    return shake


def of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
