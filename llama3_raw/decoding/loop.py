"""The decoding loop: a pass over the texts, then a token for each; and `generate`, which continues one text.

Ids in, ids out: it knows no text. How a pass is run is the runner's affair, what is guessed ahead the draft's.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends.choose import ops_for
from ..backends.cuda_graphs import CudaGraphs, copy_to_host_async
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops, Tap, no_tap
from ..weights import Model
from .drafts import Draft, NoDraft
from .prompt_lookup import LookupPolicy, PromptLookup
from .runner import Runner, SingleRunner
from .sampling import GREEDY, Sampling, check_sound, is_sound, sample

# new tokens: a pass of 32 layers took 24 s to compile, found on the disk, and 142 s when it was new (measured on the
# CPU, one thread, narrow layers); it may save 3 ms a token of 8B, of 1,500 small kernels 2 µs each (an estimate)
COMPILED_FROM = 4096


class StopReason(enum.Enum):
    """Why a text ended."""

    END_TOKEN = "the model ended the text"
    MAX_NEW_TOKENS = "max_new_tokens is reached"
    CONTEXT = "the context is full"


Event = tuple[int, int | StopReason]
"""(number of the text, its next token), or (number, why it ended)."""


@dataclass
class Text:
    """A text that is being continued."""

    number: int
    prompt: list[int]
    budget: int  # new tokens at most
    when_spent: StopReason  # why it ends then
    sampling: Sampling
    generator: torch.Generator
    start: int = 0  # tokens in the cache before the prompt
    draft: Draft = field(default_factory=NoDraft)
    is_over: Callable[[Sequence[int]], bool] = lambda new: False  # whether it ends after these new tokens
    new: list[int] = field(default_factory=list)
    ended: StopReason | None = None

    def __post_init__(self) -> None:
        # prompt and new tokens, on the device, so that the next one can be drawn before this one is known here
        self._seen = torch.zeros(len(self.prompt) + self.budget, dtype=torch.long, device=self.generator.device)
        self._seen[: len(self.prompt)] = torch.tensor(self.prompt)

    @property
    def position(self) -> int:
        """Of the last token, which the cache does not hold yet."""
        return self.start + len(self.prompt) + len(self.new) - 1

    def draw(self, logits: Tensor) -> Tensor:
        """Logits [vocab] -> the next token [], by the text's own settings, past and random numbers."""
        length = len(self.prompt) + len(self.new)
        token = sample(logits, self.sampling, self._seen[:length], self.generator)
        self._seen[length] = token
        return token

    def append(self, token: int, stop_ids: Collection[int]) -> Iterator[Event]:
        """Continue it with a token; yield that, unless it is one to stop at, and why the text ends, if it does."""
        if token not in stop_ids:
            self.new.append(token)
            yield self.number, token
        if token in stop_ids or self.is_over(self.new):
            self.ended = StopReason.END_TOKEN
        elif len(self.new) == self.budget:
            self.ended = self.when_spent
        if self.ended is not None:
            yield self.number, self.ended
        else:
            self.draft.append(token)


@torch.no_grad()
def decode(texts: Sequence[Text], runner: Runner, stop_ids: Collection[int]) -> Iterator[Event]:
    """Continue texts together until all have ended. Each has a budget of one token at least.

    A pass gives every text its next token. For a lone text it also checks what the draft proposes: each row of its
    logits gives one token more, as long as the token that comes is the one that was proposed.
    """
    running = list(texts)
    logits = runner.prefill([text.prompt for text in running])  # [texts, 1, vocab]
    proposed: list[int] = []
    begun: float | None = None  # when the pass began; None for that over the prompt, which tells nothing of the next
    while True:
        for row, expected in zip(logits.unbind(1), [*proposed, None], strict=True):  # [texts, vocab]
            tokens, ahead = _next_tokens(row, running, runner)
            if begun is not None:
                running[0].draft.observe(len(proposed), time.perf_counter() - begun)
                begun = None
            for text, token in zip(running, tokens, strict=True):
                yield from text.append(token, stop_ids)
            if tokens[0] != expected or running[0].ended:
                break
            running[0].draft.accept()
        _remove_ended(running, runner)
        if not running:
            return
        if len(running) == 1:
            proposed = running[0].draft.propose(running[0].budget - len(running[0].new) - 1)
        begun = time.perf_counter()
        if ahead is None:
            last = torch.tensor([[text.new[-1], *proposed] for text in running], device=runner.device)
            ahead = runner.step(last, [text.position for text in running])
        logits = ahead  # [texts, 1 + proposed, vocab]


def _next_tokens(logits: Tensor, texts: Sequence[Text], runner: Runner) -> tuple[list[int], Tensor | None]:
    """Logits [texts, vocab] -> the next token of each, and the logits of the pass after it if that has begun already.

    It has where the runner can begin it without knowing the token here, so that a GPU never waits.
    """
    tokens = _draw(logits, texts)  # [texts]
    result = torch.stack((tokens, is_sound(logits)))
    first, ahead = texts[0], None
    if runner.runs_ahead and not first.draft.proposes and len(first.new) + 1 < first.budget:
        arriving = copy_to_host_async(result)
        ahead = runner.step(tokens.unsqueeze(-1), [text.position + 1 for text in texts])
        known, are_sound = arriving()
    else:
        known, are_sound = result.tolist()
    check_sound(all(are_sound))
    return known, ahead


def _draw(logits: Tensor, texts: Sequence[Text]) -> Tensor:
    """Logits [texts, vocab] -> the next token of each, [texts]."""
    if all(text.sampling == GREEDY for text in texts):
        return logits.argmax(dim=-1)
    return torch.stack([text.draw(row) for text, row in zip(texts, logits, strict=True)])


def _remove_ended(running: list[Text], runner: Runner) -> None:
    """The last text takes the place of one that has ended, so that those running are the first in the cache."""
    for place in reversed(range(len(running))):
        if running[place].ended is None:
            continue
        last = running.pop()
        if place < len(running):
            runner.move(len(running), place, last.position)
            running[place] = last


def generate(  # noqa: PLR0913  # what a caller may set
    model: Model,
    ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] | None = None,
    context: int | None = None,
    cache: KVCache | None = None,
    start: int = 0,
    lookup: int | LookupPolicy = 0,
    earlier: Sequence[int] = (),
    ops: Ops | None = None,
    tap: Tap | None = None,
    captured: CudaGraphs | bool | None = True,
) -> Generator[int, None, StopReason]:
    """Yield the tokens that follow the prompt `ids`, one int at a time; return why it stopped.

    Temperature 0 takes the most likely token; for the other sampling settings see `Sampling`. seed: the same seed on
    the same machine draws the same tokens; None draws anew.
    stop_ids: the tokens at which it ends (not yielded); None takes the tokenizer's, () never ends there.
    context: the most tokens, prompt included; None takes the model's max_seq_len, and more than that is your own risk.
    cache, start: a cache that already holds `start` tokens, to continue from there; it is written in place, and
        afterwards holds all tokens but the last one yielded. None makes one that is just large enough. The repetition
        penalty sees the tokens of `ids` and new ones, not those that only the cache holds.
    lookup: the most tokens, 0 to 15, that are proposed from the text so far and checked in one pass, where that is
        faster; a policy in place of the number keeps what it learns for the next call, and its counts can be read. The
        tokens are the same as without, drawn ones too, where a token's logits have the same bits alone and among
        others: with the fast operations of the CPU in bf16. Elsewhere they differ by rounding, so that of two tokens
        about equally likely the other one may come. What was proposed in vain is left in the cache after its tokens.
    earlier: text that stands before `ids`, such as what the cache holds; only to propose from.
    ops: None takes the set that suits the weights. tap: as in `forward`; with lookup it sees a row for each proposed
        token as well, and those after the first wrong one are not used.
    captured: whether a model on a GPU has its passes over few tokens captured in a graph, where that is possible: with
        the fast operations and no tap. The pass over one token is compiled before only where 4,096 new ones may come,
        since that takes as long as thousands of them. The `CudaGraphs` of a cache keep both for the next call, and
        compile for any number.

    Raises UserError for an empty prompt, ids outside the vocabulary, a prompt longer than the context, a cache that the
    memory does not hold, and settings out of range; at the call, not at the first token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    policy = lookup if isinstance(lookup, LookupPolicy) else LookupPolicy(lookup)
    limit = model.params.max_seq_len if context is None else context
    if cache is not None:
        limit = min(limit, cache.max_seq_len)
    if start < 0 or (start > 0 and cache is None):
        raise UserError(f"should be how many tokens the given cache holds, is {start}", argument="start")
    if max_new_tokens < 0:
        raise UserError(f"should be 0 or more, is {max_new_tokens}", argument="max_new_tokens")
    prompt = _checked_prompt(model, ids, earlier, start, limit)
    budget = min(max_new_tokens, limit - start - len(prompt))
    if cache is None:
        cache = KVCache.allocate(model.params, max_seq_len=start + len(prompt) + budget, like=model.weights)
    ops = ops or ops_for(model.weights)
    graphs = captured or None
    if isinstance(graphs, CudaGraphs) and graphs.cache is not cache:
        raise ValueError("the captured passes are those of another cache")
    if tap is not None:  # which a graph would not call
        graphs = None
    elif graphs is True:
        graphs = CudaGraphs.where_possible(model, cache, ops, compiled=budget >= COMPILED_FROM)
    text = Text(
        0,
        prompt=prompt,
        budget=budget,
        when_spent=StopReason.MAX_NEW_TOKENS if budget == max_new_tokens else StopReason.CONTEXT,
        sampling=sampling,
        generator=seeded_generator(model, seed),
        start=start,
        draft=PromptLookup(policy, [*earlier, *prompt]),
    )
    runner = SingleRunner(model, cache, start, ops, no_tap if tap is None else tap, graphs)
    return _tokens_of(text, runner, tokens_to_stop_at(model, stop_ids))


def _tokens_of(text: Text, runner: Runner, stop_ids: Collection[int]) -> Generator[int, None, StopReason]:
    """The tokens of a lone text -> why it ended."""
    for _, event in decode([text], runner, stop_ids) if text.budget else ():
        if isinstance(event, StopReason):
            return event
        yield event
    return text.when_spent


def _checked_prompt(
    model: Model, ids: Sequence[int] | Tensor, earlier: Sequence[int], start: int, limit: int
) -> list[int]:
    """The prompt as a list. Raises UserError if it cannot be continued within `limit` tokens."""
    prompt = [int(token) for token in ids]
    if limit < 1:
        raise UserError(f"should be 1 or more, is {limit}", argument="context")
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    model.params.check_ids((*earlier, *prompt))
    if start + len(prompt) > limit:
        needed = start + len(prompt)
        raise UserError(f"the prompt needs {needed} positions, but the context holds {limit}; shorten the prompt")
    return prompt


def seeded_generator(model: Model, seed: int | None) -> torch.Generator:
    """Random numbers on the device where logits are; None seeds them anew."""
    generator = torch.Generator(model.weights.norm.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def tokens_to_stop_at(model: Model, stop_ids: Collection[int] | None) -> Collection[int]:
    """The tokens given, or for None those of the model's tokenizer."""
    if stop_ids is not None:
        return stop_ids
    return model.tokenizer.stop_ids if model.tokenizer else ()
