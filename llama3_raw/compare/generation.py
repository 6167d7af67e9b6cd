"""Where two greedy texts part, and the first tensor at which the pass of that token diverges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..decoding.loop import generate
from ..model import REFERENCE
from ..ops import Ops
from ..tracing.record import Trace, trace
from ..weights import Model
from .comparison import Comparison, compare

Continued = tuple[int, Mapping[str, Tensor]]
"""The next token of a greedy text, and the tensors of the pass that it comes from."""


class TextComparison(NamedTuple):
    """Two greedy texts after the same prompt, and the tensors of one pass."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    step: int  # of the tokens, the first that differs, or the last one
    tensors: Comparison  # of the pass for that token

    @property
    def differ(self) -> bool:
        """Whether the texts differ."""
        return self.ours[: len(self.theirs)] != self.theirs

    @property
    def agree(self) -> bool:
        """Whether the texts are equal, or part where rounding decides, and the tensors of the pass agree."""
        return self.tensors.agree

    def verdict(self, other: str = "the other run") -> str:
        """Return a few lines that say where the texts part, and why; `other` is the name of the other run."""
        if self.differ:
            where = (
                f"The texts differ first at new token {self.step}: {self.ours[self.step]} here, "
                f"{self.theirs[self.step]} there."
            )
        else:
            where = f"The texts are equal: {len(self.ours)} new tokens. Compared is the pass of the last one."
        return f"{where}\n{self.tensors.verdict(other)}"

    def to_json(self) -> dict[str, Any]:
        """Return the figures to print as JSON."""
        new = {"text_differs_at": self.step if self.differ else None, "ours": self.ours, "theirs": self.theirs}
        return {**self.tensors.to_json(), "agree": self.agree, **new}


def continued(model: Model, ids: Sequence[int], n: int, ops: Ops) -> Iterator[Continued]:
    """Yield the next n tokens of a greedy text by these operations, with a cache, and the tensors of each pass."""
    seen = Trace(device="cpu")
    for i, token in enumerate(generate(model, ids, max_new_tokens=n, ops=ops, tap=seen)):
        # a long prompt is computed in several passes, and only its last position has logits
        yield token, seen if i else trace(model, ids, ops=ops, device="cpu")


def greedy(model: Model, ids: Sequence[int], n: int, ops: Ops = REFERENCE) -> list[int]:
    """Return the next n tokens of a greedy text, or those before its end."""
    return list(generate(model, ids, max_new_tokens=n, ops=ops))


def first_difference(ours: Sequence[int], others: Iterable[Continued]) -> tuple[list[int], Mapping[str, Tensor]]:
    """Return the other run's tokens, up to the first that differs from ours, and the tensors of that token's pass."""
    theirs: list[int] = []
    tensors: Mapping[str, Tensor] = {}
    for expected, (token, of_pass) in zip(ours, others, strict=False):
        theirs.append(token)
        tensors = of_pass
        if token != expected:
            break
    return theirs, {name: tensor.clone() for name, tensor in tensors.items()}


def compare_texts(
    model: Model,
    ids: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    tensors: Mapping[str, Tensor],
    **settings: Any,
) -> TextComparison:
    """Compare the pass of the last of `theirs`, which has these tensors, with a pass over the text up to it.

    ours, theirs: tokens after the prompt `ids`, as `greedy` and `first_difference` return them. settings: those of
    `compare`. The other run's tensors are of one position, as it has a cache; ours are computed without one, so a wrong
    cache shows at attention.scores.
    """
    step = len(theirs) - 1
    found = compare(model, [*ids, *theirs[:step]], tensors, **settings)
    return TextComparison(tuple(ours), tuple(theirs), step, found)
