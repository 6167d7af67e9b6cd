"""The tests of test_gpu.py on an NVIDIA GPU with a trained model of 135M parameters, which must be downloaded."""

from __future__ import annotations

import pytest
import torch

from llama3_raw import Model, generate
from llama3_raw.decoding.prompt_lookup import LookupPolicy
from tests.backends.test_gpu import (  # noqa: F401  # pytest finds the tests here, and the fixtures below
    by_graph_and_by_step,
    exact,
    test_a_long_prompt,
    test_fast_operations_are_nearly_as_accurate,
    test_fused_layers_are_nearly_as_accurate,
    test_graphs_give_the_bits_of_steps,
    test_memory_is_constant_over_many_tokens,
    test_quantized,
)
from tests.references import converted

ON = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")


@pytest.fixture(scope="module")
def model(smollm2: Model) -> Model:
    return smollm2._replace(weights=converted(smollm2.weights, lambda tensor: tensor.to(ON, torch.bfloat16)))


@pytest.fixture(scope="module")
def text(smollm2_text: list[int]) -> list[int]:
    return smollm2_text[:310]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "top_p": 0.9}])
def test_the_graph_gives_the_same_tokens(
    model: Model, text: list[int], settings: dict[str, float], compiled: bool
) -> None:
    assert by_graph_and_by_step(model, text[:40], 100, compiled, **settings) >= 10


def test_lookup_gives_the_same_tokens(model: Model, text: list[int]) -> None:
    ids = text[:60] * 2 + text[:30]
    policy = LookupPolicy(15)
    with_lookup = list(generate(model, ids, max_new_tokens=40, lookup=policy))
    without = list(generate(model, ids, max_new_tokens=40))
    assert policy.accepted > 5
    assert with_lookup[:20] == without[:20]
