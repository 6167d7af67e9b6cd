"""`Conversation`: a dialog that keeps its KV cache between turns."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from ..backends.choose import ops_for
from ..backends.cuda_graphs import CudaGraphs
from ..decoding.draft_model import DraftModel, DraftModelPolicy, common_length
from ..decoding.loop import StopReason, generate, tokens_to_stop_at
from ..decoding.prompt_lookup import LookupPolicy
from ..decoding.sampling import Sampling
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops
from ..weights import Model
from .dialog import (
    DialogFormat,
    Exchange,
    Llama3Format,
    Message,
    as_messages,
    encode_header,
    encode_message,
)
from .formats import format_of

DEFAULT_CONTEXT = 8192  # tokens; 1 GB of cache in 8B, where the 131,072 of Llama 3.1 would take 17 GB


@dataclass
class Turn:
    """What a turn computed, and why it ended."""

    new: list[int] = field(default_factory=list)  # the tokens of the answer
    times: list[float] = field(default_factory=list)  # when each was generated, by time.perf_counter
    computed: int = 0  # tokens that went through the model
    dropped: int = 0  # old exchanges that were dropped because the window was full
    reason: StopReason | None = None  # None: the caller stopped it


class Conversation:
    """A dialog with a model that keeps its KV cache between turns.

    system: the system message; "" is none. context: tokens in the window; None takes the model's context, at most
    8,192. max_new_tokens: the most tokens of an answer; None lets it fill the window. sampling, seed: as in `generate`;
    the repetition penalty covers the whole dialog. lookup, draft, ops: as in `generate`; proposals of lookup come from
    the whole dialog.
    dialog_format: None takes the model's own. stop_ids: None takes those of the model and of the format.

    `system` and `exchanges` may be changed between turns. In any case a turn computes only the tokens after the longest
    prefix that the dialog shares with the cache. `turn` describes the last turn.

    Raises UserError for a model without a tokenizer, and for a context that exceeds the model's or the memory.
    """

    def __init__(  # noqa: PLR0913  # what a caller may set
        self,
        model: Model,
        *,
        system: str = "",
        context: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(),
        seed: int | None = None,
        lookup: int = 0,
        draft: DraftModel | None = None,
        ops: Ops | None = None,
        dialog_format: DialogFormat | None = None,
        stop_ids: Collection[int] | None = None,
    ):
        if model.tokenizer is None:
            raise UserError("a conversation needs a tokenizer, and the model has none")
        longest = model.params.max_seq_len
        self.context = min(longest, DEFAULT_CONTEXT) if context is None else context
        if self.context > longest:
            raise UserError(f"{context}: the model's own context is {longest} tokens", argument="context")
        self.model = model
        self.tokenizer = model.tokenizer
        self.dialog_format = dialog_format or format_of(model.tokenizer)
        ends = frozenset(tokens_to_stop_at(model, None)) | self.dialog_format.stop_ids
        self._stop_ids = ends if stop_ids is None else stop_ids
        self.system = system
        self.exchanges: list[Exchange] = []
        self.turn = Turn()
        self.lookup = LookupPolicy(lookup)
        self.draft = draft
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._ops = ops_for(model.weights) if ops is None else ops
        self._seeds = random.Random(seed)  # one per call of generate, or every turn would have the same random numbers
        self._cache = KVCache.allocate(model.params, max_seq_len=self.context, like=model.weights)
        self._captured = CudaGraphs.where_possible(model, self._cache, self._ops)
        self._cached: list[int] = []  # the tokens in the cache

    @property
    def policy(self) -> LookupPolicy | DraftModelPolicy:
        """What counts the passes, and the proposed and accepted tokens, of all answers."""
        return self.draft.policy if self.draft else self.lookup

    @property
    def messages(self) -> list[Message]:
        """The dialog so far."""
        return as_messages(self.system, self.exchanges)

    def restore(self, messages: Sequence[Message]) -> None:
        """Replace the dialog by one that `read_dialog` returned."""
        has_system = bool(messages) and messages[0].role == "system"
        self.system = messages[0].content if has_system else ""
        turns = messages[has_system:]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        self.exchanges = [self._exchange(question.content, answer.content) for question, answer in pairs]

    def _exchange(self, question: str, answer: str, new: Sequence[int] | None = None) -> Exchange:
        """Return an exchange. new: the tokens of the answer as they were generated; None: those of its text."""
        if not isinstance(self.dialog_format, Llama3Format):
            return Exchange(question, answer, [])  # rendered as a whole
        tokenizer, asked = self.tokenizer, encode_message(self.tokenizer, Message("user", question))
        if new is None:
            return Exchange(question, answer, asked + encode_message(tokenizer, Message("assistant", answer)))
        end = tokenizer.special_tokens["<|eot_id|>"]
        return Exchange(question, answer, [*asked, *encode_header(tokenizer, "assistant"), *new, end])

    def length(self) -> int:
        """Return how many tokens of the window the dialog occupies."""
        return len(self.dialog_format.dialog(self.system, self.exchanges))

    def answer(self, question: str) -> Generator[str, None, None]:
        """Yield the text of the answer piece by piece.

        If the caller stops it (Ctrl-C, or close()), the text so far is the answer; without any, the question is taken
        back. When the window is full, the oldest exchanges are dropped, even during an answer. An answer that fills the
        window alone ends there. Raises UserError for a question that fills it.
        """
        turn = self.turn = Turn()
        text = ""
        try:
            for piece in self.tokenizer.stream(self._generate(question, turn)):
                text += piece
                yield piece
        finally:
            if turn.new or turn.reason:
                self.exchanges.append(self._exchange(question, text, turn.new))

    def _generate(self, question: str, turn: Turn) -> Iterator[int]:
        """Yield the tokens of the answer to a question."""
        while ids := self._fitting(question, turn):
            start = common_length(self._cached, ids[:-1])  # the last token is always computed, for its logits
            # _cached changes before and after a forward pass, never during one, so that it is right after any Ctrl-C
            del self._cached[start:]
            computing = ids[start:]
            budget = self.context - len(ids)
            if self._max_new_tokens is not None:
                budget = min(budget, self._max_new_tokens - len(turn.new))
            tokens = generate(
                self.model,
                computing,
                max_new_tokens=budget,
                **asdict(self._sampling),
                seed=self._seeds.getrandbits(63),
                stop_ids=self._stop_ids,
                cache=self._cache,
                start=start,
                lookup=self.lookup,
                draft=self.draft,
                earlier=ids[:start],
                ops=self._ops,
                captured=self._captured,
            )
            for token in tokens:
                self._cached += computing
                turn.computed += len(computing)
                computing = [token]
                turn.new.append(token)
                turn.times.append(time.perf_counter())
                budget -= 1
                yield token
            if budget:
                self._cached += computing
                turn.computed += len(computing)
                turn.reason = StopReason.END_TOKEN
                return
            if len(turn.new) == self._max_new_tokens:
                turn.reason = StopReason.MAX_NEW_TOKENS
                return
        if not turn.new:
            raise UserError(
                f"the question and the system message fill the window of {self.context} tokens; "
                "shorten them, or start again with a larger context"
            )
        turn.reason = StopReason.CONTEXT

    def _fitting(self, question: str, turn: Turn) -> list[int]:
        """Return the tokens of the dialog, the question and the answer so far, or [] if they never fit into the window.

        If the window has no space for another token, the oldest exchanges are dropped.
        """

        def ids_with(exchanges: Sequence[Exchange]) -> list[int]:
            return self.dialog_format.prompt(self.system, exchanges, question) + turn.new

        ids = ids_with(self.exchanges)
        if len(ids) >= self.context:
            if len(ids_with(())) >= self.context:
                return []
            # free a quarter of the window, because the remaining exchanges have to be computed again
            while self.exchanges and len(ids) > self.context * 3 // 4:
                del self.exchanges[0]
                turn.dropped += 1
                ids = ids_with(self.exchanges)
        return ids
