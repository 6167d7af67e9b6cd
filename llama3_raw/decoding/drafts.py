"""Drafts: guesses of the next tokens of a text, several of which one pass over the weights can check."""

from __future__ import annotations

from typing import Protocol


class Draft(Protocol):
    """What the decoding loop asks of a draft. It can change how many passes a text takes, never its tokens."""

    @property
    def proposes(self) -> bool:
        """Whether it may ever propose a token."""

    def propose(self, room: int) -> list[int]:
        """The next tokens, at most `room` of them; none if a pass without any is faster."""

    def append(self, token: int) -> None:
        """The text continues with this token."""

    def accept(self) -> None:
        """A proposed token was the one that came."""

    def observe(self, proposed: int, seconds: float) -> None:
        """A pass over one token and `proposed` ones after it took so long."""


class NoDraft:
    """Proposes nothing."""

    proposes = False

    def propose(self, room: int) -> list[int]:
        return []

    def append(self, token: int) -> None: ...

    def accept(self) -> None: ...

    def observe(self, proposed: int, seconds: float) -> None: ...
