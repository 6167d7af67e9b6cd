"""How the tensors of a model are split among several: files of Meta's format, or processes that run it together.

A process holds some of the heads and some of the width of the feed-forward, so that it needs the others' results only
where a layer adds up what all have found (tensor parallelism; Shoeybi et al. 2019, section 3, and Meta's own code, by
ColumnParallelLinear, RowParallelLinear and VocabParallelEmbedding of fairscale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..params import Params

# the dimension on which a tensor is split; those not named here are whole everywhere
SHARDED_DIMENSION = {
    **dict.fromkeys(("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


class Shard(NamedTuple):
    """The part of a model that one process holds, of several that run it together."""

    rank: int  # from 0 on
    size: int  # how many there are

    def of_params(self, params: Params) -> Params:
        """The numbers that define the part: those of a model with fewer heads and a narrower feed-forward.

        With more processes than kv heads, neighbours have the same one. Raises UserError where the model cannot be
        split so.
        """
        obstacle = cannot_split(params, self.size)
        if obstacle:
            fitting = ", ".join(map(str, possible_sizes(params)))
            raise UserError(
                f"{self.size} processes cannot share {obstacle} evenly; start so many for a model: {fitting}"
            )
        return replace(
            params,
            n_heads=params.n_heads // self.size,
            n_kv_heads=max(1, params.n_kv_heads // self.size),
            hidden_dim=params.hidden_dim // self.size,
        )

    def of_dimension(self, field: str, length: int, params: Params) -> range:
        """Which of the rows or columns of a tensor the part has, of so many on its SHARDED_DIMENSION."""
        count = length // self.size
        if field not in ("wk", "wv"):
            return range(self.rank * count, (self.rank + 1) * count)
        first = self.rank * params.n_kv_heads // self.size
        count = max(1, params.n_kv_heads // self.size)
        return range(first * params.head_dim, (first + count) * params.head_dim)


def cannot_split(params: Params, size: int) -> str | None:
    """What of the model so many processes cannot share, in words; None where they can."""
    if params.n_heads % size:
        return f"{params.n_heads} heads"
    if params.n_kv_heads % size and size % params.n_kv_heads:
        return f"{params.n_kv_heads} kv heads"
    if params.hidden_dim % size:
        return f"a feed-forward of {params.hidden_dim} values"
    return f"a vocabulary of {params.vocab_size} tokens" if params.vocab_size % size else None


def possible_sizes(params: Params) -> list[int]:
    """The numbers of processes that can share the model."""
    return [size for size in range(1, params.n_heads + 1) if not cannot_split(params, size)]


def take(parts: Sequence[Tensor], dimension: int, wanted: range) -> list[Tensor]:
    """The wanted rows or columns of the tensor that equal parts make together: a view of each part that has some."""
    length = parts[0].shape[dimension]
    pieces = []
    for i, part in enumerate(parts):
        begin, end = max(wanted.start - i * length, 0), min(wanted.stop - i * length, length)
        if begin < end:
            pieces.append(part.narrow(dimension, begin, end - begin))
    return pieces


def join(parts: Sequence[Tensor], dimension: int) -> Tensor:
    """The tensor that the parts make together; where it is one, the part itself."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dimension)
