"""How far a model's predictions are from another's on the same text: what a quantization costs.

The figures are those of llama.cpp's `llama-perplexity --kl-divergence`, with the same definitions
(tools/perplexity/perplexity.cpp). There the base's log-probabilities are rounded to 16 bits, and those below -16 are
left out of the divergence; here they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..model import KVCache
from ..ops import Ops
from ..perplexity import Kind, check_windows, scored_logits
from ..weights import Model

_ROWS_AT_ONCE = 32  # positions whose log-probabilities are in memory in fp64

PERCENTILES = (0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)


class Divergence(NamedTuple):
    """What each scored token shows; numpy arrays [tokens], in fp64. p is the model's, q the base's probability."""

    nats: np.ndarray  # -log p of the token
    base_nats: np.ndarray  # -log q of the token
    kl: np.ndarray  # the KL divergence of p from q: the sum of q (log q - log p) over the vocabulary, in nats
    p_change: np.ndarray  # p - q of the token
    same_top: np.ndarray  # 1 where the same token is the most likely one, else 0


class Estimate(NamedTuple):
    """A figure, and its standard error."""

    value: float
    error: float


def divergence(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Divergence:
    """Compare two models' logits [n, vocab] for the same positions. targets: the right tokens, [n]."""
    parts = zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in (logits, base_logits, targets)), strict=True)
    return joined([_divergence(*part) for part in parts])


def joined(parts: Sequence[Divergence]) -> Divergence:
    """Return the parts as one."""
    return Divergence(*map(np.concatenate, zip(*parts, strict=True)))


def _divergence(logits: Tensor, base_logits: Tensor, targets: Tensor) -> Divergence:
    logp, logq = logits.double().log_softmax(-1), base_logits.double().log_softmax(-1)
    log_right, base_right = (log.gather(-1, targets[:, None])[:, 0] for log in (logp, logq))
    same = logits.argmax(-1) == base_logits.argmax(-1)
    kl = torch.where(logq > -torch.inf, logq.exp() * (logq - logp), 0.0).sum(-1)
    rows = (-log_right, -base_right, kl, log_right.exp() - base_right.exp(), same.double())
    return Divergence(*(row.cpu().numpy() for row in rows))


def measure(
    models: Sequence[tuple[Model, Ops]],
    ids: Sequence[int],
    *,
    context: int | None = None,
    stride: int | None = None,
    windows: Kind = "sliding",
    progress: bool = False,
) -> Divergence:
    """Return how the first model differs from the second, the base, over a text, in the windows of `perplexity`.

    Raises UserError as `perplexity` does, and for models with different vocabularies.
    """
    (model, _), (base, _) = models
    if model.params.vocab_size != base.params.vocab_size:
        raise UserError(
            f"the models have {model.params.vocab_size} and {base.params.vocab_size} tokens; give one with the same "
            "tokenizer as {argument}",
            argument="compare_to",
        )
    cut = check_windows(model.params, ids, context, stride, windows)
    caches = [KVCache.allocate(m.params, max_seq_len=min(cut.context, len(ids)), like=m.weights) for m, _ in models]
    bos = model.tokenizer.bos_id if model.tokenizer else None
    parts = []
    placed = list(cut.over(len(ids)))
    total = sum(window.end - window.first for window in placed)
    with tqdm(total=total, desc="comparing", unit="token", leave=False, disable=not progress) as bar:
        for window in placed:
            tokens = torch.tensor(cut.tokens(ids, window, bos))
            first = window.first - window.begin
            chunks = (
                scored_logits(m, tokens.to(m.weights.norm.device), first, cache, ops)
                for (m, ops), cache in zip(models, caches, strict=True)
            )
            for (start, logits), (_, base_logits) in zip(*chunks, strict=True):
                targets = tokens[start + 1 : start + 1 + len(logits)].to(logits.device)
                parts.append(divergence(logits, base_logits.to(logits.device), targets))
                bar.update(len(logits))
    return joined(parts)


def mean(values: np.ndarray) -> Estimate:
    """Return the mean and its standard error, sqrt(variance / (n - 1)) with the variance over n."""
    return Estimate(float(values.mean()), math.sqrt(float(values.var()) / max(1, len(values) - 1)))


def figures(found: Divergence) -> dict[str, Estimate]:
    """Return the figures with a standard error, by name. Those of ratio and difference count that both models see the
    same tokens."""
    nats, base, kl, change, same = found
    log_ratio = mean(nats - base)  # its error is that of a difference of two correlated means
    perplexities = [Estimate(math.exp(log.value), math.exp(log.value) * log.error) for log in (mean(nats), mean(base))]
    ours, theirs = perplexities
    difference = mean(ours.value * nats - theirs.value * base).error  # to first order, exp(a) - exp(b)
    square = mean(change**2)
    rms = math.sqrt(square.value)
    return {
        "perplexity": ours,
        "base perplexity": theirs,
        "ln(perplexity / base)": log_ratio,
        "perplexity / base": Estimate(math.exp(log_ratio.value), math.exp(log_ratio.value) * log_ratio.error),
        "perplexity - base": Estimate(ours.value - theirs.value, difference),
        "KL divergence": mean(kl),
        "change of p": mean(change),
        "RMS change of p": Estimate(rms, square.error / (2 * rms) if rms else 0.0),
        "same top token": mean(same),
    }


def correlation(found: Divergence) -> float:
    """Return the correlation of the two models' -log p; 1 for equal ones."""
    centred = [values - values.mean() for values in found[:2]]
    norms = [math.sqrt(float(values @ values)) for values in centred]
    return float(centred[0] @ centred[1]) / (norms[0] * norms[1]) if all(norms) else 1.0


def percentiles(values: np.ndarray) -> dict[float, float]:
    """Return the percentiles of PERCENTILES, interpolated linearly."""
    return dict(zip(PERCENTILES, map(float, np.percentile(values, PERCENTILES)), strict=True))


def table(found: Divergence) -> str:
    """Return the figures as text."""
    lines = [f"tokens scored          {len(found.kl):12,}"]
    for name, (value, error) in figures(found).items():
        is_share = name in ("change of p", "RMS change of p", "same top token")
        shown = f"{100 * value:11.3f} % ± {100 * error:.3f} %" if is_share else f"{value:13.6f} ± {error:.6f}"
        lines.append(f"{name:<22} {shown}")
    lines += [f"{'correlation of -log p':<22} {100 * correlation(found):11.3f} %", ""]
    lines.append("percentile  KL divergence  change of p")
    kl, change = percentiles(found.kl), percentiles(found.p_change)
    lines += [f"{f'{p:g} %':>10}  {kl[p]:13.6f}  {100 * change[p]:9.3f} %" for p in PERCENTILES]
    return "\n".join(lines)


def as_json(found: Divergence) -> dict[str, object]:
    """Return the figures for JSON."""
    return {
        "tokens": len(found.kl),
        **{name: value._asdict() for name, value in figures(found).items()},
        "correlation": correlation(found),
        "KL percentiles": percentiles(found.kl),
        "change of p percentiles": percentiles(found.p_change),
    }
