"""Operations for a model with some matrices on a GPU and some on the CPU: each is multiplied where it is stored.

Activations, norms, cache and attention stay on the GPU. For a matrix on the CPU, the activations are copied there and
the result is copied back: 14 copies of some KB per token and layer, about 15 µs each, compared with the 0.44 GB of a
layer of 8B in bf16, which a CPU reads in about 10 ms. (An estimate, not measured on a GPU.)
"""

from __future__ import annotations

from torch import Tensor

from ..ops import Ops
from ..quantization.blocks import Blocks
from ..quantization.matrix import Matrix, tensors_of


def mixed_ops(gpu: Ops, cpu: Ops) -> Ops:
    """Return the operations of `gpu`, with those of `cpu` for matrices and tables that are stored elsewhere.

    Inputs and outputs are on the GPU: a result of `cpu` is moved to the device of its input.
    """

    def embed(tokens: Tensor, table: Tensor | Blocks) -> Tensor:
        """tokens [..., T], table [vocab, dim] -> [..., T, dim] on the tokens' device, in the table's dtype."""
        home = tensors_of(table)[0].device
        if home == tokens.device:
            return gpu.embed(tokens, table)
        return cpu.embed(tokens.to(home), table).to(tokens.device)

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in], weight [out, in] -> [..., out] on x's device, in x's dtype."""
        home = tensors_of(weight)[0].device
        if home == x.device:
            return gpu.linear(x, weight)
        return cpu.linear(x.to(home), weight).to(x.device)

    return gpu._replace(embed=embed, linear=linear, can_capture=False)
