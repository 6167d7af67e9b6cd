"""`Ops`, the primitives of the forward pass that cost time, and `Tap`, a function that sees its tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import UserError, in_short
from .quantization.blocks import Blocks
from .quantization.matrix import Matrix

Tap = Callable[[str, Tensor], Tensor]
"""tap(name, tensor) -> tensor: called at every named point of the forward pass, which continues with the result.

Like a forward hook in PyTorch, but for one tensor at a time, by name. A tap may have a method wants(name) -> bool:
whether it looks at that tensor. Without it, it may look at any.
"""


UNFUSED = ("attention.scores", "attention.probs")  # of each layer; computed within `attend`, where a fused one has none
PREFILL_CHUNK = 1024  # tokens; with more, matrix products are hardly faster


class Attend(Protocol):
    """Scaled dot-product attention of new queries over all keys so far; see model.attend for the shapes."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor: ...


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms, RoPE, softmax and logits are computed: fp32, or fp64 for tensors in fp64."""
    return torch.promote_types(dtype, torch.float32)


def identity(x: Tensor) -> Tensor:
    """Return x: the sum over one process."""
    return x


class Ops(NamedTuple):
    """The primitives that model.forward calls, and their properties. `model.REFERENCE` is exact.

    `ops._replace(attend=...)` returns another set; its properties should hold for the replacement too.
    """

    embed: Callable[[Tensor, Tensor | Blocks], Tensor]  # (tokens [..., T], table [vocab, dim]) -> [..., T, dim]
    linear: Callable[[Tensor, Matrix], Tensor]  # (x [..., in], weight [out, in]) -> [..., out]
    attend: Attend
    reduce: Callable[[Tensor], Tensor] = identity  # [..., dim] -> [..., dim]: the sum over processes that share a layer
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] | None = None  # None: model.rms_norm
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # None: model.rope
    swiglu: Callable[[Tensor, Tensor], Tensor] | None = None  # None: silu(gate) * up

    prefill_chunk: int = PREFILL_CHUNK  # tokens of a prompt in one pass
    max_packed: int = 128  # tokens of several short prompts in one pass
    has_scores: bool = False  # whether attend taps scores and probs; a fused one never computes them
    can_capture: bool = False  # whether a pass over few tokens can be captured as a CUDA graph


def no_tap(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor unchanged: the tap that does nothing."""
    return tensor


@dataclass(frozen=True)
class Scoped:
    """A tap for a part of the pass: it adds `prefix` to each name."""

    tap: Tap
    prefix: str

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        name = self.prefix + name
        return checked_result(self.tap, name, self.tap(name, tensor))


def scoped(tap: Tap, prefix: str) -> Tap:
    """Return the tap for a part of the pass whose names all begin with `prefix`, such as "attention."."""
    if tap is no_tap:
        return tap
    return Scoped(tap.tap, tap.prefix + prefix) if isinstance(tap, Scoped) else Scoped(tap, prefix)


def checked_result(tap: Tap, name: str, result: Tensor) -> Tensor:
    """Return what the tap returned for this name. Raises UserError, naming both, if it is no tensor."""
    if not isinstance(result, Tensor):
        tap_name = getattr(tap, "__name__", type(tap).__name__)
        raise UserError(
            f"the tap {tap_name} should return a tensor, returns {in_short(result)} for {name}; end it with "
            "return tensor"
        )
    return result


def wants(tap: Tap, name: str) -> bool:
    """Whether the tap may look at the tensor of this name. One that does not say so, in wants(name), may."""
    wanted: Callable[[str], bool] | None = getattr(tap, "wants", None)
    return tap is not no_tap and (wanted is None or wanted(name))


class Rows(NamedTuple):
    """Which tokens the next pass of a loop computes, for taps that keep several passes."""

    starts: tuple[int, ...]  # the position of the first token of each row
    lengths: tuple[int, ...]  # the tokens of each row, without padding
    texts: tuple[tuple[int, ...], ...] | None = None  # which texts each row belongs to; None: there is only one
    is_batch: bool = False  # whether tensors have a dimension for rows; without it there is one row
    prompt_goes_on: bool = False  # in the next pass, so that nothing is chosen from these logits


def announce(tap: Tap, rows: Rows | None) -> None:
    """Call tap.begin(rows), if the tap has that method, before a pass; None says that other texts begin.

    Rows of no tokens say where texts end: what was computed of the positions from there on is not of the text.
    """
    begin: Callable[[Rows | None], None] | None = getattr(tap, "begin", None)
    if begin is not None:
        begin(rows)


def score_bytes(itemsize: int) -> int:
    """Return the bytes of memory per attention score with `itemsize` bytes, temporary tensors included. (Measured)"""
    return 12 if itemsize == 4 else 24  # dtypes other than fp32 need each score in fp32 as well
