"""Operations for a model whose matrices are shared among several processes: each computes with its part of them.

A layer is as in one process, with fewer heads and a narrower feed-forward; what comes out of wo and w2 is a part of the
sum, which `reduce` adds up over the processes. (Shoeybi et al. 2019, figure 3)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Ops
from ..quantization.matrix import Matrix
from ..system.process_groups import Group
from ..weights import Weights


def parallel_ops(own: Ops, weights: Weights, group: Group) -> Ops:
    """The operations of `own` for the process's part of the weights, which the group has in the order of its ranks.

    All processes of the group call it at the same time. Each gets the same logits, those of the whole vocabulary.
    """

    def embed(tokens: Tensor, table: Tensor) -> Tensor:
        """Tokens [..., T], a part of the table [vocab / size, dim] -> [..., T, dim]."""
        rows = tokens - group.rank * len(table)
        is_here = (rows >= 0) & (rows < len(table))
        found = own.embed(torch.where(is_here, rows, 0), table)
        return group.all_reduce(found.masked_fill_(~is_here.unsqueeze(-1), 0))

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in], a part of the rows of a matrix -> [..., part of out]; of the output matrix all of them."""
        y = own.linear(x, weight)
        return group.all_gather(y).movedim(0, -2).flatten(-2) if weight is weights.output else y

    return own._replace(embed=embed, linear=linear, reduce=group.all_reduce, can_capture=False)
