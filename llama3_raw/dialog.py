"""Meta's dialog format as plain functions, and `Conversation`, which keeps the KV cache over the turns of a dialog."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from .backends.choose import ops_for
from .backends.cuda_graphs import CapturedPasses
from .decoding.loop import StopReason, generate
from .decoding.prompt_lookup import LookupPolicy
from .decoding.sampling import Sampling
from .errors import UserError
from .model import KVCache
from .ops import Ops
from .tokenizer import Tokenizer
from .weights import Model

DEFAULT_CONTEXT = 8192  # tokens; 1 GB of cache in 8B, where the 131,072 of Llama 3.1 would take 17


class Message(NamedTuple):
    """What one side of a dialog says. role: system, user or assistant."""

    role: str
    content: str


def encode_header(tokenizer: Tokenizer, role: str) -> list[int]:
    """The tokens before what a role says."""
    start, end = (tokenizer.special_tokens[f"<|{side}_header_id|>"] for side in ("start", "end"))
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Header, content, <|eot_id|>. Names of special tokens in the content are plain text.

    The content goes without the space around it, as in Meta's llama3 repository (ChatFormat in llama/tokenizer.py) and
    in the template of the models on Hugging Face; the later llama-models leaves the space there.
    """
    header = encode_header(tokenizer, message.role)
    return [*header, *tokenizer.encode(message.content.strip()), tokenizer.eot_id]


def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A dialog -> the prompt to which the model gives the next answer: it ends with the assistant's header.

    (encode_dialog_prompt in ChatFormat. The template of Llama 3.1 on Hugging Face also makes up a system message with
    dates; Meta's code does not, nor does this.)
    """
    ids = [tokenizer.bos_id]
    for message in messages:
        ids += encode_message(tokenizer, message)
    return ids + encode_header(tokenizer, "assistant")


def is_base_model(model: Model) -> bool:
    """Whether the model has never been trained on this format: whether its tokens are embedded like unused ones.

    Rows of tokens that training never met stay where they began, or move all together where embeddings are tied (in
    Llama 3 8B they are next to zero: github.com/meta-llama/llama3/issues/77). Nothing else tells in Meta's files: those
    of a base and of an Instruct model differ in the weights alone, and a folder may have any name.
    """
    assert model.tokenizer is not None
    embeddings, special = model.weights.tok_embeddings, model.tokenizer.special_tokens
    unused = embeddings[-100:].float()  # [100, dim]: reserved in every Llama 3
    format_ids = [special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")]
    centre = unused.mean(dim=0)
    farthest_unused = (unused - centre).norm(dim=-1).max()
    distances = (embeddings[format_ids].float() - centre).norm(dim=-1)  # [3]
    return bool((distances <= 2 * farthest_unused).all())


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
    the repetition penalty sees the tokens that the turn computes. lookup, ops, captured: as for `generate`; proposals
    come from the whole dialog.

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
        captured: bool = True,
    ):
        if model.tokenizer is None:
            raise UserError("a conversation needs a tokenizer, and the model has none")
        longest = model.params.max_seq_len
        self.context = min(longest, DEFAULT_CONTEXT) if context is None else context
        if self.context > longest:
            raise UserError(f"--context {context}: the model's own context is {longest} tokens")
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
        try:
            self._cache = KVCache.allocate(model.params, max_seq_len=self.context, like=model.weights)
        except RuntimeError as error:  # torch's only word for memory that the CPU does not have
            raise UserError(f"a cache for {self.context} tokens does not fit into memory; lower --context") from error
        self._captured = CapturedPasses.where_possible(model, self._cache, self._ops) if captured else None
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


def read_dialog(file: Path) -> list[Message]:
    """[{"role": …, "content": …}, …] in JSON -> the messages: maybe one of the system, then user and assistant in turn.

    Raises UserError naming what is wrong.
    """
    try:
        if not file.is_file():  # it would wait for a pipe or a terminal
            raise UserError(f"{file}: {'is not a file' if file.exists() else 'there is no such file'}; check its name")
        content = json.loads(file.read_bytes())
        if not isinstance(content, list):
            raise TypeError(f"is a {type(content).__name__}")
        # encode: half a character ("\ud800") is valid JSON, but no text
        messages = [Message(entry["role"], entry["content"].encode().decode()) for entry in content]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{file}: not a dialog, [{{"role": "user", "content": "…"}}, …] in JSON ({error})') from error
    said = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(said):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            place = i + 1 + len(messages) - len(said)
            raise UserError(f"{file}: message {place} should have the role {expected!r}, has {message.role!r}")
    if len(said) % 2:
        raise UserError(f"{file}: the last question has no answer; add one, or take the question out")
    return messages


def write_dialog(file: Path, messages: Sequence[Message]) -> None:
    """Writes what `read_dialog` reads, or leaves what is there. Raises UserError where that is no dialog."""
    part = Path(f"{file}.{os.getpid()}.part")
    try:
        if file.exists():
            read_dialog(file)
        content = json.dumps([message._asdict() for message in messages], ensure_ascii=False, indent=1)
        with open(part, "x", encoding="utf-8") as opened:
            opened.write(content + "\n")
        part.replace(file)
    except UserError as error:
        raise UserError(f"{error}; not replaced, choose another name") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(
            f"{file}: cannot be written: {getattr(error, 'strerror', error)}; choose another name"
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            part.unlink(missing_ok=True)


def warn_of_base_model(model: Model) -> None:
    """Prints a line on stderr if the model, of which a chat is asked, is a base model."""
    if is_base_model(model):
        print(
            "llama3_raw: warning: a base model, it seems, not trained to answer; choose an Instruct model for a chat",
            file=sys.stderr,
        )
