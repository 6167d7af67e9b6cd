"""Calibration: the inputs that a layer sees, what is gained, and runs that are stopped and continued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, Model, Params, UserError, Weights, forward
from llama3_raw.__main__ import main
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.decoding import calibration
from llama3_raw.decoding.calibration import (
    calibrated_layers,
    cut_text,
    input_moments,
    pass_over,
    quantize_layer,
    sample_texts,
)
from llama3_raw.model import layer
from llama3_raw.ops import no_tap
from tests.checkpoint.files import write_meta
from tests.paths import TINY
from tests.references import cast, dequantized_weights, quantized_weights, random_weights

SMALL = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 80, "norm_eps": 1e-5}


@pytest.fixture
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "N_TOKENS", 128)
    monkeypatch.setattr(calibration, "_LEAST_TOKENS", 64)
    monkeypatch.setattr(calibration, "_LENGTH", 32)
    monkeypatch.setattr(calibration, "_TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model in bf16, random weights."""
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.bfloat16, seed=0)
    return write_meta(tmp_path_factory.mktemp("small") / "model", SMALL, to_state_dict(params, weights))


# Texts


@pytest.mark.usefixtures("_few_tokens")
def test_texts_that_the_model_writes(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    bos = tiny.tokenizer.bos_id
    texts = sample_texts(tiny, bos, seed=5)
    assert texts.shape == (4, 32)
    assert texts[:, 0].tolist() == [bos] * 4
    assert torch.equal(texts, sample_texts(tiny, bos, seed=5))
    assert not torch.equal(texts, sample_texts(tiny, bos, seed=6))
    assert len({tuple(text) for text in texts.tolist()}) == 4
    assert len(set(sample_texts(tiny, None, seed=5)[:, 0].tolist())) > 1
    weights = tiny.weights._replace(norm=tiny.weights.norm * torch.nan)
    with pytest.raises(UserError, match="logits are not numbers"):
        sample_texts(tiny._replace(weights=weights), bos)


def test_texts_of_a_file(tiny: Model) -> None:
    ids = [i % 100 for i in range(20_000)]
    assert torch.equal(cut_text(ids, tiny.params).flatten(), torch.tensor(ids[:16384]))
    assert cut_text(ids[:5000], tiny.params).shape == (9, 512)
    with pytest.raises(UserError, match="has 1,023 tokens; give one of 16,384, or at least 1,024"):
        cut_text(ids[:1023], tiny.params)
    with pytest.raises(UserError, match="token id 5000 is outside"):
        cut_text([5000] * 5000, tiny.params)


# One layer


def test_the_moments_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_TOKENS_AT_ONCE", 12)  # two passes
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.float32, seed=0)
    tokens = torch.randint(80, (3, 6), generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}

    def tap(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor
        return tensor

    hidden = F.embedding(tokens, weights.tok_embeddings)
    at = pass_over(tokens, params, REFERENCE)
    layer(hidden, weights.layers[0], None, at, tap)
    moments = input_moments(weights.layers[0], hidden, at)
    seen["heads"] = seen["attention.heads"].flatten(-2)
    names = {"wq": "attention_norm", "wo": "heads", "w1": "ffn_norm", "w2": "feed_forward.hidden"}
    assert moments.keys() == names.keys()
    for field, name in names.items():
        inputs = seen[name].flatten(0, -2)
        torch.testing.assert_close(moments[field], inputs.T @ inputs)


def test_the_next_layer_sees_the_quantized_one() -> None:
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.float32, seed=0)
    tokens = torch.randint(80, (3, 6), generator=torch.Generator().manual_seed(0))
    before = F.embedding(tokens, weights.tok_embeddings)
    at, hidden = pass_over(tokens, params, REFERENCE), before.clone()
    matrices = quantize_layer(weights.layers[0], hidden, at)
    assert set(matrices) == {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}
    rounded = weights.layers[0]._replace(**matrices)  # type: ignore[arg-type]
    torch.testing.assert_close(hidden, layer(before, rounded, None, at, no_tap))
    assert not torch.equal(hidden, layer(before, weights.layers[0], None, at, no_tap))


# A model


def divergence(model: Model, weights: Weights, tokens: Tensor) -> float:
    """Return the mean KL divergence of the weights from the model's, in nats per token, over texts [texts, length]."""
    with torch.no_grad():
        p, q = (forward(w, model.params, tokens).log_softmax(-1) for w in (model.weights, weights))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_less_is_lost_than_by_rounding_to_the_nearest(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On text that the model did not see, with a quarter of the tokens."""
    for name, value in {"N_TOKENS": 4096 + 1024, "_LENGTH": 128, "_TEXTS_AT_ONCE": 40}.items():
        monkeypatch.setattr(calibration, name, value)
    model = tiny._replace(weights=cast(tiny.weights, torch.float32))
    seen, unseen = sample_texts(tiny, tiny.tokenizer.bos_id).split(32)
    at, hidden = pass_over(seen, model.params, REFERENCE), F.embedding(seen, model.weights.tok_embeddings)
    layers = tuple(old._replace(**quantize_layer(old, hidden, at)) for old in model.weights.layers)  # type: ignore[arg-type]
    calibrated = dequantized_weights(model.weights._replace(layers=layers))
    nearest = dequantized_weights(quantized_weights(model.weights, "int4"))._replace(output=model.weights.output)
    assert divergence(model, calibrated, unseen) < 0.75 * divergence(model, nearest, unseen)


def calibrated_folder(model: Path, target: Path, **settings: Any) -> Path:
    checkpoint = open_checkpoint(model)
    with calibrated_layers(checkpoint, target, **settings) as layers:
        save_quantized(model, checkpoint, target, quantize="int4", layers=layers)
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.usefixtures("_few_tokens")
@pytest.mark.parametrize("text", [None, [i * i % 80 for i in range(100)]], ids=["written by the model", "given"])
def test_a_run_that_was_stopped_continues(
    folder: Path, tmp_path: Path, text: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is the same byte for byte as that of a run that was not, and no layer is computed twice."""
    at_once = calibrated_folder(folder, tmp_path / "at once", text=text)
    assert [path.name for path in tmp_path.iterdir()] == ["at once"]
    llama3_raw.load(at_once)

    computed: list[Any] = []

    def counted(*arguments: Any) -> Any:
        if len(computed) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        computed.append(arguments)
        return quantize_layer(*arguments)

    stopped: list[bool] = []
    monkeypatch.setattr(calibration, "quantize_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrated_folder(folder, tmp_path / "new", text=text)
    assert {path.name for path in tmp_path.iterdir()} == {"at once", "new.calibration"}
    monkeypatch.setattr(calibration, "sample_texts", None)  # the text is kept
    assert content(calibrated_folder(folder, tmp_path / "new", text=text)) == content(at_once)
    assert {path.name for path in tmp_path.iterdir()} == {"at once", "new"}
    assert len(computed) == 3


@pytest.mark.usefixtures("_few_tokens")
def test_a_run_of_something_else_is_not_continued(folder: Path, tmp_path: Path) -> None:
    def stopped(model: Path, **settings: Any) -> Iterator[Any]:
        with calibrated_layers(open_checkpoint(model), tmp_path / "new", **settings) as layers:
            yield next(layers)

    next(stopped(folder))
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.bfloat16, seed=1)
    other = write_meta(tmp_path / "other", SMALL, to_state_dict(params, weights))
    for change in (
        {"model": other},
        {"model": folder, "seed": 1},
        {"model": folder, "dtype": torch.float32},
        {"model": folder, "text": [1] * 100},
    ):
        with pytest.raises(UserError, match=r"new\.calibration: is of a stopped run with another model, text or dtype"):
            next(stopped(**change))


@pytest.mark.usefixtures("_few_tokens")
def test_damaged_weights(tmp_path: Path) -> None:
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.bfloat16, seed=0)
    weights.layers[1].ffn_norm[3] = torch.nan
    model = write_meta(tmp_path / "model", SMALL, to_state_dict(params, weights))
    with pytest.raises(UserError, match="the weights are damaged"):
        calibrated_folder(model, tmp_path / "new", text=[1, 2, 3, 4] * 30)


# The command


@pytest.mark.usefixtures("_few_tokens")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It rounds for a text, or for one that the model writes, with the seed."""
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 30)
    arguments = ["--weights", str(TINY), "--device", "cpu", "--quantize", "int4"]
    made = {}
    for name, options in {"text": ["--calibrate", str(text)], "own": ["--calibrate"], "nearest": []}.items():
        assert main([*arguments, "--save-quantized", str(tmp_path / name), *options]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert f"wrote {tmp_path / name}" in err
        made[name] = content(tmp_path / name)
        assert ("layer 4 of 4" in err) == (name != "nearest")
    assert len({files["int4.000.safetensors"] for files in made.values()}) == 3
    assert len({files["int4.004.safetensors"] for files in made.values()}) == 1
    assert main(["Once", "--weights", str(tmp_path / "own"), "--device", "cpu", "--max-new-tokens", "3"]) == 0


REFUSED = {
    "int8": (["--save-quantized", "{new}", "--quantize", "int8", "--calibrate"], "--calibrate is for --quantize int4"),
    "no format": (["--save-quantized", "{new}", "--calibrate"], "--calibrate is for --quantize int4"),
    "to run": (["x", "--quantize", "int4", "--calibrate", "FILE"], "--calibrate belongs to --save-quantized FOLDER"),
    "no file": (["--save-quantized", "{new}", "--quantize", "int4", "--calibrate", "{new}"], "new: cannot be read"),
    "a short text": (
        ["--save-quantized", "{new}", "--quantize", "int4", "--calibrate", "{params}"],
        "the text to calibrate with has",
    ),
    "a folder that is not empty": (
        ["--save-quantized", "{tiny}", "--quantize", "int4", "--calibrate"],
        "already exists and is not empty",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = REFUSED[case]
    places = {"new": tmp_path / "new", "tiny": TINY, "params": TINY / "params.json"}
    assert main(["--weights", str(TINY), "--device", "cpu", *(word.format(**places) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err
    assert not list(tmp_path.iterdir())
    assert not list(TINY.parent.glob("*.calibration"))
