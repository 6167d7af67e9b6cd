"""Sampling: from logits to a token id, with temperature, top-k, top-p, min-p and repetition penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

_TINY = 1e-30  # much smaller values become 0 in fp32

NOT_NUMBERS = (
    "the logits are not numbers: the weights are damaged (see download.py --verify), or their dtype is too small for "
    "them"
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. By default it is the most likely one.

    temperature: divides the logits; 0 is greedy.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probabilities reach p. (Holtzman et al. 2020)
    min_p: keep tokens at least min_p times as likely as the most likely one. (Nguyen et al. 2024)
    repetition_penalty: divides positive and multiplies negative logits of tokens seen before. (Keskar et al. 2019)

    They apply in the order penalty, temperature, top-k, top-p, min-p, as in transformers. Raises UserError for a value
    out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        ):
            if not allowed:
                raise UserError(f"should be {expected}, is {getattr(self, name)}", argument=name)


GREEDY = Sampling()


def penalize_repetition(logits: Tensor, seen: Sequence[int] | Tensor, penalty: float) -> Tensor:
    """[..., vocab] -> [..., vocab]: logits that make the tokens `seen`, [N] or [..., N], less likely by `penalty`."""
    ids = torch.as_tensor(seen, dtype=torch.long, device=logits.device).expand(*logits.shape[:-1], -1)
    score = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(score > 0, score / penalty, score * penalty))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """[..., vocab] -> [..., vocab] fp32: the distribution to sample from. The temperature must not be 0."""
    logits = logits.float()
    # subtract the maximum, so that even the smallest temperature does not overflow
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(sampling.temperature, _TINY)
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        probs = torch.zeros_like(probs).scatter(
            -1, order, ordered.masked_fill(mass_before >= max(sampling.top_p, _TINY), 0)
        )
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(dim=-1, keepdim=True), 0)
    return probs / probs.sum(dim=-1, keepdim=True)


def sample(
    logits: Tensor,
    sampling: Sampling = GREEDY,
    seen: Sequence[int] | Tensor = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits [..., vocab] -> token ids [...]. seen: tokens so far, [N] or [..., N], for the repetition penalty."""
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = probabilities(logits, sampling)
    # the method of torch.multinomial, which also checks the probabilities, so that the CPU waits for a GPU
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)


def is_sound(logits: Tensor) -> Tensor:
    """[..., vocab] -> [...] bool: whether no logit is NaN or +inf."""
    return logits.amax(dim=-1) < torch.inf  # amax is NaN if any logit is


def check_sound(are_sound: bool) -> None:
    """Raise UserError unless all logits are sound."""
    if not are_sound:
        raise UserError(NOT_NUMBERS)
