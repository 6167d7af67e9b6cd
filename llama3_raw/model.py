"""The forward pass of Llama 3, from token ids to logits, as plain functions over plain tensors.

Read it from the small pieces down to `forward`, which puts them together. Shapes: `...` is empty for a single prompt
and [B] for a batch; T is the number of new tokens, S the number of all tokens so far, including the new ones.

Every operation and every cast is that of Meta's code (llama_models/llama3/model.py), bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .ops import Ops, Tap, accumulate_dtype, no_tap, scoped
from .params import Params
from .quantization.matrix import embed, linear
from .weights import LayerWeights, Weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., dim] -> [..., dim]: each row divided by its RMS, times `weight`. (Zhang & Sennrich 2019, eq. 4)"""
    wide = x.to(accumulate_dtype(x.dtype))  # the mean square needs fp32; the cast back comes before the weight
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def token_positions(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Return the positions of `length` new tokens: [T] for an int start, [..., T] for a tensor of one per row."""
    offsets = torch.arange(length, device=device)  # [T]
    return start + offsets if isinstance(start, int) else start.unsqueeze(-1) + offsets


def rope_frequencies(params: Params, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rotation of each pair of a head per position, in radians, [head_dim/2]. (Su et al. 2021, eq. 15)

    Llama 3.1 and later scale the low frequencies down for a longer context. (Meta's apply_scaling)
    """
    exponents = torch.arange(0, params.head_dim, 2, device=device).to(dtype) / params.head_dim  # [head_dim/2]
    frequencies = 1.0 / params.rope_theta**exponents
    scaling = params.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * torch.pi / frequencies  # positions per full turn
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    smooth = (original / wavelengths - low) / (high - low)  # 0 at the long end of the middle band, 1 at the short one
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / scaling.factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def rope_rotation(positions: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """[..., T] -> cos and sin, each [..., T, 1, head_dim/2]: the rotation of every pair at every position."""
    angles = positions.unsqueeze(-1) * rope_frequencies(params, positions.device, dtype)  # [..., T, head_dim/2]
    if angles.device.type == "mps":  # has no complex numbers
        cos, sin = angles.cos(), angles.sin()
    else:  # as Meta does: torch.cos and torch.sin differ from torch.polar in the last bit
        cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same rotation for every head


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., T, heads, head_dim] -> the same shape: each pair of neighbours (0, 1), (2, 3), … rotated in the plane.

    Bit-identical to Meta's complex product if head_dim is a multiple of 16 (as in every Llama); otherwise torch's
    complex kernel rounds the last pairs of a head differently.
    """
    first, second = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # each [..., T, heads, head_dim/2]
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class LayerCache(NamedTuple):
    """The keys and values of one layer, each [..., max_seq_len, n_kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor

    def update(self, k: Tensor, v: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [..., T, n_kv_heads, head_dim] from `start` on; return the keys and values to attend to.

        For an int `start` they are [..., start + T, n_kv_heads, head_dim]; for a tensor, the whole cache (mask it).
        """
        return _updated(self.keys, k, start), _updated(self.values, v, start)


def _updated(cached: Tensor, new: Tensor, start: int | Tensor) -> Tensor:
    length = new.shape[-3]
    if isinstance(start, int):
        cached.narrow(-3, start, length).copy_(new)
        return cached.narrow(-3, 0, start + length)
    positions = token_positions(start, length, new.device).view(-1, length)  # [B, T], B = 1 for a single prompt
    rows = torch.arange(len(positions), device=new.device).unsqueeze(-1)  # [B, 1]
    cached.view(-1, *cached.shape[-3:])[rows, positions] = new.view(-1, *new.shape[-3:])
    return cached


class KVCache(NamedTuple):
    """Keys and values of all tokens so far, per layer [..., max_seq_len, n_kv_heads, head_dim]; updated in place."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def max_seq_len(self) -> int:
        """The number of tokens that fit."""
        return self.keys[0].shape[-3]

    @staticmethod
    def allocate(params: Params, *, max_seq_len: int, like: Weights, batch: tuple[int, ...] = ()) -> KVCache:
        """Allocate a cache like the weights in dtype, device and kv heads. Raises UserError if it does not fit."""

        def empty(layer: LayerWeights) -> Tensor:
            shape = (*batch, max_seq_len, layer.wk.shape[0] // params.head_dim, params.head_dim)
            return layer.attention_norm.new_zeros(shape)  # has the compute dtype, however the matrices are stored

        try:
            return KVCache(tuple(map(empty, like.layers)), tuple(map(empty, like.layers)))
        except RuntimeError as error:  # all that torch raises when the CPU's memory is too small
            size = " x ".join(map(str, (*batch, max_seq_len)))
            message = f"a cache for {size} tokens does not fit into memory; lower {{argument}}"
            raise UserError(message, argument="max_seq_len") from error


def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
    """q [..., T, n_heads, head_dim], keys and values [..., S, n_kv_heads, head_dim] -> [..., T, n_heads, head_dim].

    softmax(q·k / sqrt(head_dim))·v under a causal mask. (Vaswani et al. 2017, eq. 1) n_rep neighbouring query heads
    share a kv head. (Ainslie et al. 2023)
    """
    length, n_heads, head_dim = q.shape[-3:]
    n_rep = n_heads // keys.shape[-2]
    keys = keys.unsqueeze(-2).expand(*keys.shape[:-1], n_rep, head_dim).flatten(-3, -2)  # [..., S, n_heads, head_dim]
    values = values.unsqueeze(-2).expand(*values.shape[:-1], n_rep, head_dim).flatten(-3, -2)
    q, keys, values = q.transpose(-3, -2), keys.transpose(-3, -2), values.transpose(-3, -2)  # [..., n_heads, T or S, …]

    scores = q @ keys.transpose(-2, -1) / math.sqrt(head_dim)  # [..., n_heads, T, S]
    positions = token_positions(start, length, q.device).unsqueeze(-1)  # [..., T, 1]
    future = torch.arange(keys.shape[-2], device=q.device) > positions  # [..., T, S]
    scores = tap("scores", scores.masked_fill(future.unsqueeze(-3), -torch.inf))
    probs = tap("probs", F.softmax(scores.to(accumulate_dtype(q.dtype)), dim=-1).to(q.dtype))
    return (probs @ values).transpose(-3, -2)


REFERENCE = Ops(embed=embed, linear=linear, attend=attend, prefill_chunk=256, has_scores=True)


class Pass(NamedTuple):
    """What is the same in every layer of one forward pass."""

    params: Params
    start: int | Tensor  # the position of the first token
    cos: Tensor  # RoPE rotation, [..., T, 1, head_dim/2] fp32; sin likewise
    sin: Tensor
    ops: Ops


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[..., T, heads * head_dim] -> [..., T, heads, head_dim], a view."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def attention(x: Tensor, weights: LayerWeights, cache: LayerCache | None, at: Pass, tap: Tap) -> Tensor:
    """[..., T, dim] -> [..., T, dim]: grouped-query attention with rotary positions."""
    linear, rotate, size = at.ops.linear, at.ops.rope or rope, at.params.head_dim
    q = tap("q", split_heads(linear(x, weights.wq), size))  # [..., T, n_heads, head_dim]
    k = tap("k", split_heads(linear(x, weights.wk), size))  # [..., T, n_kv_heads, head_dim]
    v = tap("v", split_heads(linear(x, weights.wv), size))  # [..., T, n_kv_heads, head_dim]
    q = tap("q_rope", rotate(q, at.cos, at.sin))
    k = tap("k_rope", rotate(k, at.cos, at.sin))
    if cache is not None:
        k, v = cache.update(k, v, at.start)  # [..., S, n_kv_heads, head_dim]
    heads = tap("heads", at.ops.attend(q, k, v, at.start, tap))  # [..., T, n_heads, head_dim]
    return tap("out", at.ops.reduce(linear(heads.flatten(-2), weights.wo)))


def feed_forward(x: Tensor, weights: LayerWeights, ops: Ops, tap: Tap) -> Tensor:
    """[..., T, dim] -> [..., T, dim]: SwiGLU, w2(silu(w1 x) * w3 x). (Shazeer 2020, eq. 6)"""
    gate = tap("gate", ops.linear(x, weights.w1))  # [..., T, hidden_dim]
    up = tap("up", ops.linear(x, weights.w3))  # [..., T, hidden_dim]
    hidden = tap("hidden", ops.swiglu(gate, up) if ops.swiglu else F.silu(gate) * up)  # [..., T, hidden_dim]
    return tap("out", ops.reduce(ops.linear(hidden, weights.w2)))


def layer(x: Tensor, weights: LayerWeights, cache: LayerCache | None, at: Pass, tap: Tap) -> Tensor:
    """[..., T, dim] -> [..., T, dim]: attention, then feed-forward, each added to the residual stream."""
    norm = at.ops.rms_norm or rms_norm
    normed = tap("attention_norm", norm(x, weights.attention_norm, at.params.norm_eps))
    x = tap("attention.residual", x + attention(normed, weights, cache, at, scoped(tap, "attention.")))
    normed = tap("ffn_norm", norm(x, weights.ffn_norm, at.params.norm_eps))
    return tap("residual", x + feed_forward(normed, weights, at.ops, scoped(tap, "feed_forward.")))


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
    """Compute the logits of the next token [..., T, vocab_size], in fp32 or the weights' fp64, for token ids [..., T].

    Args:
        cache: keys and values of earlier tokens, to which those of `tokens` are added; None if there are none.
        start: the position of the first of `tokens`. An int is exact. A tensor [...], one start per row, attends over
            the whole cache (masked): shapes stay the same from call to call, and rows may differ in length. It is not
            checked, because reading it would break the capture of a CUDA graph.
        logits_at: None for all positions; an index into T, or a tensor [...] of one per row, for [..., vocab_size].
        tap: called at every named point, in order; the computation continues with the tensor that it returns.

    Raises:
        ValueError: there is no cache for `start`, or the tokens do not fit into it, in batch shape or length.
    """
    check_cache(cache, tokens, start)
    tap = scoped(tap, "")  # names a tap that returns no tensor
    dtype = accumulate_dtype(weights.norm.dtype)
    cos, sin = rope_rotation(token_positions(start, tokens.shape[-1], tokens.device), params, dtype)
    at = Pass(params, start, cos, sin, ops)

    x = tap("tok_embeddings", ops.embed(tokens, weights.tok_embeddings))  # [..., T, dim]
    for i, layer_weights in enumerate(weights.layers):
        layer_cache = None if cache is None else LayerCache(cache.keys[i], cache.values[i])
        x = layer(x, layer_weights, layer_cache, at, scoped(tap, f"layers.{i}."))
    x = tap("norm", (ops.rms_norm or rms_norm)(x, weights.norm, params.norm_eps))
    return tap("logits", ops.linear(select(x, logits_at), weights.output).to(dtype))


def select(x: Tensor, at: int | Tensor | None) -> Tensor:
    """[..., T, dim] -> [..., dim] at one position, or at one per row of a batch; None: all positions."""
    if at is None or isinstance(at, int):
        return x if at is None else x[..., at, :]
    rows = at[..., None, None].expand(*at.shape, 1, x.shape[-1])  # [..., 1, dim]
    return x.gather(-2, rows).squeeze(-2)


def check_cache(cache: KVCache | None, tokens: Tensor, start: int | Tensor) -> None:
    """Raise ValueError unless the tokens [..., T] fit into the cache from `start` on."""
    if cache is None and not (isinstance(start, int) and start == 0):
        raise ValueError("start needs a cache that holds the tokens before it")
    if cache is not None and cache.keys[0].shape[:-3] != tokens.shape[:-1]:
        raise ValueError(f"tokens {list(tokens.shape)} do not match the cache {list(cache.keys[0].shape)}")
    if cache is not None and isinstance(start, int) and not 0 <= start <= cache.max_seq_len - tokens.shape[-1]:
        raise ValueError(f"{tokens.shape[-1]} tokens at position {start} overrun the cache of {cache.max_seq_len}")
