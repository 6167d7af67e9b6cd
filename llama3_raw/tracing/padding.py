"""Prompts of unequal length in one batch: padded on the right, and the lengths beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..ops import Rows
from ..params import Params

Ids = Sequence[int] | Tensor


def pad(prompts: Iterable[Ids]) -> tuple[Tensor, Tensor]:
    """Return prompts as tokens [B, T], padded on the right, and their lengths [B].

    The causal mask hides the padding from the tokens before it. It repeats the last token of the prompt.

    Raises:
        UserError: there are no prompts, one is empty, or one is not a sequence of token ids.
    """
    try:
        rows = [_ids_of(prompt) for prompt in prompts]
    except TypeError as error:
        raise UserError(f"should be a list of prompts, is {in_short(repr(prompts))}", argument="prompts") from error
    if not rows:
        raise UserError("there are no prompts; give at least one")
    lengths = [len(row) for row in rows]
    padded = [[*row, *[row[-1]] * (max(lengths) - len(row))] for row in rows]
    return torch.tensor(padded), torch.tensor(lengths)


class Prompts(NamedTuple):
    """A prompt, or a batch of them."""

    tokens: Tensor  # [T] or [B, T], on the CPU
    lengths: Tensor | None = None  # [B], of a padded batch

    @property
    def ids(self) -> list[int] | list[list[int]]:
        """The tokens without the padding: of one prompt, or of each."""
        ids: list[int] | list[list[int]] = self.tokens.tolist()
        if self.lengths is None:
            return ids
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths.tolist(), strict=True)]

    @property
    def rows(self) -> Rows:
        """What a pass over them computes."""
        if self.tokens.dim() == 1:
            return Rows((0,), (len(self.tokens),))
        n_rows, length = self.tokens.shape
        lengths = [length] * n_rows if self.lengths is None else self.lengths.tolist()
        return Rows((0,) * n_rows, tuple(lengths), tuple((row,) for row in range(n_rows)), is_batch=True)


def read_prompts(ids: Ids | Sequence[Ids], lengths: Ids | None, params: Params) -> Prompts:
    """Return ids [T] or [B, T], or prompts of unequal length, as tensors.

    Raises UserError unless they are token ids of the model that fit into its context, and the lengths fit the batch.
    """
    if lengths is None and _are_prompts(ids):
        prompts = Prompts(*pad(ids))
    else:
        tokens = _tokens_of(ids)
        prompts = Prompts(tokens, None if lengths is None else _checked_lengths(lengths, tokens))
    params.check_ids(prompts.tokens.flatten().tolist())
    needed, limit = prompts.tokens.shape[-1], params.max_seq_len
    if needed > limit:
        raise UserError(f"the prompt needs {needed} positions, but the context holds {limit}; shorten the prompt")
    return prompts


def tokens_of_one_prompt(ids: Ids, params: Params) -> list[int]:
    """Return ids [T] as a list. Raises UserError if they are not integers [T], are empty, or not in the vocabulary."""
    checked = _ids_of(ids)
    params.check_ids(checked)
    return checked


def _are_prompts(ids: Ids | Sequence[Ids]) -> TypeGuard[Sequence[Ids]]:
    """Whether ids are a sequence of prompts: not a tensor, nor the tokens of one."""
    if not isinstance(ids, Sequence) or not len(ids):
        return False
    return all(row.dim() > 0 if isinstance(row, Tensor) else isinstance(row, (list, tuple)) for row in ids)


def _ids_of(ids: Ids) -> list[int]:
    tokens = _tokens_of(ids)
    if tokens.dim() != 1:
        raise UserError("ids should be the tokens of one prompt, as tokenizer.encode returns them")
    checked: list[int] = tokens.tolist()
    return checked


def _tokens_of(ids: object) -> Tensor:
    """Return ids [T] or [B, T] as a tensor on the CPU. Raises UserError if they are something else, or empty."""
    tokens = integers(ids)
    if tokens is None or tokens.dim() not in (1, 2):
        raise UserError("ids should be the tokens of one prompt, as tokenizer.encode returns them, or a batch [B, T]")
    if not tokens.numel():
        raise UserError("the prompt is empty; give at least one token")
    return tokens.long()


def _checked_lengths(lengths: Ids, tokens: Tensor) -> Tensor:
    """Return the lengths [B] of the rows of tokens [B, T]. Raises UserError if they are something else."""
    shape, checked = tokens.shape, integers(lengths)
    if checked is None or len(shape) != 2 or checked.shape != shape[:1]:
        what = f"should be one length for each row of ids [B, T], as pad returns them; ids are {list(shape)}"
        raise UserError(what, argument="lengths")
    if not 1 <= int(checked.min()) <= int(checked.max()) <= shape[1]:
        what = f"{checked.tolist()}: each should be from 1 to the {shape[1]} tokens of a row"
        raise UserError(what, argument="lengths")
    return checked


def integers(values: object) -> Tensor | None:
    """Return values as a tensor on the CPU; None if they are no integers, or not in the form of a tensor."""
    try:
        tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    is_other = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    return None if is_other and tensor.numel() else tensor


def as_index(at: int | Ids | None) -> int | Tensor | None:
    """Return an index into T, or a tensor [B] of one for each row. Raises UserError if it is something else."""
    if at is None:
        return None
    rows = integers(at)
    if rows is None or not rows.numel():
        raise UserError(f"should be an index of a token, or a tensor of one for each row, is {at!r}", argument="at")
    return rows.long() if rows.dim() else int(rows)


def index_in_texts(at: int | Tensor, lengths: Tensor, argument: str) -> Tensor:
    """Return the index [B] of a token in each text of a padded batch; a negative one counts from the end of its text.

    at: one index for all, or [B]. Raises UserError if a text has no such token.
    """
    index = torch.as_tensor(at)
    if index.dim() and index.shape != lengths.shape:
        raise UserError(f"has {len(index)} indices, for {len(lengths)} prompts; give one per row", argument=argument)
    for place, length in zip(index.expand_as(lengths).tolist(), lengths.tolist(), strict=True):
        if not -length <= place < length:
            raise UserError(f"{place} is not in a prompt of {length} tokens", argument=argument)
    return index % lengths


def select_token(tensor: Tensor, dimension: int, at: int | Tensor) -> Tensor:
    """Return a tensor without its dimension T (counted from the end): of one token, or of one for each row.

    Raises UserError if there is no such token, or not one for each row.
    """
    length, batch = tensor.shape[dimension], tensor.shape[: at.dim() if isinstance(at, Tensor) else 0]
    low, high = (at, at) if isinstance(at, int) else (int(at.min()), int(at.max()))
    if not -length <= low <= high < length:
        raise UserError(f"{low if low < -length else high}: a pass of {length} tokens has no such token", argument="at")
    if isinstance(at, int):
        return tensor.select(dimension, at)
    if at.shape != batch or at.dim() > tensor.dim() + dimension:
        raise UserError(
            f"has {len(at)} indices, for a pass of shape {list(tensor.shape)}; give one per row", argument="at"
        )
    rows = (at % length).to(tensor.device).view(*batch, *[1] * (tensor.dim() - at.dim()))
    shape = [*tensor.shape]
    shape[dimension] = 1
    return tensor.gather(dimension, rows.expand(shape)).squeeze(dimension)
