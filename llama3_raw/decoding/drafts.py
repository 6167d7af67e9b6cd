"""Drafts: proposals for the next tokens of a text. One pass over the weights checks several of them."""

from __future__ import annotations

from typing import Protocol


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
        """Record how long a pass over one token and `proposed` draft tokens took."""


class NoDraft:
    """A draft that proposes nothing."""

    proposes = False

    def propose(self, limit: int) -> list[int]:
        return []

    def append(self, token: int) -> None: ...

    def accept(self) -> None: ...

    def observe(self, proposed: int, seconds: float) -> None: ...
