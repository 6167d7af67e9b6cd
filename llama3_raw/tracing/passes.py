"""`JoinedPasses`: the tensors of several passes, joined so that the dimension T covers the texts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import UNFUSED, Rows
from .names import LAST, token_dimension, within_layer


class Piece(NamedTuple):
    """What one pass computed of a tensor for a text."""

    start: int  # the position of its first token
    tensor: Tensor  # without a dimension for rows
    dimension: int  # T, counted from the end
    has_keys: bool = False  # the last dimension is all tokens until the end of the piece

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.tensor.shape[self.dimension]

    def until(self, position: int) -> Piece:
        """Return the piece without the tokens from `position` on."""
        tensor = self.tensor.narrow(self.dimension, 0, position - self.start)
        return self._replace(tensor=tensor.narrow(-1, 0, position) if self.has_keys else tensor)


class JoinedPasses:
    """Keeps tensors of one text, or of several of unequal length, over all passes.

    A token that is computed again replaces the earlier one and all that follow it. Scores and probs get the keys that
    came later as a single pass over the text would mask them: -inf and 0.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, dict[int, list[Piece]]] = {}  # name -> number of the text -> in order
        self._spans: dict[int, tuple[int, int]] = {}  # of each text, the first and the last position + 1
        self._rows = Rows((), ())
        self._are_several = False

    @property
    def lengths(self) -> Tensor | None:
        """The tokens of each text [texts]; None if there is one text without a dimension for texts."""
        spans = [self._spans[text] for text in sorted(self._spans)]
        return torch.tensor([end - start for start, end in spans]) if self._are_several else None

    def begin(self, rows: Rows) -> None:
        """Begin a pass. Forget what it computes again, or what its tokens do not continue."""
        self._rows = rows
        self._are_several = rows.texts is not None
        for start, length, texts in zip(rows.starts, rows.lengths, rows.texts or ((0,),), strict=True):
            for text in texts:
                first, end = self._spans.get(text, (start, start))
                begin = start if length else min(start, end)
                if not first <= begin <= end:
                    first = begin
                    self._cut(text, 0)
                elif begin < end:
                    self._cut(text, begin)
                self._spans[text] = (first, begin + length)

    def _cut(self, text: int, position: int) -> None:
        for texts in self._pieces.values():
            kept = [piece for piece in texts.get(text, ()) if piece.start < position]
            texts[text] = [piece.until(position) if piece.end > position else piece for piece in kept]

    def add(self, name: str, tensor: Tensor, is_selected: bool) -> None:
        """Add a tensor of this pass. is_selected: it has the last token of each row only, and no dimension T."""
        rows = self._rows
        if name == LAST and rows.prompt_goes_on:
            return
        dimension = token_dimension(name)
        for i, (start, length, texts) in enumerate(zip(rows.starts, rows.lengths, rows.texts or ((0,),), strict=True)):
            own = tensor[i] if rows.is_batch else tensor
            if is_selected:
                piece = Piece(start + length - 1, own.unsqueeze(dimension), dimension)
            else:  # without padding
                piece = Piece(start, own, dimension, within_layer(name) in UNFUSED).until(start + length)
            for text in texts:
                self._pieces.setdefault(name, {}).setdefault(text, []).append(piece)

    def joined(self) -> dict[str, Tensor]:
        """Return the tensors by name, [T, …], or [texts, T, …] with padding on the right like that of later keys."""
        result = {}
        for name, texts in self._pieces.items():
            whole = [self._joined(name, texts[text]) for text in sorted(texts) if texts[text]]
            if whole:
                result[name] = _stacked(name, whole) if self._are_several else whole[0]
        return result

    def _joined(self, name: str, pieces: list[Piece]) -> Tensor:
        if len(pieces) > 1:
            dimension = pieces[0].dimension
            tensors = [piece.tensor for piece in pieces]
            if pieces[0].has_keys:
                n_keys = pieces[-1].tensor.shape[-1]
                tensors = [F.pad(tensor, (0, n_keys - tensor.shape[-1]), value=_masked(name)) for tensor in tensors]
            pieces[:] = [pieces[0]._replace(tensor=torch.cat(tensors, dimension))]
        return pieces[0].tensor


def _stacked(name: str, texts: list[Tensor]) -> Tensor:
    """Return the tensors of all texts as one, padded on the right to the largest size in each dimension."""
    largest = [max(sizes) for sizes in zip(*(text.shape for text in texts), strict=True)]
    result = texts[0].new_full((len(texts), *largest), _masked(name))
    for row, text in zip(result, texts, strict=True):
        row[tuple(map(slice, text.shape))] = text
    return result


def _masked(name: str) -> float:
    return -torch.inf if name.endswith(".attention.scores") else 0.0
