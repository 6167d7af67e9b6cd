"""Sampled frequencies against exact probabilities, computed by hand from the definition of each setting."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from llama3_raw import UserError
from llama3_raw.decoding.sampling import Sampling, penalize_repetition, probabilities, sample

PROBS = torch.tensor([0.4, 0.05, 0.25, 0.2, 0.1])
LOGITS = PROBS.log() + 3.0  # the constant must not matter


def renormalised(*kept: float) -> Tensor:
    return torch.tensor(kept) / sum(kept)


CASES = [
    (Sampling(1.0), PROBS),
    (Sampling(0.5), PROBS**2 / (PROBS**2).sum()),
    (Sampling(2.0), PROBS**0.5 / (PROBS**0.5).sum()),
    (Sampling(1.0, top_k=2), renormalised(0.4, 0, 0.25, 0, 0)),
    (Sampling(1.0, top_k=99), PROBS),
    (Sampling(1.0, top_p=0.5), renormalised(0.4, 0, 0.25, 0, 0)),
    (Sampling(1.0, top_p=0.3), renormalised(0.4, 0, 0, 0, 0)),
    (Sampling(1.0, top_p=0.7), renormalised(0.4, 0, 0.25, 0.2, 0)),
    (Sampling(1.0, min_p=0.3), renormalised(0.4, 0, 0.25, 0.2, 0)),
    (Sampling(1.0, min_p=1.0), renormalised(0.4, 0, 0, 0, 0)),
    # top-k first, then top-p of what is left: 0.4 / 0.85 is below 0.5, so a second token is needed
    (Sampling(1.0, top_k=3, top_p=0.5), renormalised(0.4, 0, 0.25, 0, 0)),
    (Sampling(1.0, top_k=4, min_p=0.5), renormalised(0.4, 0, 0.25, 0.2, 0)),
]


@pytest.mark.parametrize(("sampling", "expected"), CASES, ids=[str(case[0]) for case in CASES])
def test_distribution(sampling: Sampling, expected: Tensor) -> None:
    torch.testing.assert_close(probabilities(LOGITS, sampling), expected)
    draws = 20_000
    ids = sample(LOGITS.expand(draws, -1), sampling, generator=torch.Generator().manual_seed(1))
    frequencies = ids.bincount(minlength=5) / draws
    assert (frequencies[expected == 0] == 0).all()
    # five standard deviations of a binomial share
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_filters_apply_in_the_order_of_transformers() -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(2)) * 3
    seen = torch.randint(200, (3, 20), generator=torch.Generator().manual_seed(3))
    sampling = Sampling(0.7, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(50),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )(cast(torch.LongTensor, seen), cast(torch.FloatTensor, logits))
    ours = probabilities(penalize_repetition(logits, seen, 1.3), sampling)
    torch.testing.assert_close(ours, theirs.softmax(-1))


def test_the_smallest_temperature_is_greedy() -> None:
    for tiny in (1e-45, 1e-300):
        assert probabilities(LOGITS, Sampling(tiny)).tolist() == [1, 0, 0, 0, 0]
        assert probabilities(LOGITS, Sampling(1, top_p=tiny)).tolist() == [1, 0, 0, 0, 0]


def test_top_k_keeps_k_of_equal_logits() -> None:
    assert int((probabilities(torch.ones(2, 9), Sampling(1.0, top_k=3)) > 0).sum()) == 6


def test_greedy_is_the_default() -> None:
    assert sample(LOGITS) == 0
    assert sample(LOGITS.view(1, 5)).tolist() == [0]


def test_repetition_penalty() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    assert penalize_repetition(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0, 0.5]
    assert sample(logits, Sampling(repetition_penalty=3.0), seen=[0]) == 2
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5]


def test_seeds_reproduce() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(sample(LOGITS, Sampling(1.0), generator=generator)) for _ in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("setting", "argument"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": 101.0}, "repetition_penalty"),
    ],
)
def test_out_of_range(setting: dict[str, float], argument: str) -> None:
    with pytest.raises(UserError, match=f"^{argument} should be") as error:
        Sampling(**setting)  # type: ignore[arg-type]
    assert error.value.argument == argument
