"""Tensor parallelism: operations for a model whose matrices are sharded over several processes.

Each process computes a layer as a single one does, with fewer heads and a narrower feed-forward. The outputs of wo and
w2 are partial sums, which `reduce` adds over the processes. (Shoeybi et al. 2019, figure 3)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Ops
from ..quantization.blocks import Blocks
from ..quantization.matrix import Matrix
from ..system.process_groups import Group
from ..weights import Weights


def parallel_ops(ops: Ops, weights: Weights, group: Group) -> Ops:
    """Return `ops` for this process's shard of the weights; shards are in the order of the ranks.

    All processes of the group must run the same passes together. Each gets the logits of the whole vocabulary.
    """

    def embed(tokens: Tensor, table: Tensor | Blocks) -> Tensor:
        """tokens [..., T], a shard of the table [vocab / size, dim] -> [..., T, dim]."""
        rows = tokens - group.rank * table.shape[0]
        is_here = (rows >= 0) & (rows < table.shape[0])
        embedded = ops.embed(torch.where(is_here, rows, 0), table)
        return group.all_reduce(embedded.masked_fill_(~is_here.unsqueeze(-1), 0))

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in], a shard of a matrix -> [..., shard of out]; for the output matrix, all of out."""
        y = ops.linear(x, weight)
        return group.all_gather(y).movedim(0, -2).flatten(-2) if weight is weights.output else y

    return ops._replace(embed=embed, linear=linear, reduce=group.all_reduce, can_capture=False)
