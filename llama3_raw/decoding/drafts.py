"""Drafts: proposals for the next tokens of a text. One pass over the weights checks several of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..backends.cpu import MAX_DECODE_ROWS

# with the token before them, the most rows that the CPU kernels compute with the same bits
MAX_DRAFT_TOKENS = MAX_DECODE_ROWS - 1
ALONE_EVERY = 16  # one pass in this many has no proposals, because the machine may have become slower or faster


class Draft(Protocol):
    """What the decoding loop needs from a draft, which changes how many passes a text takes, but never its tokens."""

    @property
    def proposes(self) -> bool:
        """Whether it may ever propose a token."""

    def propose(self, limit: int) -> list[int]:
        """Return at most `limit` next tokens, or none if a pass without them is faster."""

    def append(self, token: int) -> None:
        """Record the next token of the text."""

    def accept(self) -> None:
        """Record that a proposed token was the right one."""

    def observe(self, proposed: int, seconds: float) -> None:
        """Record how long it took to propose tokens and to compute them and the one before them in a pass."""


class NoDraft:
    """A draft that proposes nothing."""

    proposes = False

    def propose(self, limit: int) -> list[int]:
        return []

    def append(self, token: int) -> None: ...

    def accept(self) -> None: ...

    def observe(self, proposed: int, seconds: float) -> None: ...


def best_count(chances: Iterable[float], cost: float) -> int:
    """Return the number of proposed tokens with the most expected tokens per time; 0 if none is the fastest.

    chances: of each next token, to be right if those before it are. cost: what each adds to the time, relative to a
    pass without any.
    """
    best, best_speed = 0, 1.0  # tokens per time of a pass without proposals
    expected = chance = 1.0  # tokens from the pass; probability that all proposed so far are right
    for count, right in enumerate(chances, start=1):
        chance *= right
        expected += chance
        speed = expected / (1 + cost * count)
        if speed > best_speed:
            best, best_speed = count, speed
    return best
