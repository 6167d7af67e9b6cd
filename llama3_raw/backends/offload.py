"""Operations for a model whose matrices lie partly on a GPU, partly on the CPU: each is multiplied where it lies.

Activations, norms, cache and attention stay on the GPU. For a matrix on the CPU the activations go there, and the
result comes back: 14 copies of some KB for a token and a layer, about 15 µs each, against the 0.44 GB of a layer of 8B
in bf16, which a CPU reads in about 10 ms. (An estimate; no GPU was at hand to measure it.)
"""

from __future__ import annotations

from torch import Tensor

from ..ops import Ops
from ..quantization.matrix import Matrix, tensors_of


def mixed_ops(gpu: Ops, cpu: Ops) -> Ops:
    """The operations of `gpu`, but products with a matrix, and rows of a table, that lie elsewhere are those of `cpu`.

    What comes in and what comes out is on the GPU: the results of `cpu` are moved to where its input was.
    """

    def embed(tokens: Tensor, table: Tensor) -> Tensor:
        """Tokens [..., T], table [vocab, dim] -> [..., T, dim] on the tokens' device, in the table's dtype."""
        if table.device == tokens.device:
            return gpu.embed(tokens, table)
        return cpu.embed(tokens.to(table.device), table).to(tokens.device)

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in], weight [out, in] -> [..., out] on x's device, in x's dtype."""
        home = tensors_of(weight)[0].device
        if home == x.device:
            return gpu.linear(x, weight)
        return cpu.linear(x.to(home), weight).to(x.device)

    return gpu._replace(embed=embed, linear=linear, can_capture=False)
