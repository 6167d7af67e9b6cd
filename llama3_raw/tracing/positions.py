"""Where the tokens of a pass are in their text: read from `forward`, in which a tap is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..model import forward, token_positions
from ..ops import Rows
from .names import LAST, token_dimension
from .padding import integers


class ThisPass(NamedTuple):
    """The arguments of `forward` that say which tokens a pass computes."""

    start: int | Tensor
    length: int  # tokens, padding included
    logits_at: int | Tensor | None = None
    is_whole: bool = True  # there is no cache: the pass has the whole text

    @staticmethod
    def of_caller(name: str, tensor: Tensor) -> ThisPass:
        """Return those of the `forward` that called a tap with this tensor; without one, those of a whole text.

        They are read from its frame, because a tap gets no more than a name and a tensor.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not forward.__code__:
            frame = frame.f_back
        if frame is None:
            return ThisPass(0, tensor.shape[token_dimension(name)])
        given = frame.f_locals
        return ThisPass(given["start"], given["tokens"].shape[-1], given["logits_at"], given["cache"] is None)

    def rows(self) -> Rows:
        """Return what a loop would say of this pass: rows with a start of their own are texts, and none is padded."""
        if isinstance(self.start, int) or not self.start.dim():
            return Rows((int(self.start),), (self.length,))
        if self.start.dim() > 1:
            raise UserError("takes a batch [B, T] only, where rows have starts of their own", argument="every_pass")
        starts = tuple(self.start.flatten().tolist())
        return Rows(starts, (self.length,) * len(starts), tuple((text,) for text in range(len(starts))), is_batch=True)

    def positions(self, name: str, device: torch.device) -> tuple[Tensor, int | None]:
        """Return the positions of a tensor, [T] or [..., T], and which dimension is T, counted from the end.

        Of logits that are chosen by logits_at it is None, and the positions are [] or [...].
        """
        positions = token_positions(self.start, self.length, device)
        if name != LAST or self.logits_at is None:
            return positions, token_dimension(name)
        if isinstance(self.logits_at, int):
            return positions[..., self.logits_at], None
        at = self.logits_at.unsqueeze(-1)
        return positions.expand(*at.shape[:-1], self.length).gather(-1, at).squeeze(-1), None


def checked_positions(positions: int | Sequence[int] | Tensor) -> list[int]:
    """Return positions of a text as a list. Raises UserError unless they are integers from 0 on, at least one."""
    given = integers(positions)
    if given is None or given.dim() > 1 or not given.numel() or int(given.min()) < 0:
        what = f"should be tokens of the text, counted from 0, such as range(5, 9); is {positions!r}"
        raise UserError(what, argument="positions")
    listed: list[int] = given.view(-1).tolist()
    return listed


def spread(values: Tensor, tensor: Tensor, dimension: int | None) -> Tensor:
    """Return values [T] or [..., T] with more dimensions, so that they broadcast over a tensor, whose T is `dimension`.

    None: the values are [] or [...], the tensor [..., n].
    """
    after = 0 if dimension is None else -1 - dimension
    *batch, length = (*values.shape, 1) if dimension is None else values.shape
    return values.reshape(*batch, *[1] * (tensor.dim() - len(batch) - 1 - after), length, *[1] * after)


def with_rows(given: Tensor, name: str, tensor: Tensor, this: ThisPass, wanted: list[int]) -> Tensor:
    """Return a given tensor as it is if it has the dimension T, and with one row if it has not.

    It has not if its shape is that of the tensor of the pass without T; the dimensions for a batch may be missing.
    Raises UserError if its rows could as well be those of the wanted positions, or of the tokens of a text.
    """
    at = token_dimension(name)
    if given.dim() < -at:
        return given.reshape(*[1] * (-at - given.dim()), *given.shape)
    bare = list(tensor.shape)
    if name != LAST or this.logits_at is None:
        del bare[at]
    if list(given.shape) != bare[-given.dim() :]:
        return given
    n_rows, one_row = given.shape[at], given.unsqueeze(at)
    if n_rows > 1 and (n_rows in (len(wanted), this.length) or (n_rows > max(wanted) and not this.is_whole)):
        raise UserError(
            f"the patch of {name}, {list(given.shape)}, may have {n_rows} rows for tokens, or none: give "
            f"{list(given.unsqueeze(0).shape)} or {list(one_row.shape)}"
        )
    return one_row


def rows_at(given: Tensor, name: str, positions: Tensor, wanted: list[int], dimension: int | None) -> Tensor:
    """Return the rows of a given tensor for the positions of a pass, where they are wanted, and any rows elsewhere.

    given: a row for each wanted position, for each token of a text, or for all; in the shape of the named tensor.
    positions, dimension: as `ThisPass.positions` returns them. Raises UserError if it has another number of rows.
    """
    at = token_dimension(name)
    n_rows = given.shape[at]
    if n_rows == len(wanted):
        row_of = torch.zeros(max(wanted) + 1, dtype=torch.long)
        row_of[wanted] = torch.arange(n_rows)
    elif n_rows > max(wanted):
        row_of = torch.arange(n_rows)
    elif n_rows == 1:
        row_of = torch.zeros(max(wanted) + 1, dtype=torch.long)
    else:
        raise UserError(
            f"the patch of {name} has {n_rows} rows: give one for each of the {len(wanted)} positions, or one for each "
            f"token up to position {max(wanted)}"
        )
    rows = given.movedim(at, 0)[row_of[positions.cpu().clamp(max=len(row_of) - 1)].to(given.device)]  # [..., T, ...]
    return rows if dimension is None else rows.movedim(positions.dim() - 1, dimension)
