"""`compare`: the first tensor at which another run of a model diverges from this one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..model import REFERENCE, forward
from ..ops import Ops, Tap
from ..params import Params
from ..tracing.names import FIRST, LAST, NamedTensor, named_tensors, token_dimension
from ..tracing.padding import read_prompts
from ..tracing.partial import names_of_pass
from ..tracing.record import Trace, check_trace, count_layers, tokens_of_one_prompt
from ..tracing.taps import chain
from ..weights import COMPUTE_DTYPES, Model, dtype_name
from .difference import Difference, Logits, Measured, incomparable, measure
from .files import as_tensor
from .forms import Reader, of_any_layer, part_of
from .names import Renamed, renamed
from .rounding import Limits, Precision, Simulation, Swap, eps_of, finite, judged, swaps

_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_SINGLE = 10.0  # as much more of what rounding explains is in one value than in its row, if no other one is wrong

_AS_IN_BFLOAT16 = eps_of(torch.bfloat16) / eps_of(torch.float32) / 2.5  # times what rounding in fp32 explains

_SAMPLES = 16  # positions that show what rounding does
_SAMPLED = 256  # tokens of them in a pass, at most, if the prompt is no longer

Padding = Literal["left", "right"]


class Step(NamedTuple):
    """A tensor of the pass in both runs, and the relative differences that rounding explains."""

    name: str
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]
    whole: Difference  # end to end: each run continues with its own tensors
    rounding_end_to_end: float
    own: Difference  # the step alone: computed from the other run's tensors
    rounding: float
    whole_measured: Measured
    whole_limits: Limits
    own_measured: Measured
    own_limits: Limits

    @staticmethod
    def of(
        name: str,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        whole: tuple[Measured, Limits],
        own: tuple[Measured, Limits],
    ) -> Step:
        """Return the step of a tensor with our shape and theirs, and its differences with what explains them."""
        (end_to_end, whole_limits), (alone, limits) = whole, own
        return Step(
            name,
            *shapes,
            end_to_end.difference,
            whole_limits.row,
            alone.difference,
            limits.row,
            end_to_end,
            whole_limits,
            alone,
            limits,
        )

    @property
    def excess(self) -> float:
        """The difference of the step alone as a multiple of what rounding explains."""
        return max(self.own.relative / self.rounding, judged(self.own_measured, self.own_limits))

    @property
    def excess_end_to_end(self) -> float:
        """The difference end to end as a multiple of what rounding explains."""
        return max(self.whole.relative / self.rounding_end_to_end, judged(self.whole_measured, self.whole_limits))

    @property
    def diverges(self) -> bool:
        """Whether the step alone differs by more than rounding explains."""
        return self.excess > 1

    @property
    def kind(self) -> str:
        """What tells that the step alone differs: its worst "row", all "rows" together, or only a single "value"."""
        times = {kind: figure / limit for kind, (figure, limit) in self._figures.items()}
        if times["value"] > _SINGLE * max(times["row"], times["rows"]):
            return "value"
        return next((kind for kind, figure in times.items() if figure > 1), max(times, key=lambda kind: times[kind]))

    @property
    def telling(self) -> tuple[float, float]:
        """The relative difference of that kind, and what rounding explains."""
        return self._figures[self.kind]

    @property
    def _figures(self) -> dict[str, tuple[float, float]]:
        found, limits = self.own_measured, self.own_limits
        return {
            "row": (self.own.relative, self.rounding),
            "rows": (found.rms, limits.rms),
            "value": (found.value, limits.value),
        }


class Comparison(NamedTuple):
    """The result of `compare`. The steps are in the order of the pass."""

    steps: tuple[Step, ...]
    missing: tuple[str, ...]  # tensors of the pass that the other run does not have
    unknown: tuple[str, ...]  # tensors of the other run that no pass has
    logits: Logits | None  # None if the other run has none of the same shape
    dtype: torch.dtype  # its rounding is allowed
    tolerance: float | None  # None: what rounding explains
    made: Mapping[str, NamedTensor]
    swaps: tuple[Swap, ...] = ()  # where the most likely tokens differ
    notes: tuple[str, ...] = ()  # what was understood of the other run's tensors, as text
    rounded: tuple[str, ...] = ()  # tensors of the other run that are in a coarser dtype than the rest

    @property
    def diverged(self) -> list[Step]:
        """The steps that alone differ by more than rounding explains; the runs diverge at the first."""
        return [step for step in self.steps if step.diverges]

    @property
    def worst(self) -> Step:
        """The step with the largest difference end to end, relative to rounding if there is no tolerance."""
        if self.tolerance is not None:
            return max(self.steps, key=lambda step: step.whole.relative)
        return max(self.steps, key=lambda step: step.excess_end_to_end)

    @property
    def first_beyond_tolerance(self) -> Step | None:
        """The first step that differs by more than the tolerance, if there is a tolerance and such a step."""
        if self.tolerance is None:
            return None
        return next((step for step in self.steps if step.whole.relative > self.tolerance), None)

    @property
    def unexplained_swaps(self) -> list[Swap]:
        """The positions at which the most likely tokens differ by more than rounding explains."""
        return [swap for swap in self.swaps if not swap.is_explained]

    @property
    def agree(self) -> bool:
        """Whether no tensor differs by more than the tolerance, or without one, by more than rounding explains."""
        if self.tolerance is not None:
            return self.first_beyond_tolerance is None
        return not self.diverged and self.worst.excess_end_to_end <= 1 and not self.unexplained_swaps

    def verdict(self, other: str = "the other run") -> str:
        """Return a few lines that say where the runs diverge; `other` is the name of the other run."""
        return "\n".join([self._finding(other), *self._swapped(), *(f"Understood: {note}." for note in self.notes)])

    def _finding(self, other: str) -> str:
        if not self.diverged and all(step.whole.relative == 0 for step in self.steps):
            return f"They are equal: all {len(self.steps)} tensors, value by value."
        worst, rounding = self.worst, f"rounding in {dtype_name(self.dtype)} explains"
        at_worst = f"{worst.whole.relative:.2g} (relative) at {worst.name}"
        if self.tolerance is not None and self.agree:
            they = "They stay" if self.unexplained_swaps else "They agree"
            text = f"{they} within a tolerance of {self.tolerance:g}: the runs differ by at most {at_worst}."
            if self.diverged:
                text += f"\nThe first step that differs alone is {self._first_place(other)}"
        elif self.diverged:
            text = f"They diverge first at {self._first_place(other)}"
            if self._may_be_bfloat16:
                text += (
                    "\nEvery product differs, by no more than rounding in bfloat16 explains: if the port multiplies in "
                    "it (autocast, TF32, JAX's default), give rounding=torch.bfloat16 (--rounding bfloat16)."
                )
        elif self.agree:
            text = (
                f"They agree: no step alone differs by more than {rounding}.\nEnd to end, the runs differ by at most "
                f"{at_worst}, where rounding explains {worst.rounding_end_to_end:.2g}."
            )
        elif self.tolerance is not None:
            text = f"They differ by up to {at_worst}, but no step alone by more than {rounding}."
        else:
            text = f"They drift apart: no step alone differs by more than {rounding}."
            if worst.excess_end_to_end > 1:
                text += (
                    f"\nBut differences accumulate to {at_worst}, {worst.excess_end_to_end:.2g} times what rounding "
                )
                text += "explains."
        beyond = self.first_beyond_tolerance
        if beyond is not None:
            text += f"\nThe first tensor beyond the tolerance of {self.tolerance:g} is {beyond.name}, "
            text += f"with a relative difference of {beyond.whole.relative:.2g}."
        return text

    @property
    def _may_be_bfloat16(self) -> bool:
        """Whether tensors that are judged in fp32 differ as if only the products, all of them, were in bf16."""
        products = [step for step in self.steps if self.made[step.name].made_by.startswith("linear")]
        return (
            self.dtype == torch.float32
            and len(products) > 1  # of one product, a small bug looks the same
            and all(step.diverges for step in products)
            and all(step.excess <= _AS_IN_BFLOAT16 for step in self.steps)
        )

    def _swapped(self) -> list[str]:
        """Return a line on the positions at which the most likely tokens differ."""
        unexplained = self.unexplained_swaps
        if not self.swaps:
            return []
        swap = unexplained[0] if unexplained else self.swaps[0]
        where = f"position {swap.position}: {swap.ours} here, {swap.theirs} there"
        if len(unexplained or self.swaps) > 1:
            where += f"; {len(unexplained or self.swaps)} positions in all"
        if unexplained:
            moved = f"moved by {swap.moved:.2g}, where rounding explains {swap.explained:.2g}"
            if not math.isfinite(swap.moved):
                moved = "are infinite or NaN"
            return [f"The most likely token differs at {where}. Their logits {moved}."]
        return [f"The most likely token differs at {where}; the two are so close that rounding decides."]

    def _first_place(self, other: str) -> str:
        first, *others = self.diverged
        made = self.made[first.name]
        check = made.check
        if first.own.unlike:
            differs = f"cannot be compared: in {other}, {first.own.unlike}"
            if first.shape != first.their_shape:
                check = "its layout, which should be that of model.py"
                if len(first.their_shape) == len(first.shape) + 1 and first.their_shape[0] > 1:
                    check = f"its batch: compare one prompt, and not {first.their_shape[0]} rows"
                elif first.name == FIRST and first.shape[1:] == first.their_shape[-1:]:
                    check = "the tokens, of which one run has more (BOS? padding=, --padding)"
        else:
            differs = self._how(first, other)
        text = f"{first.name} (in model.py, {made.made_by}).\nFrom the same input, it {differs}.\nLook at: {check}."
        unseen = self._unseen_before(first.name)
        if unseen:
            where = unseen[0] if len(unseen) == 1 else f"{unseen[0]} … {unseen[-1]}"
            has = "has in a coarser dtype only" if set(unseen) <= set(self.rounded) else "does not have"
            text += f"\nThe cause may also be {where}, which {other} {has}."
        places = Counter(of_any_layer(step.name) for step in others)
        if places:
            listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in places.items())
            text += f"\nThese differ alone too: {listed}."
        return text

    def _how(self, step: Step, other: str) -> str:
        """Return how far a step differs that can be compared, by the figure that tells most."""
        largest = f"{step.own.absolute:.2g}"
        if math.isinf(step.own.relative):
            return f"has rows that are all zeros in {other} but not here (up to {largest})"
        figure, explained = step.telling
        explains = f"rounding in {dtype_name(self.dtype)} explains {explained:.2g}"
        if step.kind == "value":
            at = ", ".join(map(str, step.own_measured.at))
            return (
                f"differs most in one value, [{at}], by {figure:.2g} of its size or its row's RMS ({largest} absolute "
                f"at most); {explains}"
            )
        rows = " over all rows" if step.kind == "rows" else ""
        at = ", ".join(map(str, step.own_measured.at))
        return f"differs by {figure:.2g}{rows} (relative; {largest} absolute; most at [{at}]); {explains}"

    def _unseen_before(self, name: str) -> list[str]:
        """Return the tensors between this one and those before it that the other run has, in the order of the pass.

        Those that it has in a coarser dtype than the rest may hide a difference, and are among them.
        """
        missing, waiting = {*self.missing, *self.rounded}, [name]
        unseen: set[str] = set()
        while waiting:
            new = missing.intersection(self.made[waiting.pop()].inputs) - unseen
            unseen |= new
            waiting += new
        return [it for it in self.made if it in unseen]

    def to_json(self) -> dict[str, Any]:
        """Return the figures to print as JSON; infinite ones are None."""
        logits = self.logits and {key: finite(value) for key, value in self.logits._asdict().items()}
        first, beyond, worst = next(iter(self.diverged), None), self.first_beyond_tolerance, self.worst
        return {
            "agree": self.agree,
            "first": first and first.name,
            "first_beyond_tolerance": beyond and beyond.name,
            "made_by": first and self.made[first.name].made_by,
            "relative": first and finite(first.own.relative),
            "absolute": first and finite(first.own.absolute),
            "rounding": first and finite(first.rounding),
            "parted": [step.name for step in self.diverged],
            "worst": worst.name,
            "worst_relative": finite(worst.whole.relative),
            "worst_rounding": finite(worst.rounding_end_to_end),
            "tolerance": self.tolerance,
            "dtype": dtype_name(self.dtype),
            "tensors": len(self.steps),
            "missing": len(self.missing),
            "unknown": len(self.unknown),
            "logits": logits,
            "value": first and finite(first.own_measured.value),
            "value_rounding": first and finite(first.own_limits.value),
            "at": first and list(first.own_measured.at),
            "swaps": [swap.to_json() for swap in self.swaps[:20]],
            "understood": list(self.notes),
        }


def compare(  # noqa: PLR0913  # what a caller may set
    model: Model,
    ids: Sequence[int] | Tensor,
    other: Mapping[str, Tensor],
    *,
    tolerance: float | None = None,
    rounding: torch.dtype | str | None = None,
    padding: Padding | None = None,
    dtype: torch.dtype | str | None = None,
    ops: Ops = REFERENCE,
    progress: bool = False,
) -> Comparison:
    """Compare another run over the prompt with the model's own, and find where it diverges.

    The model runs twice over the prompt: with the other run's tensor put in at each name, so that an error does not
    reach the next step, and alone. It runs twice more, over two rows each, or over more of a short prompt, with every
    tensor of all rows but one perturbed as rounding does, to measure what rounding explains.

    Args:
        model: the weights to run; a mapping cannot tell whether it is of the same ones. If the tensors are of a finer
            dtype than the weights, as most of their values show, it runs in fp32.
        ids: the prompt, [T].
        other: tensors or arrays of the other run by tap name, any subset, in the layout of model.py. Names of Hugging
            Face's and Meta's modules are accepted too, and the usual forms of ports (see docs/compare.md);
            `Comparison.notes` says which were understood.
        tolerance: the largest relative difference that counts as agreement. None: what rounding explains, end to end
            and for each step alone.
        rounding: the dtype whose rounding to expect, or its name, such as "float32". None: that which most tensors are
            in, or the model's if it is coarser; a single tensor in a coarser one is judged by that.
        padding: the side on which the other run's prompt was padded.
        dtype: torch.float32, or its name, to run in fp32 whatever the weights are in; each matrix is converted as it is
            used. None: as the weights and the tensors say.
        ops: the operations of the model's own run; with fused attention, `other` may have no scores and probs.
        progress: show bars on stderr.

    Raises:
        UserError: no name is a tap name, a tensor is not floating point of 16 bits or more or a `Trace` has one
            position only, the tolerance is below 0, the prompt is longer than the context, or `trace` raises it.
    """
    params, weights_dtype = model.params, model.weights.norm.dtype
    ids = checked_prompt(ids, params)
    rounding, dtype = check_settings(tolerance, rounding, padding), _dtype_named(dtype)
    if dtype not in (None, weights_dtype, torch.float32):
        raise UserError(f"the model runs in the dtype of its weights or in torch.float32, not in {dtype}")
    named = shared_tensors(other, params, ops)
    precision = Precision.of(dtype or weights_dtype, named.tensors, rounding)
    # the rows that are perturbed, and the exact one, each with scores of its own
    check_trace(params, precision.run, len(ids) + max(_SAMPLED, len(ids)), LAST, ops=ops)
    reader = Reader(named, params, len(ids), padding)
    passes = _Passes(model, ids, ops if precision.run == weights_dtype else _in_fp32(ops), reader, precision, progress)
    own, (whole, shapes, logits) = passes.fed(), passes.alone()
    fed, free = (passes.simulated(is_fed=is_fed) for is_fed in (True, False))
    made = named_tensors(params)
    steps = []
    for name in (name for name in made if name in reader.others):
        limits = precision.limits(name, fed.levels[name], end_to_end=False)
        whole_limits = precision.limits(name, free.levels[name], end_to_end=True)
        shape = tuple(reader.others[name].shape)
        steps.append(Step.of(name, (shapes[name], shape), (whole[name], whole_limits), (own[name], limits)))
    assert free.of_logits is not None
    return Comparison(
        steps=tuple(steps),
        missing=tuple(name for name in made if name not in reader.others),
        unknown=named.unknown,
        logits=Logits.of(*logits) if logits else None,
        dtype=precision.rounding,
        tolerance=tolerance,
        made=made,
        swaps=swaps(*logits, free.of_logits, eps_of(precision.rounding)) if logits else (),
        notes=tuple(filter(None, (precision.note, *named.notes, *reader.understood()))),
        rounded=tuple(precision.of_tensor),
    )


class _Passes:
    """The passes of the model over a prompt, with the other run's tensors beside its own."""

    def __init__(
        self, model: Model, ids: Sequence[int], ops: Ops, reader: Reader, precision: Precision, progress: bool
    ):
        self._model, self._ids, self._ops, self._progress = model, ids, ops, progress
        self._reader, self._precision = reader, precision
        self._as_ours: set[str] = set()  # tensors saved in a coarser dtype that are ours, rounded to it

    def fed(self) -> dict[str, Measured]:
        """Read the other run's tensors, and return the difference of each step alone."""
        own: dict[str, Measured] = {}

        def measure_and_replace(name: str, tensor: Tensor) -> Tensor:
            if name in self._reader.others:
                self._reader.read(name, tensor, self._model.weights.norm)
            if name in self._reader.others:
                own[name] = self._measured(name, tensor)
                if name in self._precision.of_tensor and own[name].value <= 0.6 * self._precision.eps(name):
                    self._as_ours.add(name)  # or the next step would be from a rounded input, and the run's was not
            return self._replaced(name, tensor)

        self._run(measure_and_replace)
        return own

    def alone(self) -> tuple[dict[str, Measured], dict[str, tuple[int, ...]], tuple[Tensor, Tensor] | None]:
        """Return each difference end to end, the shape of each of our tensors, and the logits of both if comparable."""
        whole: dict[str, Measured] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        logits: tuple[Tensor, Tensor] | None = None

        def measure_alone(name: str, tensor: Tensor) -> Tensor:
            nonlocal logits
            if name in self._reader.others:
                ours, theirs = self._part(name, tensor), self._reader.others[name]
                shapes[name] = tuple(ours.shape)
                whole[name] = self._measured(name, tensor)
                if name == LAST and ours.shape == theirs.shape:
                    logits = ours.cpu(), theirs.cpu()
            return tensor

        self._run(measure_alone)
        return whole, shapes, logits

    def simulated(self, *, is_fed: bool) -> Simulation:
        """Return what rounding does to each tensor, from the other run's tensors or from the beginning."""

        def put(name: str, exact: Tensor) -> Tensor | None:
            return self._replaced(name, exact) if name in self._reader.others else None

        precision, params = self._precision.without(self._as_ours), self._model.params
        simulation = Simulation(precision, params, self._part, put if is_fed else None)
        self._run(simulation, simulation.ops(self._ops), rows=1 + self._samples())
        return simulation

    def _samples(self) -> int:
        """Return how many rows to perturb: of few positions, one sample of rounding says little about the worst."""
        positions = [
            tensor.shape[token_dimension(name)]
            for name, tensor in self._reader.others.items()
            if tensor.dim() >= -token_dimension(name)  # or it has none of the forms
        ]
        return max(1, min(math.ceil(_SAMPLES / max(1, min(positions, default=1))), _SAMPLED // len(self._ids)))

    def _run(self, tap: Tap, ops: Ops | None = None, rows: int | None = None) -> None:
        weights, params, ids = self._model.weights, self._model.params, self._ids
        tokens = torch.tensor(ids if rows is None else [ids] * rows, device=weights.norm.device)
        with count_layers(params, self._progress) as count, torch.no_grad():
            forward(weights, params, tokens, ops=ops or self._ops, tap=chain(tap, count))

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        theirs = self._reader.others.get(name)
        return tensor if theirs is None else part_of(name, tensor, theirs)

    def _measured(self, name: str, tensor: Tensor) -> Measured:
        unlike = self._reader.unlike.get(name)
        if unlike:
            return incomparable(unlike)
        return measure(self._part(name, tensor), self._reader.others[name])

    def _replaced(self, name: str, tensor: Tensor) -> Tensor:
        """Return the other run's tensor where it has one of the same shape, else `tensor`."""
        theirs = self._reader.others.get(name)
        if theirs is None or self._part(name, tensor).shape != theirs.shape or name in self._as_ours:
            return tensor
        if theirs.shape == tensor.shape:
            return theirs.to(tensor)
        replaced = tensor.clone()
        self._part(name, replaced).copy_(theirs)
        return replaced


def _in_fp32(ops: Ops) -> Ops:
    """Return the operations with fp32 from the embeddings on; `linear` converts the weights piece by piece."""
    return ops._replace(embed=lambda tokens, table: ops.embed(tokens, table).float())


def checked_prompt(ids: Sequence[int] | Tensor, params: Params) -> list[int]:
    """Return ids [T] as a list. Raises UserError if they are not one prompt, or it is longer than the context."""
    checked = tokens_of_one_prompt(ids, params)
    read_prompts(checked, None, params)
    return checked


def _dtype_named(dtype: torch.dtype | str | None) -> Any:
    """Return the dtype of a name such as "float32"; anything else as it is, to be checked."""
    return COMPUTE_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype


def check_settings(
    tolerance: float | None, rounding: torch.dtype | str | None, padding: str | None
) -> torch.dtype | None:
    """Return the dtype of the rounding. Raises UserError if one of the settings of `compare` is wrong."""
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
        raise UserError(f"the tolerance should be a number of 0 or more, such as 0.01, is {tolerance!r}")
    if padding not in (None, "left", "right"):
        raise UserError(f'the padding should be "left" or "right", the side that it is on, is {padding!r}')
    dtype: torch.dtype | None = _dtype_named(rounding)
    if dtype is not None and dtype not in _COMPARABLE:
        raise UserError(f"the rounding should be that of a dtype such as torch.bfloat16, is {rounding!r}")
    return dtype


def check_mapping(other: object) -> None:
    """Raise UserError unless the other run's tensors are a mapping, and of all positions if they are a trace."""
    if not isinstance(other, Mapping):
        raise UserError(f"the other run should be a mapping from names to tensors, is {type(other).__name__}")
    if isinstance(other, Trace) and other.last_position:
        raise UserError("the trace is of the last position only; make one without {argument}", argument="last_position")
    if isinstance(other, Trace) and other.at is not None:  # the command has no option that makes one
        raise UserError("the trace is of one position only; trace all positions, without at=")


def shared_tensors(other: Mapping[str, Any], params: Params, ops: Ops = REFERENCE) -> Renamed:
    """Return the other run's tensors that a pass with these operations has too.

    Raises UserError if there are none, if these operations do not make one, or for other dtypes.
    """
    check_mapping(other)
    named = renamed(other, params)
    if not named.tensors:
        names = ", ".join(in_short(name) for name in list(other)[:3])
        raise UserError(
            f"none of the {len(other)} tensors to compare with has a name of this pass ({names or 'there are none'}); "
            f"it has {FIRST}, layers.0.attention_norm, layers.0.attention.q, … {LAST} (see docs/tracing.md)"
        )
    fused = set(named.tensors).difference(names_of_pass(params, ops))
    if fused:
        raise UserError(f"has fused attention, so no {min(fused)}; leave scores and probs out", argument="ops")
    return named._replace(
        tensors={name: as_tensor(name, given) for name, given in named.tensors.items()},
        again={
            name: {other: as_tensor(other, given) for other, given in others.items()}
            for name, others in named.again.items()
        },
    )


def assert_matches(
    model: Model, ids: Sequence[int] | Tensor, tensors: Mapping[str, Tensor], **settings: Any
) -> Comparison:
    """Assert in a test that another run agrees with the model's own; the message is the verdict.

    Args:
        model: as in `compare`.
        ids: as in `compare`.
        tensors: of the other run, as `other` in `compare`.
        settings: those of `compare`, such as tolerance.

    Raises:
        AssertionError: they do not agree.
        UserError: as in `compare`.
    """
    found = compare(model, ids, tensors, **settings)
    if not found.agree:
        raise AssertionError(found.verdict("the port"))
    return found
