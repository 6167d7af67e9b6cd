"""How tensors are split among the files of Meta's format, or among the processes that run a model together.

A process holds some of the heads and a slice of the feed-forward, so that it needs the results of others only where a
layer sums them (tensor parallelism; Shoeybi et al. 2019, section 3; Meta's code uses ColumnParallelLinear,
RowParallelLinear and VocabParallelEmbedding of fairscale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..params import Params

# the dimension on which a tensor is split; all others are the same in every shard
SHARDED_DIMENSION = {
    **dict.fromkeys(("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


class Shard(NamedTuple):
    """The shard of a model that one process holds: number `rank` of `size` shards."""

    rank: int  # from 0 on
    size: int

    def of_params(self, params: Params) -> Params:
        """Return the params of the shard: those of a model with fewer heads and a narrower feed-forward.

        With more processes than kv heads, neighbours hold the same kv head. Raises UserError if the model cannot be
        split among `size` processes.
        """
        obstacle = cannot_split(params, self.size)
        if obstacle:
            possible = ", ".join(map(str, possible_sizes(params)))
            raise UserError(f"{self.size} processes cannot share {obstacle} evenly; possible numbers: {possible}")
        return replace(
            params,
            n_heads=params.n_heads // self.size,
            n_kv_heads=max(1, params.n_kv_heads // self.size),
            hidden_dim=params.hidden_dim // self.size,
        )

    def of_dimension(self, field: str, length: int, params: Params) -> range:
        """Return the range of rows or columns in the shard, of `length` on the SHARDED_DIMENSION of a tensor."""
        count = length // self.size
        if field not in ("wk", "wv"):
            return range(self.rank * count, (self.rank + 1) * count)
        first = self.rank * params.n_kv_heads // self.size
        count = max(1, params.n_kv_heads // self.size)
        return range(first * params.head_dim, (first + count) * params.head_dim)


def cannot_split(params: Params, size: int) -> str | None:
    """Return what of the model `size` processes cannot share, as text, or None if they can share it all."""
    if params.n_heads % size:
        return f"{params.n_heads} heads"
    if params.n_kv_heads % size and size % params.n_kv_heads:
        return f"{params.n_kv_heads} kv heads"
    if params.hidden_dim % size:
        return f"a feed-forward of {params.hidden_dim} values"
    return f"a vocabulary of {params.vocab_size} tokens" if params.vocab_size % size else None


def possible_sizes(params: Params) -> list[int]:
    """Return the numbers of processes that can share the model."""
    return [size for size in range(1, params.n_heads + 1) if not cannot_split(params, size)]


def take(shards: Sequence[Tensor], dimension: int, wanted: range) -> list[Tensor]:
    """Return the wanted rows or columns of a tensor in equal shards: a view of each shard that has some of them."""
    length = shards[0].shape[dimension]
    pieces = []
    for i, shard in enumerate(shards):
        begin, end = max(wanted.start - i * length, 0), min(wanted.stop - i * length, length)
        if begin < end:
            pieces.append(shard.narrow(dimension, begin, end - begin))
    return pieces


def join(shards: Sequence[Tensor], dimension: int) -> Tensor:
    """Return the joined tensor; a single shard is returned itself, not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dimension)
