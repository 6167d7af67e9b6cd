"""The decoding loop over a batch: the prompts in as few passes as pay, then a token for each row in one pass.

A pass over one token reads all weights to multiply them by that token. With 16 of them it reads them once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.choose import ops_for
from ..errors import UserError
from ..model import KVCache, forward
from ..ops import Ops
from ..weights import Model
from .loop import PREFILL_CHUNK, StopReason, check_ids, check_logits
from .sampling import Sampling, sample

# tokens of several prompts in one pass. The CPU's matrix units give a token the same bits among up to so many as alone,
# and with more are hardly faster; a GPU is
PACK, GPU_PACK = 128, PREFILL_CHUNK


class Row(NamedTuple):
    """A prompt of a batch, and how it is to go on.

    seed: as for `generate`. is_over: asked after each token whether the text ends there, with all new tokens so far.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int | None = None
    is_over: Callable[[Sequence[int]], bool] = lambda new: False


@dataclass
class _Running:
    """A row that has not ended; its place in the cache is its place in the list of those running."""

    number: int
    row: Row
    budget: int  # new tokens at most
    generator: torch.Generator
    seen: list[int] = field(init=False)  # the prompt and the new tokens; the cache holds all but the last one

    def __post_init__(self) -> None:
        self.seen = list(self.row.ids)

    @property
    def new(self) -> list[int]:
        return self.seen[len(self.row.ids) :]


def generate_batch(
    model: Model,
    rows: Sequence[Row],
    *,
    stop_ids: Collection[int] | None = None,
    context: int | None = None,
    ops: Ops | None = None,
) -> Iterator[tuple[int, int | StopReason]]:
    """Yields (row, token) for each token as it comes, and (row, why) where a row has ended; row counts from 0.

    A row's tokens are those that `generate` gives for it alone with the same settings: bit for bit with the CPU's fast
    operations in bf16 (prompts up to rounding where the CPU has no matrix units), elsewhere up to rounding, so that of
    two tokens about equally likely the other one may come. The same rows in the same order give the same tokens.

    stop_ids, context, ops: as for `generate`. Prompts of about the same length waste the least; where they are short,
    as many as follow each other are padded on the right and computed at once.

    Raises UserError as `generate` does, at the call.
    """
    limit = model.params.max_seq_len if context is None else context
    for row in rows:
        if not row.ids:
            raise UserError("a prompt is empty; give at least one token")
        check_ids(row.ids, model.params)
        if len(row.ids) > limit:
            raise UserError(f"a prompt needs {len(row.ids)} positions, but the context holds {limit}; shorten it")
    if stop_ids is None:
        stop_ids = model.tokenizer.stop_ids if model.tokenizer else ()
    return _run(model, rows, stop_ids, limit, ops_for(model.weights) if ops is None else ops)


@torch.no_grad()
def _run(
    model: Model, rows: Sequence[Row], stop_ids: Collection[int], limit: int, ops: Ops
) -> Iterator[tuple[int, int | StopReason]]:
    device = model.weights.norm.device
    running = []
    for number, row in enumerate(rows):
        budget = min(row.max_new_tokens, limit - len(row.ids))
        generator = torch.Generator(device)
        generator.seed() if row.seed is None else generator.manual_seed(row.seed)
        if budget > 0:
            running.append(_Running(number, row, budget, generator))
        else:
            yield number, StopReason.MAX_NEW_TOKENS if row.max_new_tokens <= 0 else StopReason.CONTEXT
    if not running:
        return
    longest = max(len(one.row.ids) + one.budget for one in running) - 1  # nobody looks back at the last token
    try:
        cache = KVCache.allocate(model.params, max_seq_len=longest, like=model.weights, batch=(len(running),))
    except RuntimeError as error:  # torch's only word for memory that the CPU does not have
        raise UserError(
            f"a cache for {len(running)} texts of {longest} tokens does not fit into memory; lower --batch-size"
        ) from error
    logits = _prefill(model, [one.row.ids for one in running], cache, ops)  # [running, vocab]
    while True:
        check_logits(logits)
        for place, token in reversed(list(enumerate(_sampled(logits, running)))):  # from behind, since places change
            one = running[place]
            one.seen.append(token)
            reason = _why_over(one, token, stop_ids)
            if token not in stop_ids:
                yield one.number, token
            if reason is not None:
                yield one.number, reason
                _remove(place, running, cache)
        if not running:
            return
        positions = [len(one.seen) - 1 for one in running]
        logits = forward(
            model.weights,
            model.params,
            torch.tensor([one.seen[-1:] for one in running], device=device),  # [running, 1]
            cache=_part(cache, slice(len(running)), max(positions) + 1),
            start=torch.tensor(positions, device=device),
            logits_at=-1,
            ops=ops,
        )


def _why_over(one: _Running, token: int, stop_ids: Collection[int]) -> StopReason | None:
    """Why the row ends with its last token, if it does."""
    count = len(one.seen) - len(one.row.ids)
    if token in stop_ids or one.row.is_over(one.new):
        return StopReason.END_TOKEN
    if count == one.row.max_new_tokens:
        return StopReason.MAX_NEW_TOKENS
    return StopReason.CONTEXT if count == one.budget else None


def _sampled(logits: Tensor, running: Sequence[_Running]) -> list[int]:
    """logits [running, vocab] -> the next token of each row, drawn as `generate` draws it for the row alone."""
    tokens = sample(logits).tolist()  # the likeliest
    for place, one in enumerate(running):
        if one.row.sampling != Sampling():
            tokens[place] = int(sample(logits[place], one.row.sampling, one.seen, one.generator))
    return tokens


def _remove(place: int, running: list[_Running], cache: KVCache) -> None:
    """Takes a row out; the last one gets its place, so that those running stay in front and no others are computed."""
    last = running.pop()
    if place < len(running):
        held = len(last.seen) - 1
        for cached in (*cache.keys, *cache.values):
            cached[place, :held] = cached[len(running), :held]
        running[place] = last


def _part(cache: KVCache, rows: int | slice, length: int) -> KVCache:
    """The first `length` positions of some rows, or of one without its dimension; not copied."""
    keys, values = (tuple(cached[rows, :length] for cached in tensors) for tensors in cache)
    return KVCache(keys, values)


def _prefill(model: Model, prompts: Sequence[Sequence[int]], cache: KVCache, ops: Ops) -> Tensor:
    """Computes the prompts into the rows of the cache -> the logits behind each, [rows, vocab].

    Neighbours that are short go together, padded on the right: what is cached of the padding is overwritten before a
    token looks at it. A prompt that would fill a pass goes alone, as `generate` takes it.
    """
    device = model.weights.norm.device
    room = PACK if device.type == "cpu" else GPU_PACK
    chunk = ops.prefill_chunk
    logits = []
    begin = 0
    while begin < len(prompts):
        end, width = begin + 1, len(prompts[begin])
        while end < len(prompts) and (end + 1 - begin) * max(width, len(prompts[end])) <= room:
            width = max(width, len(prompts[end]))
            end += 1
        if end - begin == 1:
            tokens = torch.tensor(prompts[begin], device=device)  # [T]
            lone = _part(cache, begin, len(tokens))
            for start in range(0, len(tokens), chunk):
                part = tokens[start : start + chunk]
                last = forward(model.weights, model.params, part, cache=lone, start=start, logits_at=-1, ops=ops)
            logits.append(last.unsqueeze(0))
        else:
            pack = prompts[begin:end]
            padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in pack], device=device)  # [rows, width]
            ends = torch.tensor([len(ids) - 1 for ids in pack], device=device)
            together = _part(cache, slice(begin, end), width)
            logits.append(
                forward(model.weights, model.params, padded, cache=together, logits_at=ends, ops=ops)  # [rows, vocab]
            )
        begin = end
    return torch.cat(logits)
