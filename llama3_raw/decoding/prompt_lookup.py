"""Prompt lookup: propose the next tokens from earlier text, so that one pass over the weights checks several.

Text that quotes, edits or continues earlier text often repeats what followed the same tokens there.
(Saxena 2023, Prompt Lookup Decoding: github.com/apoorvumang/prompt-lookup-decoding)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .drafts import ALONE_EVERY, MAX_DRAFT_TOKENS, best_count

LONGEST = 16  # tokens that a match may have; of several matches this long, the latest is used
_MAX_CANDIDATES = 16  # latest places to compare, so that a search takes microseconds in any text
_ASSUMED_COST = 0.1  # of a proposed token, relative to a pass without any: about that of 8B on a CPU


class EarlierText:
    """A growing text that finds earlier occurrences of its last tokens."""

    def __init__(self, ids: Sequence[int] = ()):
        self.ids: list[int] = []
        self._after: dict[tuple[int, int], list[int]] = {}  # pair of tokens -> the indices after it, ascending
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Append a token to the text."""
        if len(self.ids) >= 2:
            self._after.setdefault((self.ids[-2], self.ids[-1]), []).append(len(self.ids))
        self.ids.append(token)

    def longest_match(self) -> tuple[int, int]:
        """Return (length, place): the last `length` tokens, 2 to LONGEST, also occur right before ids[place].

        Among the latest occurrences of the last two tokens, it is the longest match, and the latest of equally long
        ones. Return (0, 0) if there is none.
        """
        ids, end = self.ids, len(self.ids)
        length = place = 0
        for after in reversed(self._after.get((ids[-2], ids[-1]), ())[-_MAX_CANDIDATES:] if end >= 2 else ()):
            same = 2
            while same < min(LONGEST, after) and ids[after - 1 - same] == ids[end - 1 - same]:
                same += 1
            if same > length:
                length, place = same, after
        return length, place


class LookupPolicy:
    """Decides how many tokens to propose: the number with the most expected tokens for the measured cost of a pass.

    most: the most tokens in a proposal, from 0 (off) to MAX_DRAFT_TOKENS. Two running averages are learned:

    - How often the token after a match is the right one, by the length of the match. Every token shows it, proposed or
      not, so proposals can stop at no cost and resume when matches become right again.
    - How much longer a pass takes per proposed token. While nothing is proposed, this returns slowly to the assumed
      cost, so that proposals are tried again.

    The policy changes the speed, never the tokens. It may serve several texts one after the other, and keeps what it
    learned. passes, proposed, accepted: counts of decode passes, and of proposed and accepted tokens. Raises UserError
    for `most` out of range.
    """

    def __init__(self, most: int):
        if not 0 <= most <= MAX_DRAFT_TOKENS:
            raise UserError(f"should be from 0 (off) to {MAX_DRAFT_TOKENS}, is {most}", argument="lookup")
        self.most = most
        self.passes = self.proposed = self.accepted = 0
        self._right = [length / (length + 3) for length in range(LONGEST + 1)]  # about what code and prose showed
        self._cost = _ASSUMED_COST
        self._seconds_alone = 0.0  # of a pass without proposals
        self._since_alone = ALONE_EVERY  # passes since the last one without proposals

    def how_many(self, match: int, limit: int) -> int:
        """Return how many tokens to propose, at most `limit`, after a match of this length; 0 if that is fastest."""
        if match == 0 or self._since_alone >= ALONE_EVERY:
            return 0
        # each right token makes the match longer
        chances = (self._right[min(match + i, LONGEST)] for i in range(min(self.most, limit)))
        return best_count(chances, self._cost)

    def learn_cost(self, proposed: int, seconds: float) -> None:
        """Record how long a pass with `proposed` draft tokens took."""
        self.passes += 1
        self.proposed += proposed
        self._cost += 0.001 * (_ASSUMED_COST - self._cost)
        if proposed == 0:
            # half: adapts fast, but one disturbed pass does not decide alone
            self._seconds_alone = (self._seconds_alone + seconds) / 2 if self._seconds_alone else seconds
            self._since_alone = 0
        else:
            self._since_alone += 1
            cost = (seconds / self._seconds_alone - 1) / proposed
            # a separate pass per token would cost 1; beyond 2, something else keeps the machine busy
            self._cost += 0.2 * (min(max(cost, 0.0), 2.0) - self._cost)

    def learn_match(self, match: int, right: bool) -> None:
        """Record whether the token after a match of this length was the right one."""
        self._right[match] += 0.1 * (right - self._right[match])


class PromptLookup:
    """A `Draft` from earlier text. Its policy decides how much it proposes, and learns from every token."""

    def __init__(self, policy: LookupPolicy, ids: Sequence[int]):
        self.policy = policy
        self._text = EarlierText(ids if policy.most else ())
        self._match, self._place = self._text.longest_match()

    @property
    def proposes(self) -> bool:
        """Whether it may ever propose a token."""
        return self.policy.most > 0

    def append(self, token: int) -> None:
        """Record the next token of the text."""
        if self.policy.most == 0:
            return
        if self._match:
            self.policy.learn_match(self._match, right=self._text.ids[self._place] == token)
        self._text.append(token)
        self._match, self._place = self._text.longest_match()

    def propose(self, limit: int) -> list[int]:
        """Return at most `limit` next tokens, or none if a pass without them is faster."""
        following = self._text.ids[self._place : self._place + self.policy.most]
        return following[: self.policy.how_many(self._match, min(limit, len(following)))]

    def accept(self) -> None:
        """Record that a proposed token was the right one."""
        self.policy.accepted += 1

    def observe(self, proposed: int, seconds: float) -> None:
        """Record how long a pass with `proposed` draft tokens took."""
        self.policy.learn_cost(proposed, seconds)
