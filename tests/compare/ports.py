"""Two ports of Llama, written without this package, to be compared with it: in NumPy, and as modules in PyTorch.

Each takes the weights by Meta's names and a set of bugs, and returns its tensors under its own names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = Any  # np.ndarray, whose operators have no types


def numpy_port(
    weights: Mapping[str, Array], params: Any, ids: Sequence[int], bugs: Collection[str] = (), dtype: type = np.float32
) -> dict[str, Array]:
    """Return the tensors of a pass by tap name, heads before positions from RoPE on."""
    seen: dict[str, Array] = {}
    eps = {"eps 1e-6": 1e-6, "no eps": 0.0}.get(next((bug for bug in bugs if "eps" in bug), ""), params.norm_eps)

    def w(name: str) -> Array:
        return weights[f"{name}.weight"].astype(dtype)

    def norm(x: Array, name: str) -> Array:
        mean_square = x.mean(-1, keepdims=True) ** 2 if "mean, then square" in bugs else (x * x).mean(-1, keepdims=True)
        return (x / np.sqrt(mean_square + dtype(eps)) * w(name)).astype(dtype)

    def angles() -> Array:
        half = params.head_dim // 2
        f = 1.0 / params.rope_theta ** (np.arange(half) / half)
        scaling = params.rope_scaling
        if scaling is not None:
            factor = 8.0 if "RoPE factor 8" in bugs else scaling.factor
            turns = scaling.original_max_seq_len * f / (2 * np.pi)  # over the original context
            share = np.clip(
                (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1
            )
            f = f * share + f / factor * (1 - share)
        first = 1 if "positions from 1" in bugs else 0
        return np.outer(np.arange(first, first + len(ids)), f)

    def rotate(x: Array) -> Array:  # [heads, T, head_dim]
        turned = x.copy()
        cos, sin = np.cos(angles()).astype(dtype), np.sin(angles()).astype(dtype)
        turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        turned[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return turned

    def heads(x: Array, n: int) -> Array:  # [T, n * head_dim] -> [n, T, head_dim]
        return x.reshape(len(ids), n, params.head_dim).swapaxes(0, 1)

    x = seen["tok_embeddings"] = w("tok_embeddings")[list(ids)]
    for i in range(params.n_layers):
        at = f"layers.{i}."
        h = seen[at + "attention_norm"] = norm(x, at + "attention_norm")
        q, k, v = (seen.setdefault(f"{at}attention.{which}", h @ w(f"{at}attention.w{which}").T) for which in "qkv")
        q = seen[at + "attention.q_rope"] = rotate(heads(q, params.n_heads))
        k = seen[at + "attention.k_rope"] = rotate(heads(k, params.n_kv_heads))
        times = params.n_heads // params.n_kv_heads
        k, v = (np.repeat(heads_of, times, 0) for heads_of in (k, heads(v, params.n_kv_heads)))
        scale = params.head_dim if "no square root" in bugs else math.sqrt(params.head_dim)
        scores = seen[at + "attention.scores"] = q @ k.swapaxes(1, 2) / dtype(scale)
        future = np.triu(np.ones((len(ids), len(ids)), bool), 2 if "sees ahead" in bugs else 1)
        scores = scores if "no mask" in bugs else np.where(future, dtype(-1e30), scores)
        over = 0 if "softmax over heads" in bugs else -1
        e = np.exp(scores - scores.max(over, keepdims=True))
        probs = seen[at + "attention.probs"] = e / e.sum(over, keepdims=True)
        mixed = seen[at + "attention.heads"] = (probs @ v).swapaxes(0, 1)
        out = seen[at + "attention.out"] = mixed.reshape(len(ids), -1) @ w(at + "attention.wo").T
        x = seen[at + "attention.residual"] = (h if "adds the norm" in bugs else x) + out
        h = seen[at + "ffn_norm"] = norm(x, at + "ffn_norm")
        gate = seen[at + "feed_forward.gate"] = h @ w(at + "feed_forward.w1").T
        up = seen[at + "feed_forward.up"] = h @ w(at + "feed_forward.w3").T
        silu = _gelu(gate) if "gelu" in bugs else gate / (1 + np.exp(-gate))
        hidden = seen[at + "feed_forward.hidden"] = silu * up
        out = seen[at + "feed_forward.out"] = hidden @ w(at + "feed_forward.w2").T
        x = seen[at + "residual"] = x + out
    x = seen["norm"] = norm(x, "norm")
    seen["logits"] = x @ w("output" if "output.weight" in weights else "tok_embeddings").T
    return {name: np.ascontiguousarray(array, dtype) for name, array in seen.items()}


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class _Norm(nn.Module):
    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _Linear(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class _Attention(nn.Module):
    def __init__(self, weights: Mapping[str, Tensor], at: str, params: Any, bugs: Collection[str]):
        super().__init__()
        self.params, self.bugs = params, bugs

        def halves(weight: Tensor) -> Tensor:  # as Hugging Face stores q and k
            heads = weight.view(-1, params.head_dim // 2, 2, params.dim)
            return heads.transpose(1, 2).reshape(weight.shape).contiguous()

        self.q_proj, self.k_proj = (_Linear(halves(weights[f"{at}attention.w{which}.weight"])) for which in "qk")
        self.v_proj, self.o_proj = (_Linear(weights[f"{at}attention.w{which}.weight"]) for which in "vo")

    def forward(self, x: Tensor, cache: list[Tensor], start: int) -> Tensor:
        p, batch, length = self.params, *x.shape[:2]
        q, k, v = (
            layer(x).view(batch, length, -1, p.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = torch.outer(
            torch.arange(start, start + length).float(),
            1.0 / p.rope_theta ** (torch.arange(0, p.head_dim, 2).float() / p.head_dim),
        ).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cos + torch.cat((-b, a), -1) * sin

        q = rotate(q)
        k = k if "k without RoPE" in self.bugs else rotate(k)
        if cache:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        if "stale cache" not in self.bugs or not cache:
            cache[:] = [k, v]
        times = p.n_heads // p.n_kv_heads
        if "kv heads in turn" in self.bugs:
            keys, values = (t.repeat(1, times, 1, 1) for t in (k, v))
        else:
            keys, values = (t.repeat_interleave(times, 1) for t in (k, v))
        scores = q @ keys.transpose(2, 3) / math.sqrt(p.head_dim)
        ahead = torch.arange(k.shape[2]) > torch.arange(start, start + length)[:, None]
        probs = (scores + torch.where(ahead, torch.finfo(scores.dtype).min, 0.0)).softmax(-1, dtype=torch.float32)
        if "normalised queries" in self.bugs:
            probs = probs.transpose(2, 3)
        mixed = (probs.to(x.dtype) @ values).transpose(1, 2).reshape(batch, length, -1)
        out: Tensor = self.o_proj(mixed)
        return out


class _MLP(nn.Module):
    def __init__(self, weights: Mapping[str, Tensor], at: str, bugs: Collection[str]):
        super().__init__()
        self.bugs = bugs
        self.gate_proj, self.down_proj, self.up_proj = (
            _Linear(weights[f"{at}feed_forward.w{n}.weight"]) for n in (1, 2, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        act = nn.functional.silu(gate) if "silu of up" not in self.bugs else gate
        out: Tensor = self.down_proj(act * (nn.functional.silu(up) if "silu of up" in self.bugs else up))
        return out


class _Layer(nn.Module):
    def __init__(self, weights: Mapping[str, Tensor], i: int, params: Any, bugs: Collection[str]):
        super().__init__()
        at = f"layers.{i}."
        self.input_layernorm = _Norm(weights[at + "attention_norm.weight"], params.norm_eps)
        self.self_attn = _Attention(weights, at, params, bugs)
        self.post_attention_layernorm = _Norm(weights[at + "ffn_norm.weight"], params.norm_eps)
        self.mlp = _MLP(weights, at, bugs)

    def forward(self, x: Tensor, cache: list[Tensor], start: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, start)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Body(nn.Module):
    def __init__(self, weights: Mapping[str, Tensor], params: Any, bugs: Collection[str]):
        super().__init__()
        self.bugs = bugs
        self.embed_tokens = nn.Embedding.from_pretrained(weights["tok_embeddings.weight"], freeze=False)
        self.layers = nn.ModuleList(_Layer(weights, i, params, bugs) for i in range(params.n_layers))
        self.norm = _Norm(weights["norm.weight"], params.norm_eps)

    def forward(self, ids: Tensor, caches: list[list[Tensor]], start: int) -> Tensor:
        x = self.embed_tokens(ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, start)
        out: Tensor = x if "no final norm" in self.bugs else self.norm(x)
        return out


class TorchPort(nn.Module):
    """A student's port with Hugging Face's names and order of q and k."""

    def __init__(self, weights: Mapping[str, Tensor], params: Any, bugs: Collection[str] = ()):
        super().__init__()
        self.model = _Body(weights, params, bugs)
        self.lm_head = _Linear(weights.get("output.weight", weights["tok_embeddings.weight"]))
        self.bugs = bugs
        self.caches: list[list[Tensor]] = [[] for _ in range(params.n_layers)]

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        if not start:
            self.caches = [[] for _ in self.caches]
        logits: Tensor = self.lm_head(self.model(ids, self.caches, start))
        return logits

    def outputs(self, ids: Sequence[int], start: int = 0) -> dict[str, Tensor]:
        """Return the output of every module, as forward hooks see it, by the module's name."""
        seen: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.detach()}))
            for name, module in self.named_modules()
            if name
        ]
        with torch.no_grad():
            seen["lm_head"] = self(torch.tensor([list(ids)]), start)
        for hook in hooks:
            hook.remove()
        return seen
