"""Circuits from weights: beside full matrices and the scores of a pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llama3_raw import (
    KVCache,
    Model,
    Trace,
    UserError,
    attention_at,
    by_head,
    composition,
    fold_norms,
    forward,
    induction_scores,
    ov_circuits,
    qk_circuits,
    repeated_tokens,
    trace,
)
from tests.references import cast, dequantized_weights, quantized_weights
from tests.tracing.small import HEADS, IDS, KV_HEADS, LAYERS, close, small_model


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


def test_matrices_of_heads_are_views(model: Model) -> None:
    kept = trace(model, IDS)
    for i, (heads, layer) in enumerate(zip(by_head(model.weights, model.params), model.weights.layers, strict=True)):
        x, values = kept[f"layers.{i}.attention_norm"], kept[f"layers.{i}.attention.heads"]
        for name, matrix, stored in (("q", heads.wq, layer.wq), ("k", heads.wk, layer.wk), ("v", heads.wv, layer.wv)):
            close(torch.einsum("td,hed->the", x, matrix), kept[f"layers.{i}.attention.{name}"])
            assert matrix.data_ptr() == stored.data_ptr()
        close(torch.einsum("the,hde->td", values, heads.wo), kept[f"layers.{i}.attention.out"])
        assert heads.wo.data_ptr() == layer.wo.data_ptr()


def test_repeated_kv_heads_are_those_of_the_query_heads(model: Model) -> None:
    for few, repeated in zip(
        by_head(model.weights, model.params), by_head(model.weights, model.params, repeat_kv=True), strict=True
    ):
        assert len(few.wk) == len(KV_HEADS)
        for head in HEADS:
            assert torch.equal(repeated.wk[head], few.wk[head // 2])
            assert torch.equal(repeated.wv[head], few.wv[head // 2])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_matrices_are_dequantized(model: Model, quantize: str) -> None:
    weights = quantized_weights(model.weights, quantize)
    expected = dequantized_weights(weights)
    for found, heads in zip(by_head(weights, model.params), by_head(expected, model.params), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, heads, strict=True))
    folded = fold_norms(weights)
    tokens = torch.tensor(IDS)
    close(forward(folded, model.params, tokens), forward(weights, model.params, tokens))


@pytest.mark.parametrize("tied", [False, True])
def test_folded_norms_leave_the_logits(model: Model, tied: bool) -> None:
    weights = model.weights._replace(output=model.weights.tok_embeddings) if tied else model.weights
    before = [tensor.clone() for layer in weights.layers for tensor in layer]
    folded = fold_norms(weights)
    tokens = torch.tensor(IDS)
    close(forward(folded, model.params, tokens), forward(weights, model.params, tokens))
    ones = [folded.norm, *(norm for layer in folded.layers for norm in (layer.attention_norm, layer.ffn_norm))]
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in ones)
    assert folded.tok_embeddings is weights.tok_embeddings
    assert folded.output is not weights.output
    after = [tensor for layer in weights.layers for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    rounded = small_model(torch.bfloat16)
    assert fold_norms(rounded.weights).layers[0].w1.dtype == torch.bfloat16


def test_qk_circuits_give_the_scores_at_each_distance(model: Model) -> None:
    kept = trace(model, IDS)
    for distance in (0, 1, 4):
        circuits = qk_circuits(model.weights, model.params, distance=distance)
        for i in LAYERS:
            x = kept[f"layers.{i}.attention_norm"]
            found = torch.einsum("td,hde,te->ht", x[distance:], circuits[i].matrix(), x[: len(IDS) - distance])
            scores = kept[f"layers.{i}.attention.scores"].diagonal(-distance, -2, -1)
            close(found / math.sqrt(model.params.head_dim), scores)


def test_ov_circuits_move_what_is_attended_to(model: Model) -> None:
    kept = trace(model, IDS)
    for i, circuit in enumerate(ov_circuits(model.weights, model.params)):
        x, probs = kept[f"layers.{i}.attention_norm"], kept[f"layers.{i}.attention.probs"]
        close(torch.einsum("hts,hde,se->td", probs, circuit.matrix(), x), kept[f"layers.{i}.attention.out"])


def test_a_circuit_is_its_full_matrix(model: Model) -> None:
    for circuit in (ov_circuits(model.weights, model.params)[1], qk_circuits(model.weights, model.params)[2]):
        full = circuit.matrix()
        close(circuit.norm(), torch.linalg.matrix_norm(full))
        close(circuit.singular_values(), torch.linalg.svdvals(full)[:, : model.params.head_dim])
        found, expected = (
            values.gather(-1, values.abs().argsort(descending=True)).abs()[:, : model.params.head_dim]
            for values in (circuit.eigenvalues(), torch.linalg.eigvals(full))
        )
        close(found, expected, tolerance=1e-4)


def test_float64_stays(model: Model) -> None:
    wide = model._replace(weights=cast(model.weights, torch.float64))
    weights, params = wide.weights, wide.params
    exact = trace(wide, IDS)
    folded = forward(fold_norms(weights), params, torch.tensor(IDS))
    torch.testing.assert_close(folded, exact["logits"], rtol=0, atol=1e-12)
    circuits = qk_circuits(weights, params, distance=3)
    x = exact["layers.1.attention_norm"]
    found = torch.einsum("td,hde,te->ht", x[3:], circuits[1].matrix(), x[:-3]) / math.sqrt(params.head_dim)
    scores = exact["layers.1.attention.scores"].diagonal(-3, -2, -1)
    torch.testing.assert_close(found, scores, rtol=0, atol=1e-12)
    for values in (circuits[0].norm(), circuits[0].singular_values(), circuits[0].eigenvalues().real):
        assert values.dtype == torch.float64
    assert composition(weights, params, "V").dtype == attention_at(exact, 1).dtype == torch.float64
    assert induction_scores(wide, length=5, repeats=1).dtype == torch.float64


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_is_the_ratio_of_the_full_matrices(model: Model, kind: Any) -> None:
    found = composition(model.weights, model.params, kind)
    ov, qk = (
        torch.stack([circuit.matrix().double() for circuit in circuits(model.weights, model.params)])
        for circuits in (ov_circuits, qk_circuits)
    )
    read = {"Q": qk.mT, "K": qk, "V": ov}[kind]
    expected = torch.zeros(found.shape, dtype=torch.float64)
    for first, later in ((0, 1), (0, 2), (1, 2)):
        for a in HEADS:
            for b in HEADS:
                product, w, m = read[later, b] @ ov[first, a], ov[first, a], read[later, b]
                expected[first, a, later, b] = product.norm() / (m.norm() * w.norm())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    assert found[found > 0].std() > 0.005


def test_another_kind_of_composition_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="kind should be 'Q', 'K' or 'V', is 'O'"):
        composition(model.weights, model.params, "O")  # type: ignore[arg-type]


def test_attention_at_a_distance(model: Model) -> None:
    kept = trace(model, IDS, "*.probs")
    found = attention_at(kept, 2)
    for i in LAYERS:
        probs = kept[f"layers.{i}.attention.probs"]
        for head in HEADS:
            expected = sum(float(probs[head, t, t - 2]) for t in range(2, len(IDS))) / (len(IDS) - 2)
            assert float(found[i, head]) == pytest.approx(expected, rel=1e-5)
    late = attention_at(kept, 2, start=5)
    assert float(late[0, 1]) == pytest.approx(float(kept["layers.0.attention.probs"][1, 5, 3]))
    for wrong in ({"distance": 6}, {"distance": -1}, {"distance": 2, "start": 1}):
        with pytest.raises(UserError, match=r"distance -?\d is too far for a prompt of 6 tokens"):
            attention_at(kept, **wrong)
    refused: Any
    of_later_tokens = Trace("*.probs")
    cache = KVCache.allocate(model.params, max_seq_len=len(IDS), like=model.weights)
    with torch.no_grad():
        forward(model.weights, model.params, torch.tensor(IDS[:2]), cache=cache)
        forward(model.weights, model.params, torch.tensor(IDS[2:]), cache=cache, start=2, tap=of_later_tokens)
    for refused in ({}, trace(model, IDS, "*.probs", last_position=True), of_later_tokens):
        with pytest.raises(UserError, match=r"trace '\*\.probs'"):
            attention_at(refused, 1)


@pytest.mark.parametrize("settings", [{}, {"start": 3}])
def test_attention_in_a_batch_is_the_mean_of_its_prompts(model: Model, settings: dict[str, int]) -> None:
    prompts = [IDS, IDS[:4], IDS[1:]]
    alone = torch.stack([attention_at(trace(model, ids, "*.probs"), 1, **settings) for ids in prompts])
    close(attention_at(trace(model, prompts, "*.probs"), 1, **settings), alone.mean(0))
    with pytest.raises(UserError, match="distance 4 is too far for a prompt of 4 tokens"):
        attention_at(trace(model, prompts, "*.probs"), 4)


def test_repeated_tokens_are_ordinary_and_repeat(tiny: Model, model: Model) -> None:
    assert tiny.tokenizer is not None
    ids = repeated_tokens(tiny, 20, seed=1)
    assert ids[0] == tiny.tokenizer.bos_id
    assert len(ids) == 41
    assert ids[1:21] == ids[21:]
    assert max(ids[1:]) < min(tiny.tokenizer.special_tokens.values())
    assert ids != repeated_tokens(tiny, 20, seed=2)
    assert len(repeated_tokens(model, 20)) == 40  # without a tokenizer there is no begin-of-text


def test_induction_scores_are_those_of_the_prompts(model: Model) -> None:
    expected = []
    for seed in (3, 4):
        ids = repeated_tokens(model, 9, seed=seed)
        probs = torch.stack(list(trace(model, ids, "*.probs").values()))  # [layers, heads, T, T]
        expected.append(torch.stack([probs[..., t, t - 8] for t in range(9, 18)]).mean(0))
        assert all(ids[t - 8] == ids[(t + 1) % 9] for t in range(9, 17))  # the token after the first occurrence
    close(induction_scores(model, length=9, repeats=2, seed=3), torch.stack(expected).mean(0))


@pytest.mark.parametrize("name", ["length", "repeats"])
def test_too_few_random_tokens_are_refused(model: Model, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} 0: should be 1 or more"):
        induction_scores(model, **{name: 0})


@pytest.mark.slow
def test_smollm2_has_induction_heads(smollm2: Model) -> None:
    scores = induction_scores(smollm2, length=30, repeats=1)
    assert float(scores.max()) > 0.8
    assert float(scores.median()) < 0.05
