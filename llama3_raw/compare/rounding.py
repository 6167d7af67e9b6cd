"""What rounding explains: which dtype's to expect, and how far it moves each tensor of a pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import rope, rope_frequencies
from ..ops import Ops, accumulate_dtype
from ..params import Params
from ..quantization.matrix import Matrix
from ..tracing.names import FIRST, LAST
from ..weights import dtype_name
from .difference import Measured, measure

_SIMPLE = 16  # as many values that are neither 0 nor a power of two show a dtype

# A tensor may differ by this multiple of what simulated rounding does to it (`Simulation`), as (RMS of the whole, worst
# row, worst value). The largest that were measured without a bug, in 154 runs of the built-in model, SmolLM2 and a
# random one, prompts of 1 to 600 tokens, against transformers, Meta, the fast operations, NumPy and other dtypes:
# of a step alone 0.98, 1.6 and 2.3 in fp32 (heads of fused attention: 2.3 and 4.4), 0.49, 0.49 and 0.85 in 16 bits; end
# to end 1.5, 2.1 and 2.4, and 0.75, 1.1 and 1.9.
_ALLOWED, _ALLOWED_IN_16_BITS = (2.5, 4.0, 6.0), (1.0, 1.5, 2.5)
_END_TO_END, _END_TO_END_IN_16_BITS = (2.5, 5.0, 6.0), (1.2, 2.5, 3.0)

# Two logits may move towards each other by this multiple of what simulated rounding does, as a root mean square. The
# largest that was measured in the same runs, for the two most likely of each position: 3.2 in fp32, 1.6 in 16 bits.
_ALLOWED_OF_LIKELIEST = 6.0

# Terms that even a plain loop, compiled, adds up as if they were one: of a longer sum, rounding grows with its root.
_SUMMED_AT_ONCE = 32

# The frequencies of RoPE are powers, which libraries round by up to this many eps. (numpy's by 1.5, exp(log) by 6)
_OF_FREQUENCIES = 2.0


Change = Callable[[Tensor], Tensor]


class Limits(NamedTuple):
    """The relative differences that rounding explains: of the whole tensor, the worst row and the worst value."""

    rms: float
    row: float
    value: float


def eps_of(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next number."""
    return torch.finfo(dtype).eps


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that rounds most."""
    return max(dtypes, key=eps_of)


def shown_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that all values of a tensor are of, whatever it is saved in; None if there are too few."""
    if tensor.dtype == torch.bfloat16:
        return tensor.dtype
    values = tensor[tensor.isfinite()]
    telling = values[values.frexp().mantissa.abs() != 0.5]
    telling = telling[telling != 0]
    if len(telling) < _SIMPLE:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if dtype == tensor.dtype or torch.equal(telling.to(dtype).to(tensor.dtype), telling):
            return dtype
    return torch.float32


class Precision(NamedTuple):
    """In what the model runs, and whose rounding is expected: of all tensors, and of single ones that are coarser."""

    run: torch.dtype
    rounding: torch.dtype
    of_tensor: Mapping[str, torch.dtype]
    note: str | None  # what the tensors show, as text

    @staticmethod
    def of(model: torch.dtype, others: Mapping[str, Tensor], rounding: torch.dtype | None) -> Precision:
        """Return the precision for a model's dtype and the other run's tensors, most of which decide.

        A run of a finer dtype than the model's is compared in fp32, or bf16's rounding would hide what it does wrong.
        rounding: the dtype to expect, if it was said.
        """
        saved = {name: coarser(tensor.dtype, torch.float32) for name, tensor in others.items()}
        note = None
        if rounding is not None:
            run = model if eps_of(rounding) >= eps_of(model) else torch.float32
        else:
            shown = [dtype for name in others if name != FIRST and (dtype := shown_dtype(others[name]))]
            theirs = _most(shown or saved.values())
            run = model if eps_of(theirs) >= eps_of(model) else torch.float32
            rounding = coarser(theirs if run != model else _most(saved.values()), run)
            if eps_of(theirs) > eps_of(rounding):
                note = (
                    f"the values are all {dtype_name(theirs)}'s; if they were computed in it, and not only rounded to "
                    f"it, expect its rounding: rounding={theirs} (--rounding {dtype_name(theirs)})"
                )
            if run != model:
                note = (
                    f"the tensors are in {dtype_name(rounding)}, so the model runs in float32 and not in "
                    f"{dtype_name(model)}"
                )
        single = {name: dtype for name, dtype in saved.items() if eps_of(dtype) > eps_of(rounding)}
        return Precision(run, rounding, single, note)

    def without(self, names: Collection[str]) -> Precision:
        """Return the same without these tensors among the single ones."""
        return self._replace(of_tensor={name: dtype for name, dtype in self.of_tensor.items() if name not in names})

    def eps(self, name: str) -> float:
        """Return the eps of a tensor."""
        return eps_of(self.of_tensor.get(name, self.rounding))

    def limits(self, name: str, level: Limits, end_to_end: bool) -> Limits:
        """Return what rounding explains of a tensor that simulated rounding moves by `level`."""
        if self.eps(name) <= eps_of(torch.float32):
            allowed = _END_TO_END if end_to_end else _ALLOWED
        else:
            allowed = _END_TO_END_IN_16_BITS if end_to_end else _ALLOWED_IN_16_BITS
        return Limits(*(factor * (figure + self.eps(name)) for factor, figure in zip(allowed, level, strict=True)))


def _most(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the most frequent dtype; of two that are as frequent, the coarser one."""
    counted = Counter(dtypes)
    return max(counted, key=lambda dtype: (counted[dtype], eps_of(dtype)))


class Noise:
    """Random factors around 1: noise(eps, like) are by up to eps away from it, in the shape of `like`."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, eps: float, like: Tensor) -> Tensor:
        generator = self._generators.setdefault(like.device, torch.Generator(like.device).manual_seed(0))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.rand(like.shape, generator=generator, device=like.device, dtype=dtype).mul_(2 * eps).add_(1 - eps)


def other_arithmetic(
    ops: Ops, params: Params, eps: float, noise: Noise, perturb: Callable[[Tensor, Change], Tensor]
) -> Ops:
    """Return the operations with what differs between implementations besides the rounding of each result.

    Sums are in another order: the result is off by eps times the root of the number of terms. In 16 bits they stay as
    they are, since there rounding the result outweighs that. Frequencies of RoPE are off in their last bits, which
    rotates by more the higher the position; nearly every run has them in fp32, whatever else it computes in.

    Args:
        ops: the operations; with gradients, the way back differs likewise.
        params: of the model.
        eps: of the dtype whose rounding is expected.
        noise: its factors.
        perturb: perturb(x, change) returns x [..., T, …], with the change made to the rows of another implementation.
    """
    of_frequencies = _OF_FREQUENCIES * min(eps, eps_of(torch.float32))
    off = of_frequencies * (2 * torch.rand(params.head_dim // 2, generator=torch.Generator().manual_seed(0)) - 1)

    def turned(x: Tensor) -> Tensor:  # [..., T, heads, head_dim]
        frequencies = rope_frequencies(params, x.device, accumulate_dtype(x.dtype))
        angles = torch.arange(x.shape[-3], device=x.device).unsqueeze(-1) * (frequencies * off.to(frequencies))
        return rope(x, angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2))

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return perturb((ops.rope or rope)(x, cos, sin), turned)

    def summed(x: Tensor) -> Tensor:
        return x * noise(eps * max(1.0, math.sqrt(x.shape[-1] / _SUMMED_AT_ONCE)), x)

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        y = ops.linear(perturb(x, summed), weight)
        if y.requires_grad:
            y.register_hook(lambda gradient: perturb(gradient, summed))
        return y

    return ops._replace(rope=rotate, linear=linear if eps <= eps_of(torch.float32) else ops.linear)


class Simulation:
    """A tap for rows [1 + n, T] that perturbs every tensor of all but the first by up to eps, as rounding does.

    `levels` gets the largest relative differences that this causes in each tensor, and `of_logits` the root mean square
    of those in the logits of each position. put: what all rows continue with in place of their own tensor, the other
    run's: so the sensitivity of each step is measured (a sum of two large opposite terms, for example, passes on much
    more rounding than it adds). None: each row continues with its own. part: of a tensor, what is measured.
    """

    def __init__(
        self,
        precision: Precision,
        params: Params,
        part: Callable[[str, Tensor], Tensor],
        put: Callable[[str, Tensor], Tensor | None] | None,
    ):
        self.levels: dict[str, Limits] = {}
        self.of_logits: Tensor | None = None  # [T]
        self._precision, self._params, self._part, self._put = precision, params, part, put
        self._noise = Noise()

    def __call__(self, name: str, rows: Tensor) -> Tensor:
        """Measure and perturb."""
        exact, perturbed = rows[0], rows[1:]
        found = [measure(self._part(name, row), self._part(name, exact)).figures for row in perturbed]
        self.levels[name] = Limits(*map(max, zip(*found, strict=True)))
        if name == LAST:
            self.of_logits = (perturbed - exact).square().mean(-1).sqrt().amax(0).cpu()
        replaced = [self._put(name, row) for row in rows] if self._put else [None]
        theirs = replaced[0]
        if theirs is not None:
            # where they have the last position alone, what is before it was computed end to end in both runs
            put = torch.stack([row for row in replaced[1:] if row is not None])
            if name.endswith("attention.probs"):  # often saved beside fused attention, which rounds its own scores
                put = (put + (perturbed - exact)).clamp(min=0)
            exact, perturbed = theirs, put
        eps = eps_of(self._precision.rounding) if theirs is None else self._precision.eps(name)
        return torch.cat((exact.unsqueeze(0), (perturbed * self._noise(eps, perturbed)).to(rows.dtype)))

    def ops(self, ops: Ops) -> Ops:
        """Return the operations, with those of another implementation for all rows but the first."""

        def perturb(rows: Tensor, change: Change) -> Tensor:
            return torch.cat((rows[:1], change(rows[1:])))

        return other_arithmetic(ops, self._params, eps_of(self._precision.rounding), self._noise, perturb)


def finite(figure: float) -> float | None:
    """Return a figure for JSON, which has no infinite numbers and no NaN; these are None."""
    return figure if math.isfinite(figure) else None


class Swap(NamedTuple):
    """A position at which the most likely tokens differ."""

    position: int
    ours: int  # token id
    theirs: int
    moved: float  # by how much the two logits moved towards each other, and beyond
    explained: float  # by rounding

    @property
    def is_explained(self) -> bool:
        return self.moved <= self.explained

    def to_json(self) -> dict[str, Any]:
        """Return what to print as JSON."""
        return {**{name: finite(value) for name, value in self._asdict().items()}, "is_explained": self.is_explained}


def swaps(ours: Tensor, theirs: Tensor, noise: Tensor, eps: float) -> tuple[Swap, ...]:
    """Return the positions at which the most likely tokens of logits [n, vocab_size] differ: the last n of a prompt.

    noise: what simulated rounding does to the logits of each position of the prompt [T], as a root mean square.
    """
    ours, theirs = ours.cpu().double(), theirs.cpu().double()
    first = len(noise) - len(ours)
    found = []
    for i in (ours.argmax(-1) != theirs.argmax(-1)).nonzero().flatten().tolist():
        a, b = int(ours[i].argmax()), int(theirs[i].argmax())
        moved = float((ours[i, a] - ours[i, b]) + (theirs[i, b] - theirs[i, a]))
        one = math.hypot(float(noise[first + i]), eps * float(ours[i].abs().max()))
        found.append(Swap(first + i, a, b, moved, _ALLOWED_OF_LIKELIEST * math.sqrt(2) * one))
    return tuple(found)


def judged(found: Measured, limits: Limits) -> float:
    """Return the largest of a difference's figures as a multiple of what rounding explains; more than 1 is too much."""
    return max(figure / limit for figure, limit in zip(found.figures, limits, strict=True))
