"""Published values of Meta-Llama-3-8B (sources in golden.json), compared with its weights if they are available."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import Model, forward
from tests.paths import ROOT

FOLDER = ROOT / "weights" / "Meta-Llama-3-8B"
GOLDEN: dict[str, Any] = json.loads((ROOT / "tests" / "golden.json").read_text())
FP32: dict[str, Any] = GOLDEN["fp32_numpy"]

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(not FOLDER.exists(), reason="the real weights are not in weights/Meta-Llama-3-8B"),
]


def run(model: Model, ids: list[int]) -> dict[str, Tensor]:
    """Return every tensor of a forward pass up to layer 0, and the logits."""
    seen = {}

    def record(name: str, tensor: Tensor) -> Tensor:
        if not name.startswith("layers.") or name.startswith("layers.0."):
            seen[name] = tensor.float().clone()
        return tensor

    with torch.no_grad():
        forward(model.weights, model.params, torch.tensor(ids), tap=record)
    return seen


@pytest.fixture(scope="module")
def model() -> Model:
    return llama3_raw.load(FOLDER)


@pytest.fixture(scope="module")
def bf16(model: Model) -> dict[str, Tensor]:
    return run(model, GOLDEN["prompt_ids"])


@pytest.fixture(scope="module")
def fp32() -> dict[str, Tensor]:
    return run(llama3_raw.load(FOLDER, layers=1, dtype=torch.float32), FP32["ids"])


def test_prompt_ids(model: Model) -> None:
    assert model.tokenizer is not None
    prompt = "the answer to the ultimate question of life, the universe, and everything is "
    assert model.tokenizer.encode(prompt, bos=True) == GOLDEN["prompt_ids"]
    assert model.tokenizer.encode(FP32["prompt"], bos=True) == FP32["ids"]


def test_the_answer_is_42(model: Model, bf16: dict[str, Tensor]) -> None:
    answer = int(bf16["logits"][-1].argmax())
    assert answer == GOLDEN["final_argmax"]
    assert model.tokenizer is not None
    assert model.tokenizer.decode([answer]) == "42"


def test_the_other_prompt(model: Model) -> None:
    assert int(run(model, FP32["ids"])["logits"][-1].argmax()) == FP32["argmax"]


def test_top_10_at_every_position(bf16: dict[str, Tensor]) -> None:
    ours = bf16["logits"].topk(10).indices.tolist()
    for position, (mine, published) in enumerate(zip(ours, GOLDEN["causal_top10"], strict=True)):
        assert len(set(mine) & {token for _, token in published}) >= 8, f"position {position}"


def test_embedding_rows(bf16: dict[str, Tensor]) -> None:
    mean_squares = bf16["tok_embeddings"].square().mean(-1)
    torch.testing.assert_close(mean_squares, torch.tensor(GOLDEN["emb_meansq_bf16"]), rtol=0.01, atol=0)


@pytest.mark.parametrize(("name", "resolution"), [("scores", 0.045), ("probs", 0.005)])
def test_head_0_of_layer_0(bf16: dict[str, Tensor], name: str, resolution: float) -> None:
    """The values were read from published pictures, so twice their resolution is allowed; none above the diagonal."""
    published = torch.tensor(GOLDEN[f"layer0_head0_{name}_decoded_from_png"]).tril()
    ours = bf16[f"layers.0.attention.{name}"][0].tril()
    assert (ours - published).abs().max() <= 2 * resolution


@pytest.mark.parametrize(
    ("published", "name", "where"),
    [
        ("attn_norm_bos_first3", "attention_norm", (0, slice(3))),
        ("attn_norm_bos_last3", "attention_norm", (0, slice(-3, None))),
        ("attn_norm_pos1_first3", "attention_norm", (1, slice(3))),
        ("q_l0h0_bos_first6", "attention.q", (0, 0, slice(6))),
        ("q_l0h0_bos_last6", "attention.q", (0, 0, slice(-6, None))),
        ("q_l0h0_pos1_first6", "attention.q", (1, 0, slice(6))),
        ("q_rot_l0h0_pos1_first6", "attention.q_rope", (1, 0, slice(6))),
        ("attn_out_l0h0_bos(=v kv-head0)_first3", "attention.heads", (0, 0, slice(3))),
        ("last3", "attention.heads", (0, 0, slice(-3, None))),
        ("attn_out_l0h4_bos_first3", "attention.heads", (0, 4, slice(3))),
    ],
)
def test_fp32_values_of_layer_0(fp32: dict[str, Tensor], published: str, name: str, where: Any) -> None:
    ours = fp32[f"layers.0.{name}"][where]
    torch.testing.assert_close(ours, torch.tensor(FP32[published]), rtol=1e-3, atol=1e-6)
