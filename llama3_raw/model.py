"""The forward pass of Llama 3, from token ids to logits, as plain functions over plain tensors.

From the small pieces down to `forward`, which puts them together. Shapes: `...` is nothing for a lone prompt and [B]
for a batch; T is the number of new tokens, S the number of tokens so far including them.

The computation and every cast are those of Meta's own code (llama_models/llama3/model.py), bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import Ops, Tap
from .params import Params
from .quantization.matrix import linear
from .weights import LayerWeights, Weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., dim] -> [..., dim]: each row over its root mean square, times weight. (Zhang & Sennrich 2019, eq. 4)"""
    x32 = x.float()  # the mean square needs fp32; the result goes back to x's dtype before the weight
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def token_positions(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """The positions of `length` new tokens: [T] for an int start, [..., T] for a tensor of starts, one per row."""
    offsets = torch.arange(length, device=device)  # [T]
    return start + offsets if isinstance(start, int) else start.unsqueeze(-1) + offsets


def rope_frequencies(params: Params, device: torch.device) -> Tensor:
    """-> [head_dim/2] fp32: how far each pair of a head turns per position, in radians. (Su et al. 2021, eq. 15)

    Llama 3.1 and later slow the low frequencies down for a longer context. (Meta's apply_scaling)
    """
    exponents = torch.arange(0, params.head_dim, 2, device=device).float() / params.head_dim  # [head_dim/2]
    frequencies = 1.0 / params.rope_theta**exponents
    scaling = params.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * torch.pi / frequencies  # positions per full turn
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    smooth = (original / wavelengths - low) / (high - low)  # 0 at the long end of the middle band, 1 at the short one
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(wavelengths > original / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < original / high, frequencies, slowed)


def rope_rotation(positions: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """[..., T] -> cos and sin, each [..., T, 1, head_dim/2] fp32: the turn of every pair at every position."""
    angles = positions.unsqueeze(-1) * rope_frequencies(params, positions.device)  # [..., T, head_dim/2]
    if angles.device.type == "mps":  # no complex numbers there
        cos, sin = angles.cos(), angles.sin()
    else:  # as Meta does: torch.cos and torch.sin differ from torch.polar in the last bit
        turns = torch.polar(torch.ones_like(angles), angles)
        cos, sin = turns.real, turns.imag
    return cos.unsqueeze(-2), sin.unsqueeze(-2)  # 1: the same turn for every head


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., T, heads, head_dim] -> the same: neighbouring values (0, 1), (2, 3), … turned as points in the plane.

    The bits of Meta's complex product where head_dim is a multiple of 16 (every Llama); below that torch's complex
    kernel rounds the last pairs of a head in another way.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each [..., T, heads, head_dim/2] fp32
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class KVCache(NamedTuple):
    """The keys and values of all tokens so far, for each layer [..., max_seq_len, n_kv_heads, head_dim].

    The one thing that the forward pass writes in place.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def max_seq_len(self) -> int:
        """How many tokens fit."""
        return self.keys[0].shape[-3]

    @staticmethod
    def allocate(params: Params, *, max_seq_len: int, like: Weights, batch: tuple[int, ...] = ()) -> KVCache:
        """An empty cache for `max_seq_len` tokens; dtype, layers, devices and kv heads are those of `like`."""

        def empty(layer: LayerWeights) -> Tensor:
            n_kv_heads = layer.wk.shape[0] // params.head_dim
            shape = (*batch, max_seq_len, n_kv_heads, params.head_dim)
            # the norm is in the dtype that the layer computes in, however its matrices are stored
            return torch.zeros(shape, dtype=layer.attention_norm.dtype, device=layer.attention_norm.device)

        return KVCache(
            keys=tuple(empty(layer) for layer in like.layers), values=tuple(empty(layer) for layer in like.layers)
        )


def remember(cached: Tensor, new: Tensor, start: int | Tensor) -> Tensor:
    """Writes new [..., T, heads, head_dim] into cached [..., max_seq_len, heads, head_dim] from `start` on.

    -> the keys or values to attend to: [..., start + T, heads, head_dim] for an int start, all of cached for a tensor.
    """
    length = new.shape[-3]
    if isinstance(start, int):
        cached[..., start : start + length, :, :] = new
        return cached[..., : start + length, :, :]
    positions = token_positions(start, length, new.device).view(-1, length)  # [B, T], B = 1 for a lone prompt
    rows = torch.arange(len(positions), device=new.device).unsqueeze(-1)  # [B, 1]
    cached.view(-1, *cached.shape[-3:])[rows, positions] = new.view(-1, *new.shape[-3:])
    return cached


def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap, name: str) -> Tensor:
    """q [..., T, n_heads, head_dim], keys and values [..., S, n_kv_heads, head_dim] -> [..., T, n_heads, head_dim].

    softmax(q·k / sqrt(head_dim))·v, each token looking at itself and back. (Vaswani et al. 2017, eq. 1) Neighbouring
    query heads share a kv head. (Ainslie et al. 2023)
    """
    length, n_heads, head_dim = q.shape[-3:]
    sharing = n_heads // keys.shape[-2]  # so many query heads in a row share a kv head, which is repeated for them
    keys = keys.unsqueeze(-2).expand(*keys.shape[:-1], sharing, head_dim).flatten(-3, -2)  # [..., S, n_heads, head_dim]
    values = values.unsqueeze(-2).expand(*values.shape[:-1], sharing, head_dim).flatten(-3, -2)
    q, keys, values = q.transpose(-3, -2), keys.transpose(-3, -2), values.transpose(-3, -2)  # [..., n_heads, T or S, …]

    scores = q @ keys.transpose(-2, -1) / math.sqrt(head_dim)  # [..., n_heads, T, S]
    positions = token_positions(start, length, q.device).unsqueeze(-1)  # [..., T, 1]
    future = torch.arange(keys.shape[-2], device=q.device) > positions  # [..., T, S]
    scores = tap(f"{name}.scores", scores.masked_fill(future.unsqueeze(-3), -torch.inf))
    probs = tap(f"{name}.probs", F.softmax(scores.float(), dim=-1).to(q.dtype))
    return (probs @ values).transpose(-3, -2)


REFERENCE = Ops(embed=F.embedding, linear=linear, attend=attend, reduce=lambda x: x)


def no_tap(name: str, tensor: Tensor) -> Tensor:
    """The tap that looks at nothing and changes nothing."""
    return tensor


def attention(
    x: Tensor,
    weights: LayerWeights,
    params: Params,
    rotation: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor] | None,
    start: int | Tensor,
    ops: Ops,
    tap: Tap,
    name: str,
) -> Tensor:
    """[..., T, dim] -> [..., T, dim]: grouped-query attention with rotary positions."""
    by_head = (-1, params.head_dim)
    q = tap(f"{name}.q", ops.linear(x, weights.wq).unflatten(-1, by_head))  # [..., T, n_heads, head_dim]
    k = tap(f"{name}.k", ops.linear(x, weights.wk).unflatten(-1, by_head))  # [..., T, n_kv_heads, head_dim]
    v = tap(f"{name}.v", ops.linear(x, weights.wv).unflatten(-1, by_head))  # [..., T, n_kv_heads, head_dim]
    q = tap(f"{name}.q_rope", rope(q, *rotation))
    k = tap(f"{name}.k_rope", rope(k, *rotation))
    if cache is not None:
        k, v = remember(cache[0], k, start), remember(cache[1], v, start)  # [..., S, n_kv_heads, head_dim]
    heads = tap(f"{name}.heads", ops.attend(q, k, v, start, tap, name))  # [..., T, n_heads, head_dim]
    return tap(f"{name}.out", ops.reduce(ops.linear(heads.flatten(-2), weights.wo)))


def swiglu(x: Tensor, weights: LayerWeights, ops: Ops, tap: Tap, name: str) -> Tensor:
    """[..., dim] -> [..., dim]: w2(silu(w1 x) * w3 x), through hidden_dim. (Shazeer 2020, eq. 6)"""
    gate = tap(f"{name}.gate", ops.linear(x, weights.w1))  # [..., hidden_dim]
    up = tap(f"{name}.up", ops.linear(x, weights.w3))  # [..., hidden_dim]
    hidden = tap(f"{name}.hidden", F.silu(gate) * up)  # [..., hidden_dim]
    return tap(f"{name}.out", ops.reduce(ops.linear(hidden, weights.w2)))


def layer(
    x: Tensor,
    weights: LayerWeights,
    params: Params,
    rotation: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor] | None,
    start: int | Tensor,
    ops: Ops,
    tap: Tap,
    name: str,
) -> Tensor:
    """[..., T, dim] -> [..., T, dim]: one layer; attention, then feed-forward, each added to what came in."""
    normed = tap(f"{name}.attention_norm", rms_norm(x, weights.attention_norm, params.norm_eps))
    attended = attention(normed, weights, params, rotation, cache, start, ops, tap, f"{name}.attention")
    x = tap(f"{name}.attention.residual", x + attended)
    normed = tap(f"{name}.ffn_norm", rms_norm(x, weights.ffn_norm, params.norm_eps))
    return tap(f"{name}.residual", x + swiglu(normed, weights, ops, tap, f"{name}.feed_forward"))


def forward(
    weights: Weights,
    params: Params,
    tokens: Tensor,
    *,
    cache: KVCache | None = None,
    start: int | Tensor = 0,
    logits_at: int | Tensor | None = None,
    ops: Ops = REFERENCE,
    tap: Tap = no_tap,
) -> Tensor:
    """Token ids [..., T] -> logits [..., T, vocab_size] in fp32: how likely each token of the vocabulary comes next.

    cache: the keys and values of earlier tokens; those of `tokens` are written into it. None: `tokens` is all there is.
    start: the position of the first of `tokens`. An int is exact; a tensor, one start per row [...], attends over the
        whole width of the cache (masked), so that shapes stay the same from call to call and rows may differ in length.
        Whether a tensor's tokens fit is not checked: to look at it would stop a captured graph.
    logits_at: None for every position; an index into T, or a tensor [...] of one index (0 or more) per row
        -> [..., vocab_size].
    tap: called at every named point, in order; the computation goes on with the tensor that it returns.

    Raises ValueError where `start` is given without a cache, where the cache is for another batch, or where an int
    `start` leaves the tokens no room in it.
    """
    length = tokens.shape[-1]
    if cache is None and not (isinstance(start, int) and start == 0):
        raise ValueError("start needs the cache that holds the tokens before it")
    if cache is not None and cache.keys[0].shape[:-3] != tokens.shape[:-1]:
        raise ValueError(f"tokens {list(tokens.shape)} do not go with the cache {list(cache.keys[0].shape)}")
    if cache is not None and isinstance(start, int) and not 0 <= start <= cache.max_seq_len - length:
        raise ValueError(f"{length} tokens from position {start} on overrun the {cache.max_seq_len} of the cache")
    rotation = rope_rotation(token_positions(start, length, tokens.device), params)

    x = tap("tok_embeddings", ops.embed(tokens, weights.tok_embeddings))  # [..., T, dim]
    for i, layer_weights in enumerate(weights.layers):
        layer_cache = None if cache is None else (cache.keys[i], cache.values[i])
        x = layer(x, layer_weights, params, rotation, layer_cache, start, ops, tap, f"layers.{i}")
    x = tap("norm", rms_norm(x, weights.norm, params.norm_eps))
    if isinstance(logits_at, int):
        x = x[..., logits_at, :]  # [..., dim]
    elif logits_at is not None:
        rows = logits_at[..., None, None].expand(*logits_at.shape, 1, x.shape[-1])  # [..., 1, dim]
        x = x.gather(-2, rows).squeeze(-2)  # [..., dim]
    return tap("logits", ops.linear(x, weights.output).float())
