"""The decoding loop: one forward pass, one token for each text, repeat; and `generate`, which continues one text.

It works on token ids only. The runner decides how a pass is run, the draft which tokens are proposed.
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
from ..ops import Ops, Tap, announce, no_tap
from ..weights import Model
from .draft_model import DraftModel
from .drafts import Draft, NoDraft
from .prompt_lookup import LookupPolicy, PromptLookup
from .runner import Runner, SingleRunner
from .sampling import GREEDY, NOT_NUMBERS, Sampling, check_sound, is_sound, sample

# new tokens from which torch.compile pays: a pass of 32 layers took 24 s to compile with a warm disk cache, and 142 s
# without (measured on the CPU, one thread, narrow layers); it may save 3 ms per token of 8B: 1,500 small kernels, 2 µs
# each (an estimate)
COMPILED_FROM = 4096


class StopReason(enum.Enum):
    """Why a text ended."""

    END_TOKEN = "the model ended the text"
    MAX_NEW_TOKENS = "max_new_tokens is reached"
    CONTEXT = "the context is full"
    NOT_NUMBERS = NOT_NUMBERS  # `generate` raises UserError instead


Event = tuple[int, int | StopReason]
"""(number of the text, its next token), or (number of the text, why it ended)."""

OnLogits = Callable[[Tensor, int], None]
"""on_logits(logits [vocab], token): called with each next token, a stop token too, and the logits that it came from."""


@dataclass
class Text:
    """A text being continued."""

    number: int
    prompt: list[int]
    budget: int  # the most new tokens
    when_spent: StopReason  # why the text ends when the budget is spent
    sampling: Sampling
    generator: torch.Generator
    stop_ids: Collection[int]  # tokens that end the text and are no part of it
    start: int = 0  # tokens in the cache before the prompt
    earlier: Sequence[int] = ()  # the text before the prompt
    draft: Draft = field(default_factory=NoDraft)
    is_over: Callable[[Sequence[int]], bool] = lambda new: False  # whether the text ends after these new tokens
    tap: Tap = no_tap  # sees the passes over the prompt
    on_logits: OnLogits | None = None
    new: list[int] = field(default_factory=list)
    ended: StopReason | None = None

    def __post_init__(self) -> None:
        # the whole text, on the device: the next token can be sampled before the CPU knows this one
        known = torch.tensor([*self.earlier, *self.prompt])
        self._seen = torch.zeros(len(known) + self.budget, dtype=torch.long, device=self.generator.device)
        self._seen[: len(known)] = known

    @property
    def position(self) -> int:
        """The position of the last token, which is not in the cache yet."""
        return self.start + len(self.prompt) + len(self.new) - 1

    def sample_next(self, logits: Tensor) -> Tensor:
        """Logits [vocab] -> the next token [], sampled with the text's settings, history and generator."""
        length = len(self.earlier) + len(self.prompt) + len(self.new)
        token = sample(logits, self.sampling, self._seen[:length], self.generator)
        self._seen[length] = token
        return token

    def append(self, token: int) -> Iterator[Event]:
        """Append a token. Yield it, unless it is a stop token, and then the reason if the text ends."""
        if token not in self.stop_ids:
            self.new.append(token)
            yield self.number, token
        if token in self.stop_ids or self.is_over(self.new):
            self.ended = StopReason.END_TOKEN
        elif len(self.new) == self.budget:
            self.ended = self.when_spent
        if self.ended is not None:
            yield self.number, self.ended
        else:
            self.draft.append(token)

    def end_without_token(self) -> Event:
        """End the text because its logits are not numbers, and return that event."""
        self.ended = StopReason.NOT_NUMBERS
        return self.number, self.ended


Arrivals = Callable[[int], Sequence[Text]]
"""arrivals(number of running texts) -> the texts that join them now; called between passes. It may wait."""


@torch.no_grad()
def decode(texts: Sequence[Text], runner: Runner, arrivals: Arrivals = lambda running: ()) -> Iterator[Event]:
    """Continue texts together until all have ended and no more arrive. Each has a budget of at least one token.

    A text whose logits are not numbers ends alone.

    A pass gives every text its next token. For a single text it also checks the draft: each row of logits gives one
    more token, as long as that token is the proposed one. A text that arrives gets its prompt computed and the next row
    of the cache, and from then on it is one of them.
    """
    running: list[Text] = []
    joining = list(texts or arrivals(0))
    proposed: list[int] = []
    ahead: Tensor | None = None  # logits of the next pass, if it was started already
    while running or joining:
        started = None if joining else time.perf_counter()  # prefill does not predict the time of decode
        if len(running) == 1 and not joining:
            proposed = running[0].draft.propose(running[0].budget - len(running[0].new) - 1)
        passes = [_step(running, proposed, runner) if ahead is None else ahead] if running else []
        if joining:
            prompts, taps = [text.prompt for text in joining], [text.tap for text in joining]
            passes.append(runner.prefill(prompts, len(running), taps))
            running += joining
        logits = torch.cat(passes) if len(passes) > 1 else passes[0]  # [texts, 1 + proposed, vocab]
        for row, expected in zip(logits.unbind(1), [*proposed, None], strict=True):  # [texts, vocab]
            tokens, are_sound, ahead = _next_tokens(row, running, runner)
            if started is not None:
                running[0].draft.observe(len(proposed), time.perf_counter() - started)
                started = None
            for text, token, sound, seen in zip(running, tokens, are_sound, row, strict=True):
                if sound and text.on_logits:
                    text.on_logits(seen, token)
                yield from text.append(token) if sound else [text.end_without_token()]
            if tokens[0] != expected or running[0].ended:
                break
            running[0].draft.accept()
        proposed = []
        _remove_ended(running, runner)
        joining = list(arrivals(len(running)))


def _step(texts: Sequence[Text], proposed: Sequence[int], runner: Runner) -> Tensor:
    """Compute the last token of each text, and the proposed ones after that of a single text."""
    last = torch.tensor([[text.new[-1], *proposed] for text in texts], device=runner.device)
    return runner.step(last, [text.position for text in texts])


def _next_tokens(logits: Tensor, texts: Sequence[Text], runner: Runner) -> tuple[list[int], list[int], Tensor | None]:
    """Logits [texts, vocab] -> the next token of each text, whether its logits are sound (1 or 0), and those after it.

    The logits after it are None, unless the next pass has started already: a runner that runs ahead starts it before
    the CPU knows the tokens, so that a GPU never waits.
    """
    tokens = _sample_next(logits, texts)  # [texts]
    result = torch.stack((tokens, is_sound(logits)))
    first, ahead = texts[0], None
    if runner.runs_ahead and not first.draft.proposes and len(first.new) + 1 < first.budget:
        arriving = copy_to_host_async(result)
        ahead = runner.step(tokens.unsqueeze(-1), [text.position + 1 for text in texts])
        known, are_sound = arriving()
    else:
        known, are_sound = result.tolist()
    return known, are_sound, ahead


def _sample_next(logits: Tensor, texts: Sequence[Text]) -> Tensor:
    """Logits [texts, vocab] -> the next token of each text, [texts]."""
    if all(text.sampling == GREEDY for text in texts):
        return logits.argmax(dim=-1)
    return torch.stack([text.sample_next(row) for text, row in zip(texts, logits, strict=True)])


def _remove_ended(running: list[Text], runner: Runner) -> None:
    """Replace each ended text by the last one, so that the running texts stay the first rows of the cache."""
    for place in reversed(range(len(running))):
        if running[place].ended is None:
            continue
        if running[place].ended is StopReason.NOT_NUMBERS:
            runner.clear(place)
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
    draft: DraftModel | None = None,
    earlier: Sequence[int] = (),
    ops: Ops | None = None,
    tap: Tap | None = None,
    captured: CudaGraphs | bool | None = True,
) -> Generator[int, None, StopReason]:
    """Yield the tokens that follow the prompt `ids`, one int at a time, and return the reason why it stopped.

    Args:
        model: what `load` returned.
        ids: the prompt, [T].
        max_new_tokens: stop after this many tokens.
        temperature: 0 takes the most likely token. For this and the other sampling settings see `Sampling`.
        seed: the same seed on the same machine samples the same tokens; None takes a new seed each time.
        stop_ids: tokens that end the text and are not yielded. None: the model's, or else the tokenizer's; (): none.
        context: the most tokens, prompt included. None: the model's max_seq_len; a larger context is at your own risk.
        cache: holds `start` tokens, to continue after them. It is written in place, and afterwards holds all tokens
            but the last one yielded. None allocates one that is just large enough.
        start: how many tokens `cache` holds.
        lookup: propose at most this many tokens, 0 to 15, from the text so far, and check them in one pass, if faster.
            A `LookupPolicy` instead of a number keeps what it learned for the next call, and its counters can be read.
            The tokens, greedy or sampled, are the same as without lookup if a token's logits have the same bits alone
            and among others: with the CPU's fast operations in bf16. Elsewhere rounding differs, and may decide
            between two tokens that are about equally likely. Rejected tokens are left in the cache after the accepted
            ones.
        draft: a model that proposes tokens, instead of lookup; what is said of its tokens holds here too. Its policy
            limits what it costs if it does not pay. It keeps what it learned for the next call.
        earlier: the text before `ids`, such as what the cache holds. The repetition penalty covers it as well as `ids`
            and the new tokens, and lookup proposes from it.
        ops: None chooses the set for the weights, with exact attention if the tap may want scores or probs.
        tap: as in `forward`. With lookup or a draft it also sees a row for each proposed token, and the rows after the
            first wrong one are not used. It does not see the passes of the draft.
        captured: on a GPU, replay passes over few tokens from a CUDA graph, which needs the fast operations and no
            tap. The pass over one token is also compiled first, but only if there may be 4,096 new tokens, because
            compiling takes as long as thousands of them. Pass the `CudaGraphs` of a cache to keep them for the next
            call; they compile only if they were created to.

    Raises:
        UserError: at the call, not at the first token, for an empty prompt, ids outside the vocabulary, a prompt
            longer than the context, a cache that does not fit into memory, and settings out of range. At a token, if
            the logits are not numbers.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    policy = lookup if isinstance(lookup, LookupPolicy) else LookupPolicy(lookup)
    if policy.most and draft is not None:
        raise UserError("and draft both propose tokens; leave one of them out", argument="lookup")
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
    tap = no_tap if tap is None else tap
    ops = ops or ops_for(model.weights, tap=tap)
    graphs = captured or None
    if isinstance(graphs, CudaGraphs) and graphs.cache is not cache:
        raise ValueError("the captured passes are those of another cache")
    if tap is not no_tap:  # a graph would not call it
        graphs = None
    elif graphs is True:
        graphs = CudaGraphs.where_possible(model, cache, ops, compiled=budget >= COMPILED_FROM)
    generator = seeded_generator(model, seed)
    known = [*earlier, *prompt]
    text = Text(
        0,
        prompt=prompt,
        budget=budget,
        when_spent=StopReason.MAX_NEW_TOKENS if budget == max_new_tokens else StopReason.CONTEXT,
        sampling=sampling,
        generator=generator,
        stop_ids=tokens_to_stop_at(model, stop_ids),
        start=start,
        earlier=earlier,
        draft=PromptLookup(policy, known)
        if draft is None
        else draft.of_text(known, start + len(prompt) - 1, cache, sampling, generator),
    )
    if start == 0:
        announce(tap, None)
    return _tokens_of(text, SingleRunner(model, cache, start, ops, tap, graphs))


def _tokens_of(text: Text, runner: SingleRunner) -> Generator[int, None, StopReason]:
    """Yield the tokens of a single text, and return the reason why it ended."""
    try:
        for _, event in decode([text], runner) if text.budget else ():
            if isinstance(event, StopReason):
                check_sound(event is not StopReason.NOT_NUMBERS)
                return event
            yield event
        return text.when_spent
    finally:
        runner.end(text.position + 1)


def _checked_prompt(
    model: Model, ids: Sequence[int] | Tensor, earlier: Sequence[int], start: int, limit: int
) -> list[int]:
    """Return the prompt as a list. Raises UserError if it cannot be continued within `limit` tokens."""
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
    """Return a generator on the device of the logits; None takes a new seed."""
    generator = torch.Generator(model.weights.norm.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def tokens_to_stop_at(model: Model, stop_ids: Collection[int] | None) -> Collection[int]:
    """Return `stop_ids`, or for None those of the model's files, or else those of its tokenizer."""
    if stop_ids is not None:
        return stop_ids
    if model.stop_ids is not None:
        return model.stop_ids
    return model.tokenizer.stop_ids if model.tokenizer else ()
