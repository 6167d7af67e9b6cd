"""How a pass is run: over one text, with exact bits or as a CUDA graph, or over several texts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..backends.cuda_graphs import CudaGraphs
from ..model import KVCache, forward
from ..ops import Ops, Tap, no_tap
from ..weights import Model


class Runner(Protocol):
    """Runs passes over texts and keeps their cache. Texts are known by their place, 0, 1, 2, …"""

    device: torch.device

    @property
    def runs_ahead(self) -> bool:
        """Whether a pass over one token returns before it is computed, so that its token need not be known here."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The prompt of each text -> the logits after it, [texts, 1, vocab]."""

    def step(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """Tokens [texts, T], each text's from its position on -> the logits after each, [texts, T, vocab]."""

    def move(self, source: int, target: int, length: int) -> None:
        """The last text, of so many tokens, takes the place of one that has ended."""


class SingleRunner:
    """One text, which is no batch of one: with an int start it gets the exact bits."""

    def __init__(self, model: Model, cache: KVCache, start: int, ops: Ops, tap: Tap, graphs: CudaGraphs | None):
        """start: how many tokens the cache holds already. graphs: of this cache; None runs every pass eagerly."""
        self.device = model.weights.norm.device  # the embeddings may lie on another
        self._model, self._cache, self._start, self._ops, self._tap, self._graphs = (
            model,
            cache,
            start,
            ops,
            tap,
            graphs,
        )

    @property
    def runs_ahead(self) -> bool:
        return self._graphs is not None and self._graphs.are_ready(1)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        (prompt,) = prompts
        for begin in range(0, len(prompt), self._ops.prefill_chunk):
            tokens = torch.tensor(prompt[begin : begin + self._ops.prefill_chunk], device=self.device)
            position = self._start + begin
            # only a graph that is there: the first token should not wait for a capture
            if self._graphs and self._graphs.fit(len(tokens), position) and self._graphs.are_ready(len(tokens)):
                logits = self._graphs(tokens, position)[-1]
            else:
                logits = self._forward(tokens, position, -1)
        return logits.view(1, 1, -1)

    def step(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        (of_text,), (position,) = tokens, positions
        if self._graphs and self._graphs.fit(len(of_text), position):
            logits = self._graphs(of_text, position)
        else:
            logits = self._forward(of_text, position, -1 if len(of_text) == 1 else None)
        return logits.view(1, len(of_text), -1)

    def move(self, source: int, target: int, length: int) -> None:
        raise AssertionError("a lone text has no other to take its place")

    def _forward(self, tokens: Tensor, position: int, logits_at: int | None) -> Tensor:
        weights, params, _ = self._model
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
    """Several texts, each of which has a row of the cache; those running are its first rows."""

    runs_ahead = False

    def __init__(self, model: Model, cache: KVCache, ops: Ops):
        self.device = model.weights.norm.device
        self._model, self._cache, self._ops = model, cache, ops

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Neighbours that are short go together; a prompt that would fill a pass goes alone, as `generate` takes it."""
        logits = []  # of each pack, [texts, 1, vocab]
        begin = 0
        while begin < len(prompts):
            end, width = begin + 1, len(prompts[begin])
            while end < len(prompts):
                wider = max(width, len(prompts[end]))
                if (end + 1 - begin) * wider > self._ops.max_packed:
                    break
                end, width = end + 1, wider
            if end - begin == 1:
                logits.append(self._prefill_alone(begin, prompts[begin]))
            else:
                logits.append(self._prefill_together(begin, prompts[begin:end], width))
            begin = end
        return torch.cat(logits)

    def _prefill_alone(self, row: int, prompt: Sequence[int]) -> Tensor:
        cache = _part(self._cache, row, len(prompt))
        return SingleRunner(self._model, cache, 0, self._ops, no_tap, None).prefill([prompt])

    def _prefill_together(self, first: int, prompts: Sequence[Sequence[int]], width: int) -> Tensor:
        """Padded on the right: what is cached of the padding is overwritten before a token looks at it."""
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts], device=self.device)
        ends = torch.tensor([len(ids) - 1 for ids in prompts], device=self.device)
        cache = _part(self._cache, slice(first, first + len(prompts)), width)
        return self._forward(padded, cache, 0, ends)

    def step(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        cache = _part(self._cache, slice(len(positions)), max(positions) + 1)
        return self._forward(tokens, cache, torch.tensor(positions, device=self.device), -1)

    def move(self, source: int, target: int, length: int) -> None:
        for cached in (*self._cache.keys, *self._cache.values):
            cached[target, :length] = cached[source, :length]

    def _forward(self, tokens: Tensor, cache: KVCache, start: int | Tensor, logits_at: int | Tensor) -> Tensor:
        weights, params, _ = self._model
        logits = forward(weights, params, tokens, cache=cache, start=start, logits_at=logits_at, ops=self._ops)
        return logits.unsqueeze(1)  # [texts, 1, vocab]


def _part(cache: KVCache, rows: int | slice, length: int) -> KVCache:
    """The first `length` positions of some rows, or of one without its dimension; not copied."""
    keys, values = (tuple(cached[rows, :length] for cached in tensors) for tensors in cache)
    return KVCache(keys, values)
