"""Random blocks in GGML's formats."""

from __future__ import annotations

import torch
from torch import Tensor

from llama3_raw.quantization.blocks import BlockType


def random_blocks(kind: BlockType, n_rows: int, n_blocks: int, seed: int, largest: float | None = None) -> Tensor:
    """Return random bytes [n_rows, n_blocks * n_bytes] with finite scales of both signs, a third of them subnormal.

    largest: draw the scales up to this size instead.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n_rows, n_blocks, kind.n_bytes), dtype=torch.uint8, generator=generator)
    for begin in kind.halves[::2]:
        exponents = torch.randint(0, 31, (n_rows, n_blocks), generator=generator)  # 31 would be infinite
        exponents *= torch.rand(n_rows, n_blocks, generator=generator) > 1 / 3
        rest = torch.randint(0, 1 << 10, (n_rows, n_blocks), generator=generator)
        signs = torch.randint(0, 2, (n_rows, n_blocks), generator=generator)
        scales = (signs << 15 | exponents << 10 | rest).to(torch.int32).to(torch.int16).view(torch.float16)
        if largest is not None:
            scales = (largest * (2 * torch.rand(n_rows, n_blocks, generator=generator) - 1)).half()
        blocks[..., begin : begin + 2] = scales.unsqueeze(-1).view(torch.uint8)
    return blocks.flatten(1)
