"""Prompt lookup: the next tokens are proposed from earlier text, so that one pass over the weights checks several.

Text that quotes, edits or continues what is in front of it often says again what followed the same words before.
(Saxena 2023, Prompt Lookup Decoding: github.com/apoorvumang/prompt-lookup-decoding)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.cpu import FEW
from ..errors import UserError

MOST = FEW - 1  # tokens to propose: with the one before them as many as the CPU kernels compute with the same bits
LONGEST = 16  # tokens that are compared: of two places where so many are the same, the later one is taken
_PLACES = 16  # of a pair of tokens, the latest ones, which are looked at: a search takes microseconds in any text
_ASSUMED_COST = 0.1  # of a proposed token, in passes without any: about what it is in 8B on a CPU
_ALONE_EVERY = 16  # passes there is one without proposals, since the machine may have become slower or faster


class EarlierText:
    """A text that grows, and where in it its last tokens stood before."""

    def __init__(self, ids: Sequence[int] = ()):
        self.ids: list[int] = []
        self._behind: dict[tuple[int, int], list[int]] = {}  # two tokens in a row -> the places behind them, in order
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with this token."""
        if len(self.ids) >= 2:
            self._behind.setdefault((self.ids[-2], self.ids[-1]), []).append(len(self.ids))
        self.ids.append(token)

    def longest_match(self) -> tuple[int, int]:
        """-> (length, place): the last `length` tokens, from 2 to LONGEST, also stand right before ids[place].

        Of the latest places where the last two tokens stand it is the one with the longest match, and of those the
        latest; (0, 0) where there is none.
        """
        ids, end = self.ids, len(self.ids)
        length = place = 0
        for behind in reversed(self._behind.get((ids[-2], ids[-1]), ())[-_PLACES:] if end >= 2 else ()):
            same = 2
            while same < min(LONGEST, behind) and ids[behind - 1 - same] == ids[end - 1 - same]:
                same += 1
            if same > length:
                length, place = same, behind
        return length, place


class LookupPolicy:
    """How many tokens to propose, such that it pays: what a pass is expected to bring over what it is known to cost.

    most: tokens in a proposal, from 0 (never any) to MOST. Two things are learned, as running averages. How often the
    token behind a match is the one that comes, by the length of the match: that is seen at every token, proposed or
    not, so that to be off costs nothing and still shows when to be on again. And how much longer a pass takes for each
    proposed token; where none is proposed this goes slowly back to what was assumed at first, and so is tried again.

    All that can come of it is another speed, never another token. One policy may serve several texts in turn and keeps
    what it has learned. passes, proposed, accepted: how many passes so far, but for those over the prompt, and how many
    tokens. Raises UserError for `most` out of range.
    """

    def __init__(self, most: int):
        if not 0 <= most <= MOST:
            raise UserError(f"should be from 0 (off) to {MOST}, is {most}", argument="lookup")
        self.most = most
        self.passes = self.proposed = self.accepted = 0
        self._right = [length / (length + 3) for length in range(LONGEST + 1)]  # about what code and prose gave
        self._cost = _ASSUMED_COST
        self._seconds_alone = 0.0  # of a pass without proposals
        self._since_alone = _ALONE_EVERY  # passes

    def how_many(self, match: int, room: int) -> int:
        """How many tokens to propose, at most `room`, behind a match of this length: 0 where that is the fastest."""
        best, best_speed = 0, 1.0  # in tokens for the time of a pass without proposals
        if match == 0 or self._since_alone >= _ALONE_EVERY:
            return best
        expected = chance = 1.0  # tokens that the pass brings; that all proposed so far are right
        for count in range(1, min(self.most, room) + 1):
            chance *= self._right[min(match + count - 1, LONGEST)]  # with each one that is right the match grows
            expected += chance
            speed = expected / (1 + self._cost * count)
            if speed > best_speed:
                best, best_speed = count, speed
        return best

    def learn_cost(self, proposed: int, seconds: float) -> None:
        """A pass with so many proposed tokens took so long."""
        self.passes += 1
        self.proposed += proposed
        self._cost += 0.001 * (_ASSUMED_COST - self._cost)
        if proposed == 0:
            # half: old times are soon forgotten, and one that was disturbed is not all that counts
            self._seconds_alone = (self._seconds_alone + seconds) / 2 if self._seconds_alone else seconds
            self._since_alone = 0
        else:
            self._since_alone += 1
            cost = (seconds / self._seconds_alone - 1) / proposed
            # a pass for each token would be 1; what is beyond 2 is something else that keeps the machine busy
            self._cost += 0.2 * (min(max(cost, 0.0), 2.0) - self._cost)

    def learn_match(self, match: int, right: bool) -> None:
        """The token behind a match of this length was, or was not, the one that came."""
        self._right[match] += 0.1 * (right - self._right[match])


class PromptLookup:
    """A `Draft` from earlier text, as far as its policy says, which is told of each token that comes."""

    def __init__(self, policy: LookupPolicy, ids: Sequence[int]):
        self.policy = policy
        self._text = EarlierText(ids if policy.most else ())
        self._match, self._place = self._text.longest_match()

    @property
    def proposes(self) -> bool:
        """Whether it may ever propose a token."""
        return self.policy.most > 0

    def append(self, token: int) -> None:
        """The text continues with this token."""
        if self.policy.most == 0:
            return
        if self._match:
            self.policy.learn_match(self._match, right=self._text.ids[self._place] == token)
        self._text.append(token)
        self._match, self._place = self._text.longest_match()

    def propose(self, room: int) -> list[int]:
        """The next tokens, at most `room`, or none where that is faster."""
        following = self._text.ids[self._place : self._place + self.policy.most]
        return following[: self.policy.how_many(self._match, min(room, len(following)))]

    def accept(self) -> None:
        """A proposed token was the one that came."""
        self.policy.accepted += 1

    def observe(self, proposed: int, seconds: float) -> None:
        """A pass with so many proposed tokens took so long."""
        self.policy.learn_cost(proposed, seconds)
