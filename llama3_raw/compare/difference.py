"""How far a tensor, or a distribution of next tokens, is from another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

TOP_K = 10  # the likeliest tokens whose overlap is told

# Ports hide scores by -1e9 or the most negative number as often as by -inf; softmax makes 0 of all of them.
_HIDDEN = -1e4


class Difference(NamedTuple):
    """How far a tensor is from another. Both figures are infinite where they cannot be compared number by number."""

    absolute: float  # the largest |a - b|
    relative: float  # the largest |a - b| / |b| of a row, as lengths
    unlike: str | None = None  # in words, why they cannot


def difference(a: Tensor, b: Tensor) -> Difference:
    """How far a is from b, both [..., n], over the rows of the last dimension.

    Each row counts by itself, since trained models let the first token's values grow a thousandfold, beside which all
    others would be small. But one that is shorter than most is held against their median length: a few scores that
    happen to be near zero say nothing about how large rounding is. Compared on the CPU, which has fp64 for the lengths.
    """
    if a.shape != b.shape:
        return Difference(math.inf, math.inf, f"its shape is {list(b.shape)}, not {list(a.shape)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to("cpu", dtype), b.to("cpu", dtype)
    hidden = ((a == -torch.inf) & (b <= _HIDDEN)) | ((a <= _HIDDEN) & (b == -torch.inf))
    same = hidden | (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite() & b.isfinite() & ~hidden
    unlike = int((~same & ~finite).sum())
    if unlike:
        what = f"{unlike:,} of its {a.numel():,} values are infinite or no number on one side only"
        return Difference(math.inf, math.inf, what)
    apart = torch.where(finite, a - b, 0.0)
    # in fp64 the square of the most negative number of fp32, with which some hide scores, is still finite
    lengths = vector_norm(apart, dim=-1, dtype=torch.float64)  # [...]
    sizes = vector_norm(torch.where(finite, b, 0.0), dim=-1, dtype=torch.float64)
    relative = torch.where(lengths == 0, 0.0, lengths / sizes.clamp(min=sizes.median()))
    return Difference(float(apart.abs().max()), float(relative.max()))


class Logits(NamedTuple):
    """How alike two runs' next tokens are; KL is that of the other run's distribution from ours, in nats."""

    top_k: float  # the share of the other run's TOP_K likeliest tokens that are ours, mean over the positions
    top_k_last: float  # at the last position
    same_likeliest: float  # the share of positions with the same likeliest token
    same_likeliest_last: bool
    kl: float  # mean over the positions
    kl_last: float

    @staticmethod
    def of(ours: Tensor, theirs: Tensor) -> Logits:
        """The figures for logits [T, vocab_size]."""
        top_k, same, kl = [], [], []
        for a, b in zip(ours.split(64), theirs.split(64), strict=True):  # in fp64 they are large
            a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
            k = min(TOP_K, a.shape[-1])
            best_a, best_b = a.topk(k).indices, b.topk(k).indices  # [T, k]
            shared = (best_a.unsqueeze(-1) == best_b.unsqueeze(-2)).sum((-2, -1))
            top_k.append(shared.double() / k)
            same.append(a.argmax(-1) == b.argmax(-1))
            kl.append(torch.where(b == -torch.inf, 0.0, b.exp() * (b - a)).sum(-1))
        overlap, likeliest, nats = torch.cat(top_k), torch.cat(same), torch.cat(kl)  # each [T]
        return Logits(
            float(overlap.mean()),
            float(overlap[-1]),
            float(likeliest.double().mean()),
            bool(likeliest[-1]),
            float(nats.mean()),
            float(nats[-1]),
        )


def in_our_layout(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with a batch dimension of 1, or with its heads joined, without and apart; any other as it is."""
    for joined in (shape, torch.Size((*shape[:-2], shape[-2] * shape[-1]))):
        if tensor.shape in (joined, (1, *joined)):
            return tensor.reshape(shape)
    return tensor
