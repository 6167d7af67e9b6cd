"""Tests on an NVIDIA GPU; skipped if there is none. (The kernels and the graph are tested everywhere.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import REFERENCE, KVCache, Model, Weights, forward, generate
from llama3_raw.backends.choose import suitable_ops
from llama3_raw.backends.cuda_graphs import CudaGraphs
from llama3_raw.decoding.prompt_lookup import LookupPolicy
from llama3_raw.weights import MATRICES, quantized
from tests.references import cast, converted

ON = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "top_p": 0.9}]


@pytest.fixture(scope="module")
def model(smollm2: Model) -> Model:
    """A trained model of 135M parameters in bf16, on the GPU."""
    return smollm2._replace(weights=converted(smollm2.weights, lambda tensor: tensor.to(ON, torch.bfloat16)))


@pytest.fixture(scope="module")
def exact(model: Model) -> Model:
    """The same weights in fp32."""
    return model._replace(weights=cast(model.weights, torch.float32))


def in_pieces(model: Model, ids: Tensor, sizes: list[int], ops: Any) -> Tensor:
    """Return the logits of a text that is computed in pieces of these sizes, and then token by token."""
    cache = KVCache.allocate(model.params, max_seq_len=len(ids), like=model.weights)
    logits, start = [], 0
    with torch.no_grad():
        for piece in ids.split([*sizes, *[1] * (len(ids) - sum(sizes))]):
            logits.append(forward(model.weights, model.params, piece, cache=cache, start=start, ops=ops))
            start += len(piece)
    return torch.cat(logits)


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("sizes", [[300], [100, 150, 16, 9], [280, 1, 7]], ids=str)
def test_fast_operations_are_nearly_as_accurate(
    model: Model, exact: Model, smollm2_text: list[int], sizes: list[int]
) -> None:
    """The error relative to fp32 is at most 1.5 times that of the exact operations in the same dtype."""
    ids = torch.tensor(smollm2_text[:310], device=ON)
    truth = in_pieces(exact, ids, [310], REFERENCE)
    fast = rms(in_pieces(model, ids, sizes, suitable_ops(ON)) - truth)
    assert fast <= 1.5 * rms(in_pieces(model, ids, sizes, REFERENCE) - truth)


def by_graph_and_by_step(model: Model, ids: list[int], count: int, compiled: bool, **settings: Any) -> int:
    """Return the number of equal tokens; where they diverge, the two most likely must be about equally likely."""
    cache = KVCache.allocate(model.params, max_seq_len=len(ids) + count, like=model.weights)
    passes = CudaGraphs.where_possible(model, cache, suitable_ops(ON), compiled)
    assert passes is not None
    by_graph = list(generate(model, ids, max_new_tokens=count, cache=cache, captured=passes, **settings))
    by_step = list(generate(model, ids, max_new_tokens=count, captured=False, **settings))
    same = next((i for i, pair in enumerate(zip(by_graph, by_step, strict=True)) if pair[0] != pair[1]), count)
    if same < count and not settings.get("temperature"):
        tokens = torch.tensor([*ids, *by_graph[:same]], device=ON)
        with torch.no_grad():
            first, second = forward(model.weights, model.params, tokens, logits_at=-1).topk(2).values.tolist()
        assert first - second < 0.25  # twice the rounding of such logits in bf16
    return same


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_graph_gives_the_same_tokens(
    model: Model, smollm2_text: list[int], settings: dict[str, Any], compiled: bool
) -> None:
    assert by_graph_and_by_step(model, smollm2_text[:40], 100, compiled, **settings) >= 10


def test_lookup_gives_the_same_tokens(model: Model, smollm2_text: list[int]) -> None:
    ids = smollm2_text[:60] * 2 + smollm2_text[:30]
    policy = LookupPolicy(15)
    with_lookup = list(generate(model, ids, max_new_tokens=40, lookup=policy))
    without = list(generate(model, ids, max_new_tokens=40))
    assert policy.accepted > 5
    assert with_lookup[:20] == without[:20]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized(model: Model, exact: Model, smollm2_text: list[int], name: str) -> None:
    """The kernel and torch's product with the dequantized matrix are equal, up to rounding."""
    weights = all_quantized(model.weights, name)
    ids = torch.tensor(smollm2_text[:60], device=ON)
    truth = in_pieces(exact._replace(weights=all_quantized(exact.weights, name)), ids, [60], REFERENCE)
    fast = rms(in_pieces(model._replace(weights=weights), ids, [40, 10], suitable_ops(ON)) - truth)
    reference = rms(in_pieces(model._replace(weights=weights), ids, [40, 10], REFERENCE) - truth)
    assert fast <= 1.5 * reference


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_graph_of_a_quantized_model(model: Model, smollm2_text: list[int], name: str) -> None:
    of_few_bits = model._replace(weights=all_quantized(model.weights, name))
    assert by_graph_and_by_step(of_few_bits, smollm2_text[:40], 40, compiled=True) >= 10


def all_quantized(weights: Weights, name: str) -> Weights:
    def of(matrices: Any, field: str) -> Any:
        return quantized(getattr(matrices, field), field, name)

    fields = [field for field in MATRICES if field != "output"]
    layers = tuple(layer._replace(**{field: of(layer, field) for field in fields}) for layer in weights.layers)
    return weights._replace(layers=layers, output=of(weights, "output"))


def test_a_long_prompt(model: Model, exact: Model, smollm2_text: list[int]) -> None:
    """8,192 tokens in chunks of 1,024: still close to fp32, and never with all scores in memory."""
    longer = model._replace(params=model.params.__class__(**{**vars(model.params), "max_seq_len": 8192}))
    ids = torch.tensor((smollm2_text * 8)[:8192], device=ON)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = KVCache.allocate(longer.params, max_seq_len=8192, like=longer.weights)
    held = torch.cuda.memory_allocated() - before
    last: dict[str, Tensor] = {}
    chunks: dict[str, Callable[[], Any]] = {"fast": lambda: suitable_ops(ON), "reference": lambda: REFERENCE}
    with torch.no_grad():
        for name, ops in chunks.items():
            for start in range(0, 8192, 1024):
                piece = ids[start : start + 1024]
                last[name] = forward(
                    longer.weights, longer.params, piece, cache=cache, start=start, logits_at=-1, ops=ops()
                )
            if name == "fast":
                peak = torch.cuda.max_memory_allocated() - before - held
        truth = forward(exact.weights, longer.params, ids, logits_at=-1, ops=suitable_ops(ON))
    assert rms(last["fast"] - truth) <= 1.5 * rms(last["reference"] - truth)
    assert peak < 9 * 1024 * 8192 * 2 / 2  # bytes: half of what a chunk's scores alone would need in bf16


def test_memory_is_constant_over_many_tokens(model: Model, smollm2_text: list[int]) -> None:
    cache = KVCache.allocate(model.params, max_seq_len=520, like=model.weights)
    passes = CudaGraphs.where_possible(model, cache, suitable_ops(ON))
    assert passes is not None
    used = []
    for _ in range(21):  # 10,500 tokens
        tokens = generate(model, smollm2_text[:20], max_new_tokens=500, stop_ids=(), cache=cache, captured=passes)
        assert sum(1 for _ in tokens) == 500
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1]
