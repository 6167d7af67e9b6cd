"""Direct logit attribution: its sums are the model's own logits, its parts those of a product by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama3_raw import Model, Trace, UserError, attribute, forward, head_results, logit_direction, trace
from tests.references import cast, dequantized_weights, quantized_weights
from tests.tracing.small import ANSWER, CLEAN, HEADS, IDS, LAYERS, OTHER, close, small_model


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def kept(model: Model) -> Trace:
    return trace(model, IDS)


@pytest.mark.parametrize("position", [-1, 0, 3])
def test_the_sum_is_the_logit(model: Model, kept: Trace, position: int) -> None:
    logits = kept["logits"][position]
    by_part, by_head = attribute(kept, model, (ANSWER, OTHER), position)
    assert float(by_part.sum()) == pytest.approx(float(logits[ANSWER] - logits[OTHER]), abs=1e-5)
    assert float(attribute(kept, model, ANSWER, position).by_part.sum()) == pytest.approx(
        float(logits[ANSWER]), abs=1e-5
    )
    assert by_head.shape == (len(LAYERS), len(HEADS))
    close(by_head.sum(-1), by_part[1::2])


def test_the_parts_are_those_of_the_names(model: Model, kept: Trace) -> None:
    found = attribute(kept, model, logit_direction(model, ANSWER, OTHER))
    assert found.names[:3] == ["tok_embeddings", "layers.0.attention.out", "layers.0.feed_forward.out"]
    assert len(found.names) == 7
    weights, stream = model.weights, kept["layers.2.residual"][-1]
    rms = (stream.square().mean() + model.params.norm_eps).sqrt()
    for name, value in zip(found.names, found.by_part, strict=True):
        logits = weights.output @ (kept[name][-1] / rms * weights.norm)
        torch.testing.assert_close(value, logits[ANSWER] - logits[OTHER], rtol=0, atol=1e-5)


def test_a_batch_and_the_last_position(model: Model, kept: Trace) -> None:
    several = Trace("tok_embeddings", "*.heads", "*.out")
    with torch.no_grad():
        forward(model.weights, model.params, torch.tensor([CLEAN, IDS]), tap=several)
    found, expected = attribute(several, model, (ANSWER, OTHER), 2), attribute(kept, model, (ANSWER, OTHER), 2)
    assert found.by_part.shape == (2, 7)
    close(found.by_part[1], expected.by_part)
    close(found.by_head[1], expected.by_head)
    last = trace(model, IDS, "tok_embeddings", "*.heads", "*.out", last_position=True)
    close(attribute(last, model, ANSWER).by_head, attribute(kept, model, ANSWER).by_head)


def test_the_last_position_of_each_prompt_of_a_padded_batch(model: Model) -> None:
    prompts = [CLEAN[:4], IDS]
    padded = trace(model, prompts, "tok_embeddings", "*.heads", "*.out", "logits")
    for position in (-1, -2, 1):
        by_part, by_head = attribute(padded, model, (ANSWER, OTHER), position)
        for row, prompt in enumerate(prompts):
            one = attribute(trace(model, prompt), model, (ANSWER, OTHER), position)
            close(by_part[row], one.by_part)
            close(by_head[row], one.by_head)
    for position in (4, -5):  # of the first prompt, that is padding, or before its first token
        with pytest.raises(UserError, match=f"position {position} is not in a prompt of 4 tokens"):
            attribute(padded, model, ANSWER, position)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights(model: Model, quantize: str) -> None:
    weights = quantized_weights(model.weights, quantize)
    quantized, dense = model._replace(weights=weights), model._replace(weights=dequantized_weights(weights))
    kept = trace(quantized, IDS)
    found = attribute(kept, quantized, (99, OTHER))
    assert float(found.by_part.sum()) == pytest.approx(
        float(kept["logits"][-1, 99] - kept["logits"][-1, OTHER]), abs=1e-4
    )
    close(found.by_head, attribute(kept, dense, (99, OTHER)).by_head)


def test_in_bf16_the_sum_is_the_logit_up_to_rounding() -> None:
    model = small_model(torch.bfloat16)
    kept = trace(model, IDS)
    found = attribute(kept, model, (ANSWER, OTHER))
    assert found.by_part.dtype == torch.float32
    difference = kept["logits"][-1, ANSWER] - kept["logits"][-1, OTHER]
    assert float(found.by_part.sum()) == pytest.approx(float(difference), abs=0.03)


def test_results_of_heads_sum_to_the_output_of_attention(model: Model, kept: Trace) -> None:
    results = head_results(kept, model, 1)  # [T, n_heads, dim]
    assert results.shape == (len(IDS), len(HEADS), model.params.dim)
    close(results.sum(-2), kept["layers.1.attention.out"])
    without = kept["layers.1.attention.heads"].clone()
    without[:, 2] = 0
    close(results.sum(-2) - results[:, 2], without.flatten(-2) @ model.weights.layers[1].wo.mT)


@pytest.mark.parametrize(
    "direction", [(ANSWER, OTHER), [ANSWER, OTHER], torch.tensor([ANSWER, OTHER]), (torch.tensor(ANSWER), OTHER)]
)
def test_two_tokens(model: Model, kept: Trace, direction: Any) -> None:
    expected = attribute(kept, model, logit_direction(model, ANSWER, OTHER))
    assert torch.equal(attribute(kept, model, direction).by_part, expected.by_part)


def test_a_token_may_be_in_a_tensor(model: Model, kept: Trace) -> None:
    best = kept["logits"][-1].argmax()
    found = attribute(kept, model, best)
    assert float(found.by_part.sum()) == pytest.approx(float(kept["logits"][-1].max()), abs=1e-5)
    assert torch.equal(found.by_part, attribute(kept, model, (int(best),)).by_part)


def test_float64_stays(model: Model) -> None:
    model = model._replace(weights=cast(model.weights, torch.float64))
    kept = trace(model, IDS)
    found = attribute(kept, model, (ANSWER, OTHER))
    assert found.by_part.dtype == found.by_head.dtype == logit_direction(model, ANSWER).dtype == torch.float64
    difference = kept["logits"][-1, ANSWER] - kept["logits"][-1, OTHER]
    assert float(found.by_part.sum()) == pytest.approx(float(difference), abs=1e-12)


@pytest.mark.parametrize(
    ("direction", "got"),
    [
        ((1, 2, 3), r"\(1, 2, 3\)"),
        ((), r"\(\)"),
        (" cat", "' cat'"),
        (1.5, r"1\.5"),
        (None, "None"),
        (torch.tensor(1.5), r"\[\]"),
        (torch.ones(64).long(), r"\[64\]"),
    ],
)
def test_no_direction(model: Model, kept: Trace, direction: Any, got: str) -> None:
    with pytest.raises(UserError, match=rf"direction should be a token, two tokens, or \[64\]; is {got}"):
        attribute(kept, model, direction)


@pytest.mark.parametrize("token", [" cat", 1.5, (1, 2), torch.zeros(64)])
def test_no_token(model: Model, token: Any) -> None:
    with pytest.raises(UserError, match=r"token should be the id of a token, such as tokenizer\.encode returns, is"):
        logit_direction(model, token)


def test_what_cannot_be_attributed_is_refused(model: Model, kept: Trace) -> None:
    with pytest.raises(UserError, match=r"the trace lacks 'layers\.0\.attention\.out'"):
        attribute(trace(model, IDS, "tok_embeddings", "*.heads"), model, ANSWER)
    with pytest.raises(UserError, match="position 6 is not in a prompt of 6 tokens"):
        attribute(kept, model, ANSWER, 6)
    with pytest.raises(UserError, match=r"direction should be a token, two tokens, or \[64\]; is \[3\]"):
        attribute(kept, model, torch.zeros(3))
    with pytest.raises(UserError, match="token id 100 is outside"):
        attribute(kept, model, (ANSWER, 100))
    with pytest.raises(UserError, match=r"the trace lacks 'layers\.7\.attention\.heads'"):
        head_results(kept, model, 7)
