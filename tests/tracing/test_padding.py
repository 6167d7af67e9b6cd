"""Prompts of unequal length in a batch: each has the tensors that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, Model, Trace, UserError, forward, load_trace, trace
from tests.references import cast

TEXTS = ("Once upon a time, there was a little", "The", "Tom and Lily went to the park")


@pytest.fixture(scope="module")
def prompts(tiny: Model) -> list[list[int]]:
    assert tiny.tokenizer is not None
    return [tiny.tokenizer.encode(text, bos=True) for text in TEXTS]


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


def close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors in fp32 differ by rounding only, infinities included."""
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=0, atol=5e-6 * float(second.abs().nan_to_num(0, 0, 0).max())
    )


def test_pad(prompts: list[list[int]]) -> None:
    tokens, lengths = llama3_raw.pad([prompts[0], torch.tensor(prompts[1]), tuple(prompts[2])])
    assert tokens.dtype == lengths.dtype == torch.long
    assert tokens.shape == (3, max(map(len, prompts)))
    assert lengths.tolist() == [len(prompt) for prompt in prompts]
    for row, prompt in zip(tokens.tolist(), prompts, strict=True):
        assert row[: len(prompt)] == prompt
        assert set(row[len(prompt) :]) <= {prompt[-1]}
    assert torch.equal(llama3_raw.pad(prompt for prompt in prompts)[0], tokens)
    for wrong in (5, None, torch.tensor(5)):
        with pytest.raises(UserError, match="prompts should be a list of prompts, is"):
            llama3_raw.pad(wrong)  # type: ignore[arg-type]
    invalid: list[Any] = [[], [[]], [[1], []], [[1.5]], ["text"], [[[1]]], [3]]
    for wrong in invalid:
        with pytest.raises(UserError, match=r"no prompts|empty|ids should be"):
            llama3_raw.pad(wrong)


def test_a_batch_has_the_tensors_of_each_prompt_alone(fp32: Model, prompts: list[list[int]]) -> None:
    tokens, lengths = llama3_raw.pad(prompts)
    names = ["tok_embeddings", "layers.1.*", "layers.3.residual", "norm", "logits"]
    together = trace(fp32, tokens, *names, lengths=lengths)
    assert together.lengths.tolist() == lengths.tolist()
    assert together == trace(fp32, prompts, *names)  # a list of prompts is padded
    assert together == trace(fp32, tokens.tolist(), *names, lengths=lengths.tolist())
    assert trace(fp32, list(tokens[0]), "norm") == trace(fp32, tokens[0], "norm")  # numbers in tensors of their own
    for row, prompt in enumerate(prompts):
        alone, n = trace(fp32, prompt, *names), len(prompt)
        for name, tensor in alone.items():
            text = together[name][row]
            text = text[:, :n, :n] if name.endswith(("scores", "probs")) else text[:n]
            assert close(text, tensor), name


def test_the_last_token_of_each_text(fp32: Model, prompts: list[list[int]]) -> None:
    tokens, lengths = llama3_raw.pad(prompts)
    last = trace(fp32, tokens, lengths=lengths, last_position=True)
    assert last.last_position
    assert last == trace(fp32, tokens, lengths=lengths, at=lengths - 1)
    assert last == trace(fp32, prompts, last_position=True)
    assert last["layers.0.attention.q"].shape == (3, 6, 32)
    assert last["logits"].shape == (3, fp32.params.vocab_size)
    for row, prompt in enumerate(prompts):
        for name, tensor in trace(fp32, prompt, last_position=True).items():
            of_text = last[name][row]
            of_text = of_text[:, : len(prompt)] if name.endswith(("scores", "probs")) else of_text
            assert close(of_text, tensor), name
    tap = Trace(last_position=True)
    trace(fp32, prompts, tap=tap)
    assert tap == last
    trace(fp32, prompts[2], tap=tap)
    assert tap == trace(fp32, prompts[2], last_position=True)
    kept = Trace("layers.*.residual", "layers.2.attention.probs", "logits", at=lengths - 1)
    with torch.no_grad():
        forward(fp32.weights, fp32.params, tokens, tap=kept)
        assert kept == trace(fp32, tokens, *kept, at=(lengths - 1).tolist(), ops=REFERENCE)
        whole = kept["logits"]
        forward(fp32.weights, fp32.params, tokens, tap=kept, logits_at=lengths - 1)
    assert close(kept["logits"], whole)


def test_a_token_is_counted_in_each_text(fp32: Model, prompts: list[list[int]]) -> None:
    tokens, lengths = llama3_raw.pad(prompts)
    last = trace(fp32, prompts, "*.residual", "*.probs", last_position=True)
    for at in (-1, torch.tensor(-1), [-1, len(prompts[1]) - 1, -1], lengths - 1):
        assert trace(fp32, tokens, *last, lengths=lengths, at=at) == last
    first = trace(fp32, prompts, "norm", at=0)
    assert first == trace(fp32, prompts, "norm", at=-lengths)
    shortest = len(prompts[1])
    for wrong in (shortest, -shortest - 1, [0, shortest, 0]):
        with pytest.raises(UserError, match=rf"at -?\d is not in a prompt of {shortest} tokens"):
            trace(fp32, prompts, "norm", at=wrong)
    with pytest.raises(UserError, match="at has 2 indices, for 3 prompts; give one per row"):
        trace(fp32, prompts, "norm", at=[0, 0])


def test_a_token_of_one_prompt(tiny: Model, prompts: list[list[int]]) -> None:
    whole = trace(tiny, prompts[0])
    for at in (0, 3, -1, -len(prompts[0]), torch.tensor(3)):
        kept = trace(tiny, prompts[0], at=at)
        assert torch.equal(kept["layers.2.residual"], whole["layers.2.residual"][at])
        assert torch.equal(kept["layers.2.attention.probs"], whole["layers.2.attention.probs"][:, at])
        assert torch.equal(kept["logits"], whole["logits"][at])


def test_a_batch_without_padding(fp32: Model, prompts: list[list[int]]) -> None:
    batch = torch.tensor([prompts[0], prompts[0][::-1]])
    kept = trace(fp32, batch, "layers.2.residual", "logits")
    assert kept.lengths is None
    for row, tokens in enumerate(batch):
        for name, tensor in trace(fp32, tokens, *kept).items():
            assert close(kept[name][row], tensor)
    assert torch.equal(trace(fp32, batch, "logits", last_position=True)["logits"], kept["logits"][:, -1])
    residual = kept["layers.2.residual"]
    part = trace(fp32, batch, "logits", start_at="layers.3", residual=residual)
    assert torch.equal(part["logits"], kept["logits"])


@pytest.mark.parametrize(
    ("ids", "settings", "complaint"),
    [
        ([[1, 2, 3], [4, 5]], {"lengths": [3, 2]}, r"ids should be the tokens of one prompt, .* or a batch \[B, T\]"),
        (torch.ones(2, 3).long(), {"lengths": [3]}, r"lengths should be one length for each row of ids .* \[2, 3\]"),
        (torch.ones(2, 3).long(), {"lengths": [1.5, 2.0]}, "lengths should be one length for each row"),
        (torch.ones(2, 3).long(), {"lengths": "ab"}, "lengths should be one length for each row"),
        (torch.ones(3).long(), {"lengths": [3]}, "lengths should be one length for each row"),
        (torch.ones(2, 3).long(), {"lengths": [0, 3]}, r"lengths \[0, 3\]: each should be from 1 to the 3 tokens"),
        (torch.ones(2, 3).long(), {"lengths": [1, 4]}, r"lengths \[1, 4\]: each should be from 1 to the 3 tokens"),
        (torch.ones(2, 513).long(), {}, "needs 513 positions, but the context holds 512"),
        (torch.full((2, 3), 2304), {}, "token id 2304 is outside"),
        (torch.ones(2, 3).long(), {"at": [0, 1, 2]}, "at has 3 indices"),
        ([1, 2, 3], {"at": [0, 1]}, "at has 2 indices"),
        ([1, 2, 3], {"at": 3}, "at 3: a pass of 3 tokens has no such token"),
        ([1, 2, 3], {"at": -4}, "at -4: a pass of 3 tokens has no such token"),
        ([1, 2, 3], {"at": 1.5}, "at should be an index of a token"),
        ([1, 2, 3], {"at": True}, "at should be an index of a token"),
        ([1, 2, 3], {"at": []}, "at should be an index of a token"),
        ([1, 2, 3], {"at": 0, "last_position": True}, "at and last_position both choose a token"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Model, ids: Any, settings: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        trace(tiny, ids, **settings)


def test_a_saved_batch(tiny: Model, prompts: list[list[int]], tmp_path: Path) -> None:
    for settings in ({"at": [1, 0, 2]}, {"last_position": True}, {"at": 1}, {}):
        kept = trace(tiny, prompts, "layers.*.residual", **settings)
        kept.save(tmp_path / "batch.safetensors")
        loaded = load_trace(tmp_path / "batch.safetensors")
        assert loaded == kept
        assert repr(loaded.at) == repr(kept.at)
        assert (loaded.last_position, loaded.lengths.tolist()) == (kept.last_position, [len(ids) for ids in prompts])
        assert loaded.origin == kept.origin
        assert loaded.origin.batch == prompts
        with pytest.raises(UserError, match="t: is of a batch of 3 prompts; trace this prompt alone"):
            loaded.origin.check(tiny, prompts[0], "t")


def test_equal_traces(tiny: Model, prompts: list[list[int]]) -> None:
    first, second = (trace(tiny, prompts[0], "layers.*.residual") for _ in range(2))
    assert first == second
    assert first == dict(second)
    assert first != trace(tiny, prompts[0], "layers.[0-2].residual")
    assert first != trace(tiny, prompts[2], "layers.*.residual")
    assert first != trace(tiny, prompts[0], "layers.*.residual", dtype=torch.float32)
    assert first != trace(tiny, prompts[0], "layers.*.residual", at=0)
    assert first != "another thing"
    assert first != dict.fromkeys(first, "another thing")
    assert trace(tiny, prompts[0], device="meta") == trace(tiny, prompts[0], device="meta")
    assert first != trace(tiny, prompts[0], "layers.*.residual", device="meta")
    lost = patch_nan(tiny, prompts[0])
    assert lost == patch_nan(tiny, prompts[0])  # NaN has bits


def patch_nan(model: Model, ids: list[int]) -> Trace:
    """A trace of NaN and -0.0."""
    return trace(model, ids, "norm", tap=llama3_raw.patch({"norm": lambda x: torch.full_like(x, torch.nan)}))


def test_names_complete_in_a_notebook(tiny: Model, prompts: list[list[int]]) -> None:
    kept = trace(tiny, prompts[0], "layers.*.residual")
    assert kept._ipython_key_completions_() == [f"layers.{i}.residual" for i in range(4)]
