"""Runners of forward passes: over one text, eagerly or as a CUDA graph, or over a batch of texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..backends.cuda_graphs import CudaGraphs
from ..model import KVCache, forward
from ..ops import Ops, Rows, Tap, announce, no_tap
from ..weights import Model


class Runner(Protocol):
    """Runs passes over texts and keeps their KV cache. A text is identified by its row: 0, 1, 2, …"""

    device: torch.device

    @property
    def runs_ahead(self) -> bool:
        """Whether a pass over one token returns before it is computed, so that the CPU need not know the token."""

    def prefill(self, prompts: Sequence[Sequence[int]], first: int = 0, taps: Sequence[Tap] | None = None) -> Tensor:
        """Compute the prompts in the rows from `first` on; return the logits after each, [texts, 1, vocab].

        taps: one for each prompt, which sees the passes over it; with a tap other than `no_tap` it is computed alone.
        """

    def step(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """Compute tokens [texts, T], from a position of each text on; return the logits, [texts, T, vocab]."""

    def move(self, source: int, target: int, length: int) -> None:
        """Move the text in row `source`, the first `length` positions of the cache, to row `target`."""

    def clear(self, row: int) -> None:
        """Forget a row whose text ended in NaN: its cache would reach a later text, as 0 * NaN is NaN."""


class SingleRunner:
    """Runs one text, without a batch dimension: with an int start, which the exact operations need for Meta's bits."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        start: int,
        ops: Ops,
        tap: Tap,
        graphs: CudaGraphs | None,
        texts: tuple[int, ...] | None = None,
    ):
        """start: the number of tokens in the cache. graphs: those of this cache; None runs every pass eagerly.

        texts: for taps, the numbers of the texts of a batch that have these tokens.
        """
        self.device = model.weights.norm.device  # the embeddings may be on another
        self._model = model
        self._cache = cache
        self._start = start
        self._ops = ops
        self._tap = tap
        self._graphs = graphs
        self._texts = texts

    @property
    def runs_ahead(self) -> bool:
        return self._graphs is not None and self._graphs.are_ready(1)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        first: int = 0,
        taps: Sequence[Tap] | None = None,
        goes_on: bool = False,
    ) -> Tensor:
        """goes_on: whether more of the prompt follows in another prefill."""
        (prompt,) = prompts
        for begin in range(0, len(prompt), self._ops.prefill_chunk):
            tokens = torch.tensor(prompt[begin : begin + self._ops.prefill_chunk], device=self.device)
            position = self._start + begin
            # only a graph that was captured before: the first token should not wait for a capture
            if self._graphs and self._graphs.fit(len(tokens), position) and self._graphs.are_ready(len(tokens)):
                logits = self._graphs(tokens, position)[-1]
            else:
                logits = self._forward(tokens, position, -1, goes_on or begin + len(tokens) < len(prompt))
        return logits.view(1, 1, -1)

    def step(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        (row,), (position,) = tokens, positions
        if self._graphs and self._graphs.fit(len(row), position):
            logits = self._graphs(row, position)
        else:
            logits = self._forward(row, position, -1 if len(row) == 1 else None)
        return logits.view(1, len(row), -1)

    def move(self, source: int, target: int, length: int) -> None:
        raise AssertionError("there is only one text")

    def clear(self, row: int) -> None:
        pass  # no other text uses the cache

    def end(self, position: int) -> None:
        """Tell the tap that the text has no token from this position on, although some were computed as proposals."""
        announce(self._tap, Rows((position,), (0,)))

    def _forward(self, tokens: Tensor, position: int, logits_at: int | None, goes_on: bool = False) -> Tensor:
        weights, params = self._model[:2]
        if self._tap is not no_tap:
            texts = None if self._texts is None else (self._texts,)
            announce(self._tap, Rows((position,), (len(tokens),), texts, prompt_goes_on=goes_on))
        return forward(
            weights,
            params,
            tokens,
            cache=self._cache,
            start=position,
            logits_at=logits_at,
            ops=self._ops,
            tap=self._tap,
        )


class BatchRunner:
    """Runs a batch of texts. Each has a row of the cache; the running ones are the first rows."""

    runs_ahead = False

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        ops: Ops,
        shares_beginning: bool = False,
        tap: Tap = no_tap,
        texts: Sequence[tuple[int, ...]] = (),
    ):
        """shares_beginning: compute what all prompts begin with once. Rounding then differs from that of `generate`.

        texts: for the tap, the numbers of the texts that each row of the cache belongs to; without it, that of the row.
        """
        self.device = model.weights.norm.device
        self.texts = list(texts) or [(row,) for row in range(len(cache.keys[0]))]
        self._tap = tap
        self._model, self._cache, self._ops, self._shares_beginning = model, cache, ops, shares_beginning
        self._start = 0  # tokens in each row of the cache before the rest of its prompt

    def prefill(self, prompts: Sequence[Sequence[int]], first: int = 0, taps: Sequence[Tap] | None = None) -> Tensor:
        """Compute consecutive short prompts together, and a long prompt alone, in chunks as `generate` does."""
        taps = taps or [no_tap] * len(prompts)
        if self._shares_beginning and len(prompts) > 1:
            # each prompt keeps a token of its own, whose logits are wanted
            shared = _common_beginning([list(prompt[:-1]) for prompt in prompts])
            if shared:
                everyone = tuple(text for texts in self.texts for text in texts)
                self._prefill_alone(0, shared, no_tap, everyone, goes_on=True)
                for row in range(1, len(prompts)):
                    self._copy(0, row, len(shared))
                self._start = len(shared)
                prompts = [prompt[len(shared) :] for prompt in prompts]
        logits = []  # of each pass, [texts, 1, vocab]
        begin = 0
        while begin < len(prompts):
            end, width = begin + 1, len(prompts[begin])
            while end < len(prompts) and taps[begin] is taps[end] is no_tap:
                wider = max(width, len(prompts[end]))
                if (end + 1 - begin) * wider > self._ops.max_packed:
                    break
                end, width = end + 1, wider
            if end - begin == 1:
                logits.append(self._prefill_alone(first + begin, prompts[begin], taps[begin]))
            else:
                logits.append(self._prefill_together(first + begin, prompts[begin:end], width))
            begin = end
        return torch.cat(logits)

    def _prefill_alone(
        self, row: int, prompt: Sequence[int], tap: Tap, texts: tuple[int, ...] | None = None, goes_on: bool = False
    ) -> Tensor:
        cache = _cache_view(self._cache, row, self._start + len(prompt))
        tap = self._tap if tap is no_tap else tap
        alone = SingleRunner(self._model, cache, self._start, self._ops, tap, None, texts or self.texts[row])
        return alone.prefill([prompt], goes_on=goes_on)

    def _prefill_together(self, first: int, prompts: Sequence[Sequence[int]], width: int) -> Tensor:
        """Compute prompts padded on the right; cached padding is overwritten before a token attends to it.

        A prompt is padded with a token of its own, so that a NaN in the weights reaches only the texts that use it.
        """
        padded = torch.tensor([[*ids, *[ids[-1]] * (width - len(ids))] for ids in prompts], device=self.device)
        ends = torch.tensor([len(ids) - 1 for ids in prompts], device=self.device)
        cache = _cache_view(self._cache, slice(first, first + len(prompts)), self._start + width)
        self._announce([self._start] * len(prompts), [len(ids) for ids in prompts], first)
        return self._forward(padded, cache, self._start, ends).unsqueeze(1)  # [texts, 1, vocab]

    def step(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        cache = _cache_view(self._cache, slice(len(positions)), max(positions) + 1)
        self._announce(positions, [1] * len(positions))
        return self._forward(tokens, cache, torch.tensor(positions, device=self.device), -1).unsqueeze(1)

    def extend(self, tokens: Tensor, positions: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Compute known tokens [texts, T], from a position of each text on; return all logits, [texts, T, vocab].

        lengths: how many of the tokens of each text are no padding.
        """
        cache = _cache_view(self._cache, slice(len(positions)), max(positions) + tokens.shape[-1])
        is_even = len(set(positions)) == 1  # then attention needs no mask over the whole cache
        start = positions[0] if is_even else torch.tensor(positions, device=self.device)
        self._announce(positions, lengths)
        return self._forward(tokens, cache, start, None)

    def move(self, source: int, target: int, length: int) -> None:
        self._copy(source, target, length)
        self.texts[target] = self.texts[source]

    def _copy(self, source: int, target: int, length: int) -> None:
        for cached in (*self._cache.keys, *self._cache.values):
            cached[target, :length] = cached[source, :length]

    def clear(self, row: int) -> None:
        for cached in (*self._cache.keys, *self._cache.values):
            cached[row] = 0

    def _forward(self, tokens: Tensor, cache: KVCache, start: int | Tensor, logits_at: int | Tensor | None) -> Tensor:
        weights, params = self._model[:2]
        return forward(
            weights, params, tokens, cache=cache, start=start, logits_at=logits_at, ops=self._ops, tap=self._tap
        )

    def _announce(self, starts: Sequence[int], lengths: Sequence[int], first: int = 0) -> None:
        if self._tap is not no_tap:
            texts = self.texts[first : first + len(starts)]
            announce(self._tap, Rows(tuple(starts), tuple(lengths), tuple(texts), is_batch=True))


def _common_beginning(texts: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all texts begin with."""
    least, most = min(texts), max(texts)  # what these two share, all between them do
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
    return [token for token, _ in alike]


def _cache_view(cache: KVCache, rows: int | slice, length: int) -> KVCache:
    """Return a view of the first `length` positions of some rows; an int selects one, without the batch dimension."""
    keys, values = (tuple(cached[rows, :length] for cached in tensors) for tensors in cache)
    return KVCache(keys, values)
