"""`Conversation`: a dialog whose KV cache is kept over its turns."""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from ..backends.choose import ops_for
from ..backends.cuda_graphs import CudaGraphs
from ..decoding.loop import StopReason, generate
from ..decoding.prompt_lookup import LookupPolicy
from ..decoding.sampling import Sampling
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops
from ..weights import Model
from .dialog import Message, encode_header, encode_message

DEFAULT_CONTEXT = 8192  # tokens; 1 GB of cache in 8B, where the 131,072 of Llama 3.1 would take 17


class Exchange(NamedTuple):
    """A question and its answer, and the tokens of both messages; those of the answer as they were generated."""

    question: str
    answer: str
    ids: list[int]


@dataclass
class Turn:
    """What a turn took, and how it ended."""

    new: list[int] = field(default_factory=list)  # the tokens of the answer
    times: list[float] = field(default_factory=list)  # when each of them came, by time.perf_counter
    computed: int = 0  # tokens that went through the model
    dropped: int = 0  # old exchanges that were dropped, since the window was full
    reason: StopReason | None = None  # None: someone else stopped it


class Conversation:
    """A dialog with a model, whose KV cache is kept over turns.

    system: the system message; "" is none. context: how many tokens the window holds; None takes what the model does,
    but at most 8,192. max_new_tokens: of an answer; None lets it fill the window. sampling, seed: how tokens are drawn;
    the repetition penalty sees the tokens that the turn computes. lookup, ops: as for `generate`; proposals come from
    the whole dialog.

    `system` and `exchanges` may be changed between turns. Whatever has changed, a turn computes only the tokens behind
    the longest beginning that the dialog has in common with what the cache holds. `turn` tells of the last turn.

    Raises UserError for a model without a tokenizer, and a context that the model or the memory does not hold.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str = "",
        context: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        lookup: int = 0,
        ops: Ops | None = None,
    ):
        if model.tokenizer is None:
            raise UserError("a conversation needs a tokenizer, and the model has none")
        longest = model.params.max_seq_len
        self.context = min(longest, DEFAULT_CONTEXT) if context is None else context
        if self.context > longest:
            raise UserError(f"{context}: the model's own context is {longest} tokens", argument="context")
        self.model = model
        self.tokenizer = model.tokenizer
        self.system = system
        self.exchanges: list[Exchange] = []
        self.turn = Turn()
        self.lookup = LookupPolicy(lookup)
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._ops = ops_for(model.weights) if ops is None else ops
        self._seeds = random.Random(seed)  # one for each call of generate, or every turn would draw alike
        self._cache = KVCache.allocate(model.params, max_seq_len=self.context, like=model.weights)
        self._captured = CudaGraphs.where_possible(model, self._cache, self._ops)
        self._held: list[int] = []  # the tokens whose keys and values the cache holds

    @property
    def messages(self) -> list[Message]:
        """The dialog so far."""
        said = [Message("system", self.system)] if self.system else []
        for exchange in self.exchanges:
            said += [Message("user", exchange.question), Message("assistant", exchange.answer)]
        return said

    def restore(self, messages: Sequence[Message]) -> None:
        """Goes on from a dialog as `read_dialog` gives it, in place of this one."""
        has_system = bool(messages) and messages[0].role == "system"
        self.system = messages[0].content if has_system else ""
        said = messages[has_system:]
        self.exchanges = [
            Exchange(
                question.content,
                answer.content,
                encode_message(self.tokenizer, question) + encode_message(self.tokenizer, answer),
            )
            for question, answer in zip(said[::2], said[1::2], strict=True)
        ]

    def length(self) -> int:
        """How many tokens of the window the dialog takes so far."""
        return len(self._opening()) + sum(len(exchange.ids) for exchange in self.exchanges)

    def answer(self, question: str) -> Generator[str, None, None]:
        """Yields the answer's text piece by piece.

        Where it is stopped from outside (Ctrl-C, or close()), what has come so far is the answer; a question without
        any is taken back. When the window is full the oldest exchanges are dropped, also in mid-answer; one that
        fills the window all by itself ends. Raises UserError for a question that fills it.
        """
        question_ids = encode_message(self.tokenizer, Message("user", question))
        asked = question_ids + encode_header(self.tokenizer, "assistant")
        turn = self.turn = Turn()
        text = ""
        try:
            for piece in self.tokenizer.stream(self._generate(asked, turn)):
                text += piece
                yield piece
        finally:
            if turn.new or turn.reason:
                self.exchanges.append(Exchange(question, text, [*asked, *turn.new, self.tokenizer.eot_id]))

    def _generate(self, asked: list[int], turn: Turn) -> Iterator[int]:
        """The tokens of the answer to the tokens `asked`."""
        while self._make_room(len(asked) + len(turn.new), turn):
            wanted = self._opening()
            for exchange in self.exchanges:
                wanted += exchange.ids
            wanted += asked + turn.new
            start = _common_length(self._held, wanted[:-1])  # the last one is always computed, for its logits
            # What the cache holds is written down before and after each forward pass, never during one, so that it is
            # right wherever Ctrl-C strikes.
            del self._held[start:]
            computing = wanted[start:]
            budget = self.context - len(wanted)
            if self._max_new_tokens is not None:
                budget = min(budget, self._max_new_tokens - len(turn.new))
            tokens = generate(
                self.model,
                computing,
                max_new_tokens=budget,
                **asdict(self._sampling),
                seed=self._seeds.getrandbits(63),
                cache=self._cache,
                start=start,
                lookup=self.lookup,
                earlier=wanted[:start],
                ops=self._ops,
                captured=self._captured,
            )
            for token in tokens:
                self._held += computing
                turn.computed += len(computing)
                computing = [token]
                turn.new.append(token)
                turn.times.append(time.perf_counter())
                budget -= 1
                yield token
            if budget:
                self._held += computing
                turn.computed += len(computing)
                turn.reason = StopReason.END_TOKEN
                return
            if len(turn.new) == self._max_new_tokens:
                turn.reason = StopReason.MAX_NEW_TOKENS
                return
        if not turn.new:
            raise UserError(
                f"the question and the system message fill the window of {self.context} tokens; "
                "shorten them, or start again with a larger --context"
            )
        turn.reason = StopReason.CONTEXT

    def _opening(self) -> list[int]:
        """The tokens before the first exchange."""
        system = encode_message(self.tokenizer, Message("system", self.system)) if self.system else []
        return [self.tokenizer.bos_id, *system]

    def _make_room(self, rest: int, turn: Turn) -> bool:
        """Drops the oldest exchanges if the window is full with `rest` tokens behind them; -> whether there is room."""
        length = self.length() + rest
        if length - sum(len(exchange.ids) for exchange in self.exchanges) >= self.context:
            return False
        if length >= self.context:
            # a quarter becomes free, since each time the rest has to be computed anew
            while self.exchanges and length > self.context * 3 // 4:
                length -= len(self.exchanges.pop(0).ids)
                turn.dropped += 1
        return True


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
