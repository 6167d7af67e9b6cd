"""What rounding explains: which dtype's to expect, and how far it moves each tensor of a pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..tracing.names import FIRST, LAST
from ..weights import dtype_name
from .difference import Measured, measure

_SIMPLE = 16  # as many values that are neither 0 nor a power of two show a dtype

# A tensor may differ by this multiple of what simulated rounding does to it (`Simulation`), as (RMS of the whole, worst
# row, worst value). The largest that were measured without a bug, on the built-in model, stories15M, SmolLM2 and random
# models of 2 to 8 layers, prompts of 1 to 128 tokens, against transformers, the fast operations and other dtypes:
# of a step alone 0.82, 1.3 and 2.2 in fp32, where sums have another order, 0.33, 0.66 and 1.1 in bf16 and fp16 (int8:
# 0.72, 0.73 and 1.7); end to end 0.97, 1.8 and 2.0, and 0.64, 1.7 and 1.5 (int8: 0.69, 0.82 and 1.2).
_ALLOWED, _ALLOWED_IN_16_BITS = (2.5, 4.0, 6.0), (1.0, 1.5, 2.5)
_END_TO_END, _END_TO_END_IN_16_BITS = (2.5, 5.0, 6.0), (1.2, 2.5, 3.0)

# Two logits may move towards each other by this multiple of what simulated rounding does, as a root mean square. The
# largest that was measured in the same runs, for the two most likely of each position: 3.2 in fp32, 1.6 in 16 bits.
_ALLOWED_OF_LIKELIEST = 6.0


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
    if tensor.dtype.itemsize == 2:
        return tensor.dtype
    values = tensor[tensor.isfinite()]
    telling = values[values.frexp().mantissa.abs() != 0.5]
    telling = telling[telling != 0]
    if len(telling) < _SIMPLE:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(telling.to(dtype).to(tensor.dtype), telling):
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


class Simulation:
    """A tap for two rows [2, T] that perturbs every tensor of the second by up to eps, as rounding does.

    `levels` gets the relative differences that this causes in each tensor, and `of_logits` the root mean square of that
    in the logits of each position. put: what both rows continue with in place of the exact one, the other run's tensor:
    so the sensitivity of each step is measured (a sum of two large opposite terms, for example, passes on much more
    rounding than it adds). None: each row continues with its own. part: of a tensor, what is measured.
    """

    def __init__(
        self,
        precision: Precision,
        part: Callable[[str, Tensor], Tensor],
        put: Callable[[str, Tensor], Tensor | None] | None,
    ):
        self.levels: dict[str, Limits] = {}
        self.of_logits: Tensor | None = None  # [T]
        self._precision, self._part, self._put = precision, part, put
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, name: str, rows: Tensor) -> Tensor:
        """Measure and perturb."""
        exact, perturbed = rows
        self.levels[name] = Limits(*measure(self._part(name, perturbed), self._part(name, exact)).figures)
        if name == LAST:
            self.of_logits = (perturbed - exact).square().mean(-1).sqrt().cpu()
        theirs = self._put(name, exact) if self._put else None
        if theirs is not None:
            exact = perturbed = theirs
        eps = eps_of(self._precision.rounding) if theirs is None else self._precision.eps(name)
        return torch.stack((exact, (perturbed * self.noise(eps, perturbed)).to(rows.dtype)))

    def noise(self, eps: float, like: Tensor) -> Tensor:
        """Return random factors around 1, by up to eps."""
        generator = self._generators.setdefault(like.device, torch.Generator(like.device).manual_seed(0))
        return torch.rand(like.shape, generator=generator, device=like.device).mul_(2 * eps).add_(1 - eps)


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
