"""The difference between two tensors, or between two distributions of next tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

TOP_K = 10  # the most likely tokens whose overlap is reported

# Ports mask scores by -1e9 or the most negative number as often as by -inf; softmax turns all of them into 0.
_MASKED = -1e4


_RESIDUE = 1e-6  # times the longest row: less may be what rounding leaves of a gradient that is 0


class Difference(NamedTuple):
    """The difference between two tensors. Both figures are infinite if they cannot be compared value by value."""

    absolute: float  # the largest |a - b|
    relative: float  # the largest |a - b| / |b| of a row, with |.| the Euclidean norm
    unlike: str | None = None  # why they cannot be compared, as text


class Measured(NamedTuple):
    """A difference in four figures: the largest value, and three relative ones that rounding is judged by."""

    difference: Difference  # its `relative` is that of the worst row
    rms: float  # the root mean square of all rows' relative differences
    value: (
        float  # the largest |a - b| of a value, relative to the smaller of the two, or to its row's RMS if that is more
    )
    at: tuple[int, ...]  # the index of that value

    @property
    def figures(self) -> tuple[float, float, float]:
        """The relative figures: of the whole tensor, the worst row and the worst value."""
        return self.rms, self.difference.relative, self.value


def difference(a: Tensor, b: Tensor) -> Difference:
    """Return the difference between a and b, both [..., n], over the rows of the last dimension.

    Each row is measured alone, because trained models let the values of the first token grow a thousandfold, which
    would hide all others. A row shorter than the median of those that are not zero is measured against the median: a
    few scores that happen to be near zero say nothing about rounding. On the CPU, which has fp64 for the norms.
    """
    return measure(a, b).difference


def measure(a: Tensor, b: Tensor) -> Measured:
    """Return the difference between a and b, both [..., n], by tensor, by row (see `difference`) and by value.

    A row of 128,256 logits hides a single wrong one, so values are measured too: against their own size, as rounding
    is in proportion to it, or their row's.
    """
    if a.shape != b.shape:
        return incomparable(f"its shape is {list(b.shape)}, not {list(a.shape)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to("cpu", dtype), b.to("cpu", dtype)
    masked = ((a == -torch.inf) & (b <= _MASKED)) | ((a <= _MASKED) & (b == -torch.inf))
    same = masked | (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite() & b.isfinite() & ~masked
    unlike = ~same & ~finite
    if unlike.any():
        at = tuple(unlike.nonzero()[0].tolist())
        first = f"first {list(at)}, {float(b[at]):.4g} there and {float(a[at]):.4g} here"
        return incomparable(
            f"{int(unlike.sum()):,} of its {a.numel():,} values are infinite or NaN on one side only: {first}"
        )
    apart, a, b = (torch.where(finite, x, 0.0) for x in (a - b, a, b))
    # in fp64 the square of the most negative fp32 number, which some use as a mask, is finite
    lengths = vector_norm(apart, dim=-1, dtype=torch.float64)  # [...]
    sizes = vector_norm(b, dim=-1, dtype=torch.float64)
    if sizes.any():  # rows of zeros are the gradients of positions that no loss comes from
        sizes = sizes.clamp(min=torch.maximum(sizes[sizes > 0].median(), _RESIDUE * sizes.max()))
    relative = torch.where(lengths == 0, 0.0, lengths / sizes)
    typical = sizes / finite.sum(-1).clamp(min=1).sqrt()  # the RMS of the row
    apart = apart.abs()
    size = a.abs().minimum(b.abs()).maximum(typical.unsqueeze(-1).to(dtype))
    values = torch.where(apart == 0, 0.0, apart / size)
    at = tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))
    found = Difference(float(apart.max()), float(relative.max()))
    return Measured(found, float(relative.square().mean().sqrt()), float(values[at]), at)


def incomparable(why: str) -> Measured:
    """Return the figures of tensors that cannot be compared, infinite ones."""
    return Measured(Difference(math.inf, math.inf, why), math.inf, math.inf, ())


class Logits(NamedTuple):
    """How similar the next tokens of two runs are. KL is the other run's divergence from ours, in nats."""

    top_k: float  # the share of the other run's TOP_K most likely tokens that are ours too, mean over positions
    top_k_last: float  # at the last position
    same_likeliest: float  # the share of positions with the same most likely token
    same_likeliest_last: bool
    kl: float  # mean over the positions
    kl_last: float

    @staticmethod
    def of(ours: Tensor, theirs: Tensor) -> Logits:
        """Return the figures for logits [T, vocab_size]."""
        top_k, same, kl = [], [], []
        for a, b in zip(ours.split(64), theirs.split(64), strict=True):  # in fp64 they are large
            a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
            k = min(TOP_K, a.shape[-1])
            best_a, best_b = a.topk(k).indices, b.topk(k).indices  # [T, k]
            shared = (best_a.unsqueeze(-1) == best_b.unsqueeze(-2)).sum((-2, -1))
            top_k.append(shared.double() / k)
            same.append(a.argmax(-1) == b.argmax(-1))
            kl.append(torch.where(b == -torch.inf, 0.0, b.exp() * (b - a)).sum(-1))
        overlap, same_likeliest, nats = torch.cat(top_k), torch.cat(same), torch.cat(kl)  # each [T]
        return Logits(
            float(overlap.mean()),
            float(overlap[-1]),
            float(same_likeliest.double().mean()),
            bool(same_likeliest[-1]),
            float(nats.mean()),
            float(nats[-1]),
        )
