"""The type `Ops`: the few primitives of the forward pass that cost time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from .quantization.matrix import Matrix

Tap = Callable[[str, Tensor], Tensor]
"""tap(name, tensor) -> tensor: called at every named point of the forward pass, which goes on with what it returns."""


class Attend(Protocol):
    """Scaled dot-product attention of new queries over all keys so far; see model.attend for the shapes."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap, name: str) -> Tensor: ...


class Ops(NamedTuple):
    """The primitives that model.forward calls. `model.REFERENCE` is the exact set."""

    embed: Callable[[Tensor, Tensor], Tensor]  # (tokens [..., T], table [vocab, dim]) -> [..., T, dim]
    linear: Callable[[Tensor, Matrix], Tensor]  # (x [..., in], weight [out, in]) -> [..., out]
    attend: Attend
    reduce: Callable[[Tensor], Tensor]  # [..., dim] -> [..., dim]: the sum over all processes that share a layer


def score_bytes(itemsize: int) -> int:
    """What an attention score of so many bytes takes in all until it is used, in bytes. (Measured)"""
    return 12 if itemsize == 4 else 24  # another dtype than fp32 has each score in fp32 as well
