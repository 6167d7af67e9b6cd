"""The decoding loop: the prompt in chunks, then a token at a time, or several where earlier text foretells them.

An iterator of ids that knows no text.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Collection, Generator, Iterable, Sequence

import torch
from torch import Tensor

from ..backends.choose import ops_for
from ..backends.cuda_graphs import CapturedPasses, on_its_way
from ..errors import UserError
from ..model import KVCache, forward
from ..ops import Ops, Tap, no_tap
from ..params import Params
from ..weights import Model
from .prompt_lookup import LookupPolicy, Proposer
from .sampling import Sampling, sample

PREFILL_CHUNK = 1024  # tokens of the prompt in one forward pass: from so many on, matrix products are hardly faster

EXACT_PREFILL_CHUNK = 256  # with the exact operations, which have the scores [n_heads, chunk, S] in memory

# new tokens: a pass of 32 layers took 24 s to compile, found on the disk, and 142 s when it was new (measured on the
# CPU, one thread, narrow layers); it may save 3 ms a token of 8B, of 1,500 small kernels 2 µs each (an estimate)
_COMPILED_FROM = 4096


def check_ids(ids: Iterable[int], params: Params) -> None:
    """Raises UserError for a token id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < params.vocab_size:
            raise UserError(f"token id {token} is outside the model's vocabulary of {params.vocab_size}")


def check_logits(logits: Tensor) -> None:
    """Raises UserError for logits that no model with sound weights gives."""
    check_sound(bool(_are_sound(logits)))


def _are_sound(logits: Tensor) -> Tensor:
    return logits.amax() < torch.inf  # nor is NaN


def check_sound(are_sound: bool) -> None:
    """Raises UserError where logits are not."""
    if not are_sound:
        raise UserError(
            "the logits are not numbers: the weights are damaged (see download.py --verify), or their dtype is too "
            "small for them"
        )


class StopReason(enum.Enum):
    """Why `generate` ended."""

    END_TOKEN = "the model ended the text"
    MAX_NEW_TOKENS = "max_new_tokens is reached"
    CONTEXT = "the context is full"


def generate(
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
    captured: CapturedPasses | bool | None = True,
) -> Generator[int, None, StopReason]:
    """Yields the tokens that follow the prompt `ids`, one int at a time; returns why it stopped.

    Temperature 0 takes the likeliest token; for the other sampling settings see `Sampling`. seed: the same seed on the
    same machine draws the same tokens; None draws anew.
    stop_ids: the tokens at which it ends (not yielded); None takes the tokenizer's, () never ends there.
    context: the most tokens, prompt included; None takes the model's max_seq_len, and more than that is your own risk.
    cache, start: a cache that already holds `start` tokens, to go on from there; it is written in place, and afterwards
        holds all tokens but the last one yielded. None makes one that is just large enough. The repetition penalty
        sees the tokens of `ids` and new ones, not those that only the cache holds.
    lookup: the most tokens, 0 to 15, that are proposed from the text so far and checked in one pass, where that is
        faster; a policy in place of the number keeps what it learns for the next call, and its counts can be read. The
        tokens are the same as without, drawn ones too, where a token's logits have the same bits alone and among
        others: with the fast operations of the CPU in bf16. Elsewhere they differ by rounding, so that of two tokens
        about equally likely the other one may come. What was proposed in vain is left in the cache behind its tokens.
    earlier: text that stands before `ids`, such as what the cache holds; only to propose from.
    ops: None takes the set that suits the weights. tap: as in `forward`; with lookup it sees a row for each proposed
        token as well, and those behind the first wrong one are not used.
    captured: whether a model on a GPU has its passes over few tokens captured in a graph, where that is possible: with
        the fast operations and no tap. The pass over one token is compiled before only where 4,096 new ones may come,
        since that takes as long as thousands of them. The `CapturedPasses` of a cache keep both for the next call, and
        compile for any number.

    Raises UserError for an empty prompt, ids outside the vocabulary, a prompt longer than the context, a cache that the
    memory does not hold, and settings out of range; at the call, not at the first token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    policy = lookup if isinstance(lookup, LookupPolicy) else LookupPolicy(lookup)
    limit = model.params.max_seq_len if context is None else context
    if cache is not None:
        limit = min(limit, cache.max_seq_len)
    if limit < 1:
        raise UserError(f"the context should be 1 or more, is {limit}")
    if start < 0 or (start > 0 and cache is None):
        raise UserError(f"start should be how many tokens the given cache holds, is {start}")
    prompt = [int(token) for token in ids]
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    check_ids((*earlier, *prompt), model.params)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens should be 0 or more, is {max_new_tokens}")
    end = start + len(prompt)
    if end > limit:
        raise UserError(f"the prompt needs {end} positions, but the context holds {limit}; shorten the prompt")
    if stop_ids is None:
        stop_ids = model.tokenizer.stop_ids if model.tokenizer else ()
    budget = min(max_new_tokens, limit - end)
    if cache is None:
        try:
            cache = KVCache.allocate(model.params, max_seq_len=end + budget, like=model.weights)
        except RuntimeError as error:  # torch's only word for memory that the CPU does not have
            raise UserError(
                f"a cache for {end + budget} tokens does not fit into memory; lower --max-new-tokens or --context"
            ) from error
    device = model.weights.norm.device  # the embeddings may lie on another
    if ops is None:
        ops = ops_for(model.weights)
    prefill_chunk = ops.prefill_chunk
    if isinstance(captured, CapturedPasses) and captured.cache is not cache:
        raise ValueError("the captured passes are those of another cache")
    if captured is True:
        passes = CapturedPasses.where_possible(model, cache, ops, compiled=budget >= _COMPILED_FROM)
    else:
        passes = captured or None
    if tap is not None:  # which a graph would not call
        passes = None
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)

    def logits_behind(new: Sequence[int], position: int, logits_at: int | None) -> Tensor:
        """The logits behind the tokens `new`, which start at `position`: [vocab], or [T, vocab] for logits_at None."""
        # over the prompt only what has been captured before, or the first token would have to wait for it
        if passes is not None and passes.fit(len(new), position) and (position >= end or passes.are_ready(len(new))):
            rows = passes(torch.tensor(new, device=device), position)
            return rows if logits_at is None else rows[logits_at]
        with torch.no_grad():
            return forward(
                model.weights,
                model.params,
                torch.tensor(new, device=device),
                cache=cache,
                start=position,
                logits_at=logits_at,
                ops=ops,
                tap=no_tap if tap is None else tap,  # an empty Trace is false
            )

    def tokens_ahead(passes: CapturedPasses) -> Generator[int, None, StopReason]:
        """A pass begins before the token that it starts from is looked at here, so that the GPU never waits."""
        for begin in range(0, len(prompt), prefill_chunk):
            row = logits_behind(prompt[begin : begin + prefill_chunk], start + begin, -1)  # [vocab]
        seen = torch.tensor(prompt + prompt[:1] * budget, device=device)  # [all that there will be]
        for count in range(budget):
            begun = time.perf_counter()
            token = sample(row, sampling, seen, generator)  # []
            arriving = on_its_way(torch.stack((token, _are_sound(row))))
            seen[len(prompt) + count] = token
            is_last = count + 1 == budget
            if count and not is_last:
                row = passes(token.unsqueeze(0), end + count)[0]
            known, is_sound = arriving()
            check_sound(bool(is_sound))
            if known in stop_ids:
                return StopReason.END_TOKEN
            yield known
            if not count and not is_last:  # the first one is out before the pass is captured, which may take long
                row = passes(token.unsqueeze(0), end)[0]
            policy.learn_cost(0, time.perf_counter() - begun)
        return StopReason.MAX_NEW_TOKENS if budget == max_new_tokens else StopReason.CONTEXT

    def tokens() -> Generator[int, None, StopReason]:
        seen = list(prompt)
        proposer = Proposer(policy, [*earlier, *prompt])
        proposed: list[int] = []
        position = start
        left = budget
        new = prompt
        while left:
            begun = time.perf_counter()
            for begin in range(0, len(new), prefill_chunk):
                chunk = new[begin : begin + prefill_chunk]
                logits = logits_behind(chunk + proposed, position, None if proposed else -1)
                position += len(chunk)
            rows = logits.reshape(-1, logits.shape[-1])  # [1 + proposed, vocab]
            check_logits(rows[0])  # waits for a GPU to be done
            if left < budget:  # not over the prompt
                policy.learn_cost(len(proposed), time.perf_counter() - begun)
            for row, expected in zip(rows, [*proposed, None], strict=True):
                check_logits(row)
                token = int(sample(row, sampling, seen, generator))
                if token in stop_ids:
                    return StopReason.END_TOKEN
                yield token
                left -= 1
                seen.append(token)
                proposer.append(token)
                if token != expected:
                    break
                position += 1
                policy.accepted += 1
            new = [token]
            proposed = proposer.propose(left - 1)
        return StopReason.MAX_NEW_TOKENS if budget == max_new_tokens else StopReason.CONTEXT

    return tokens_ahead(passes) if passes is not None and policy.most == 0 else tokens()
