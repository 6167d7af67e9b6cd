"""Variants of the pass over one token that the model does not have, measured before anything is built on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from ... import model as model_module
from ...backends.cuda_graphs import Capture
from ...backends.cuda_operators import linear_three, rope_into_cache, swiglu_few
from ...model import KVCache, LayerCache, Pass, forward
from ...ops import Ops, Tap
from ...quantization.matrix import tensors_of
from ...weights import LayerWeights, Model


@contextlib.contextmanager
def fused_layers() -> Iterator[None]:
    """Within this block, compute a layer of a few tokens by 11 kernels, if `start` is a tensor and nothing is int4.

    wq, wk and wv are one launch, and so are w1, w3 and SwiGLU; RoPE writes into the cache. Taps in between see nothing.
    """
    with (
        mock.patch.object(model_module, "attention", _attention),
        mock.patch.object(model_module, "feed_forward", _feed_forward),
    ):
        yield


def _attention(x: Tensor, weights: LayerWeights, cache: LayerCache, at: Pass, tap: Tap) -> Tensor:
    """Like model.attention, [T, dim] -> [T, dim]."""
    start = torch.as_tensor(at.start, device=x.device)
    qkv = linear_three(x, *(list(tensors_of(matrix)) for matrix in (weights.wq, weights.wk, weights.wv)))
    q = rope_into_cache(qkv, at.cos, at.sin, start, cache.keys, cache.values)
    heads = at.ops.attend(q, cache.keys, cache.values, start, tap)
    return at.ops.linear(heads.flatten(-2), weights.wo)


def _feed_forward(x: Tensor, weights: LayerWeights, ops: Ops, tap: Tap) -> Tensor:
    """Like model.feed_forward, [T, dim] -> [T, dim]."""
    hidden = swiglu_few(x, list(tensors_of(weights.w1)), list(tensors_of(weights.w3)))
    return ops.linear(hidden, weights.w2)


class GreedyGraph:
    """Greedy decoding of one text by replays alone: each is a pass, its argmax, and the token's place in the text."""

    def __init__(self, model: Model, cache: KVCache, ops: Ops, capture: Capture):
        device = cache.keys[0].device
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._text = torch.zeros(cache.max_seq_len + 1, dtype=torch.long, device=device)

        def step() -> Tensor:
            weights, params = model[:2]
            start = self._position.view(())
            logits = forward(weights, params, self._token, cache=cache, start=start, ops=ops)
            self._token.copy_(logits.argmax(-1))
            self._position.add_(1)
            return self._text.index_copy_(0, self._position, self._token)

        with torch.no_grad():
            self._replay: Callable[[], Tensor] = capture(step)

    def __call__(self, token: int, start: int, count: int) -> Tensor:
        """Return the `count` tokens after `token`, which is at the position `start`."""
        self._token.fill_(token)
        self._position.fill_(start)
        for _ in range(count):
            self._replay()
        return self._text[start + 1 : start + 1 + count].clone()
