"""Matrices in the block formats of GGML, as GGUF files hold them: mapped as they lie, dequantized some rows at a time.

A row is a sequence of blocks, each with 32 or 256 values and scales of its own. The layouts are those of the structs
block_q4_0, block_q4_K, … in ggml/src/ggml-common.h, the values those of dequantize_row_q4_0, … in ggml-quants.c
(github.com/ggml-org/ggml). In fp32 they are the same bit for bit: a product of an fp16 scale, a scale of at most 8 bits
and a value of at most 6 is exact, so that only one operation rounds.

A CPU multiplies blocks faster if they are interleaved: its vectors then find the same bytes of 16 rows side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .int4 import OUTPUTS

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F  # of eight bytes


class BlockType(NamedTuple):
    """A block format: `unpack` returns the values [..., n_values] fp32 of blocks [..., n_bytes] uint8."""

    name: str
    n_values: int
    n_bytes: int
    halves: range  # the bytes of its fp16 numbers; interleaving moves these in pairs, the others in fours
    unpack: Callable[[Tensor], Tensor]


class Blocks(NamedTuple):
    """A matrix [out, in] in blocks of GGML."""

    data: Tensor  # [out, bytes per row] uint8; interleaved: [out / 16, blocks per row, 16 * bytes per block]
    kind: BlockType
    dtype: torch.dtype  # of the computation: `embed` returns rows in it
    is_interleaved: bool = False  # byte i of a block begins at byte 16 * i of 16 blocks

    @property
    def format(self) -> str:
        """The name of the format, such as "Q4_K"."""
        return self.kind.name

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        if self.is_interleaved:
            return torch.Size((self.data.shape[0] * OUTPUTS, self.data.shape[1] * self.kind.n_values))
        return torch.Size((self.data.shape[0], self.data.shape[1] // self.kind.n_bytes * self.kind.n_values))

    @property
    def nbytes(self) -> int:
        """The number of bytes of the blocks."""
        return self.data.nbytes

    def split(self, n_rows: int) -> Iterator[Blocks]:
        """Yield the matrix in pieces of `n_rows` rows, as views; if it is interleaved, a multiple of 16."""
        assert not self.is_interleaved or n_rows % OUTPUTS == 0
        for data in self.data.split(n_rows // OUTPUTS if self.is_interleaved else n_rows):
            yield self._replace(data=data)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] that the blocks stand for; computed in fp32, then rounded to `dtype`.

        The data may have any leading dimensions, such as the rows [..., T, bytes per row] of some tokens.
        """
        blocks = self._separated() if self.is_interleaved else self.data.unflatten(-1, (-1, self.kind.n_bytes))
        return self.kind.unpack(blocks).flatten(-2).to(dtype)

    def _separated(self) -> Tensor:
        """Return interleaved blocks one by one: [out, blocks per row, bytes per block]."""
        first, last = self.kind.halves.start, self.kind.halves.stop
        pieces = []
        for begin, end, size in ((0, first, 4), (first, last, 2), (last, self.kind.n_bytes, 4)):
            together = self.data[..., begin * OUTPUTS : end * OUTPUTS]
            items = together.unflatten(-1, ((end - begin) // size, OUTPUTS, size))
            pieces.append(items.permute(0, 3, 1, 2, 4).flatten(-2))  # [out / 16, 16, blocks, end - begin]
        return torch.cat(pieces, dim=-1).flatten(0, 1)


def _halves(field: Tensor) -> Tensor:
    """Return the fp16 numbers in bytes [..., 2 * n], as fp32 [..., n]."""
    return field.view(torch.float16).float()


def _nibbles(field: Tensor) -> Tensor:
    """[..., n] -> [..., 2 * n]: the low four bits of every byte, then the high ones. n is a multiple of 8."""
    words = field.contiguous().view(torch.int64)  # eight bytes at a time
    return torch.cat((words & _LOW_NIBBLES, words >> 4 & _LOW_NIBBLES), dim=-1).view(torch.uint8)


def _single_bits(field: Tensor) -> Tensor:
    """[..., n] -> [..., 8 * n]: every bit of every byte, the lowest first."""
    bits = torch.arange(256, device=field.device).unsqueeze(-1) >> torch.arange(8, device=field.device) & 1
    table = bits.to(torch.uint8).view(torch.int64).flatten()  # [256]: eight bytes as one number
    return table[field.int()].view(torch.uint8)


def _planes(field: Tensor, width: int) -> Tensor:
    """[..., n] -> [..., 8 / width, n]: `width` bits of every byte, the lowest first, then the next, …"""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=field.device).unsqueeze(-1)
    return field.unsqueeze(-2) >> shifts & (1 << width) - 1


def _q8_0(blocks: Tensor) -> Tensor:
    """An fp16 scale, 32 int8 values: value * scale."""
    return blocks[..., 2:].view(torch.int8) * _halves(blocks[..., :2])


def _q4_0(blocks: Tensor) -> Tensor:
    """An fp16 scale, 16 bytes with values j and j + 16 in byte j: (value - 8) * scale."""
    return _nibbles(blocks[..., 2:]).view(torch.int8).sub_(8) * _halves(blocks[..., :2])


def _q4_1(blocks: Tensor) -> Tensor:
    """An fp16 scale and minimum, 16 bytes as in Q4_0: value * scale + minimum."""
    return (_nibbles(blocks[..., 4:]) * _halves(blocks[..., :2])).add_(_halves(blocks[..., 2:4]))


def _five_bits(blocks: Tensor) -> Tensor:
    """[..., 20] -> [..., 32]: 4 bytes with the fifth bits, value j's in bit j, then 16 bytes as in Q4_0."""
    return _nibbles(blocks[..., 4:]).add_(_single_bits(blocks[..., :4]) << 4)


def _q5_0(blocks: Tensor) -> Tensor:
    """An fp16 scale, 32 values of five bits: (value - 16) * scale."""
    return _five_bits(blocks[..., 2:]).view(torch.int8).sub_(16) * _halves(blocks[..., :2])


def _q5_1(blocks: Tensor) -> Tensor:
    """An fp16 scale and minimum, 32 values of five bits: value * scale + minimum."""
    return (_five_bits(blocks[..., 4:]) * _halves(blocks[..., :2])).add_(_halves(blocks[..., 2:4]))


def _scaled_k(values: Tensor, blocks: Tensor) -> Tensor:
    """values [..., 8, 32] and their blocks in Q4_K or Q5_K -> [..., 256].

    A block begins with an fp16 scale and minimum, and 12 bytes with a scale and a minimum of six bits for each of its
    eight groups: value * group's scale * scale - group's minimum * minimum.
    """
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    # of groups 0 to 3, the low six bits of `first` and `second`; of 4 to 7, four bits of `rest` and the two above those
    scales = torch.cat((first & 63, rest & 15 | first >> 2 & 48), dim=-1) * _halves(blocks[..., :2])  # [..., 8]
    minimums = torch.cat((second & 63, rest >> 4 | second >> 2 & 48), dim=-1) * _halves(blocks[..., 2:4])
    return (values * scales.unsqueeze(-1)).sub_(minimums.unsqueeze(-1)).flatten(-2)


def _four_bits_k(field: Tensor) -> Tensor:
    """[..., 128] -> [..., 8, 32]: of every 32 bytes the low bits are a group of values, the high bits the next."""
    return _nibbles(field.unflatten(-1, (4, 32))).view(*field.shape[:-1], 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    """16 bytes of scales as in `_scaled_k`, 128 bytes of values as in `_four_bits_k`."""
    return _scaled_k(_four_bits_k(blocks[..., 16:]), blocks)


def _q5_k(blocks: Tensor) -> Tensor:
    """16 bytes of scales as in Q4_K, 32 bytes with the fifth bits, group i's in the bits i, 128 bytes as in Q4_K."""
    return _scaled_k(_four_bits_k(blocks[..., 48:]).add_(_planes(blocks[..., 16:48], 1) << 4), blocks)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes with the low four bits, 64 with the high two, 16 int8 scales of 16 values each, an fp16 scale.

    Each half of a block has 64 bytes of low bits (the low ones of 64 values, then of 64 more) and 32 of high bits (bits
    0 and 1 of 32 values, then 2 and 3 of the next 32, …): (value - 32) * group's scale * scale.
    """
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))  # [..., 2, 128]
    high = _planes(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-2)  # [..., 2, 128]
    values = low.add_(high << 4).view(torch.int8).sub_(32).view(*blocks.shape[:-1], 16, 16)
    scales = blocks[..., 192:208].view(torch.int8) * _halves(blocks[..., 208:])  # [..., 16]
    return (values * scales.unsqueeze(-1)).flatten(-2)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q8_0", 32, 34, range(0, 2), _q8_0),
        BlockType("Q4_0", 32, 18, range(0, 2), _q4_0),
        BlockType("Q4_1", 32, 20, range(0, 4), _q4_1),
        BlockType("Q5_0", 32, 22, range(0, 2), _q5_0),
        BlockType("Q5_1", 32, 24, range(0, 4), _q5_1),
        BlockType("Q4_K", 256, 144, range(0, 4), _q4_k),
        BlockType("Q5_K", 256, 176, range(0, 4), _q5_k),
        BlockType("Q6_K", 256, 210, range(208, 210), _q6_k),
    )
}
