"""Which files of a folder are the model, where several could be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llama3_raw
from llama3_raw import Params, forward
from llama3_raw.__main__ import main
from llama3_raw.checkpoint.loading import to_state_dict
from tests.checkpoint.files import SMALL, assert_same, write_meta
from tests.references import hf_model, random_weights

PARAMS = Params.from_meta(SMALL)


@pytest.fixture
def fine_tune(tmp_path: Path) -> Path:
    """A repository with a fine-tune as transformers saves it, and its base in original/."""
    hf_model(PARAMS, random_weights(PARAMS, torch.float32, seed=1)).save_pretrained(tmp_path)
    write_meta(tmp_path / "original", SMALL, to_state_dict(PARAMS, random_weights(PARAMS, torch.float32, seed=2)))
    return tmp_path


def test_the_folder_itself_comes_before_original(fine_tune: Path) -> None:
    """To load the base in place of the fine-tune, without a word, would be the worst of all mistakes."""
    assert_same(llama3_raw.load(fine_tune).weights, random_weights(PARAMS, torch.float32, seed=1))
    assert_same(llama3_raw.load(fine_tune / "original").weights, random_weights(PARAMS, torch.float32, seed=2))


def test_the_choice_is_reported(fine_tune: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--ids", "5 6", "--max-new-tokens", "1", "--weights"]
    assert main([*run, str(fine_tune)]) == 0
    assert "(--weights; model.safetensors, not original/consolidated.00.pth)" in capsys.readouterr().err
    (fine_tune / "original" / "consolidated.02.pth").touch()  # a damaged one that is not chosen is no obstacle
    assert main([*run, str(fine_tune)]) == 0
    assert main([*run, str(fine_tune / "original")]) == 2
    assert "consolidated.01.pth is missing" in capsys.readouterr().err


def test_other_safetensors_are_no_part_of_the_model(fine_tune: Path) -> None:
    """An adapter, or a variant in another dtype, as training leaves them."""
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64), "lora_A": torch.zeros(2)}
    for name in ("adapter_model.safetensors", "model.fp16.safetensors", "optimizer.safetensors"):
        save_file(tensors, fine_tune / name)
    assert_same(llama3_raw.load(fine_tune).weights, random_weights(PARAMS, torch.float32, seed=1))


def test_shards_without_an_index(fine_tune: Path) -> None:
    network = hf_model(PARAMS, random_weights(PARAMS, torch.float32, seed=1))
    shutil.rmtree(fine_tune / "original")
    (fine_tune / "model.safetensors").unlink()
    network.save_pretrained(fine_tune, max_shard_size="100kB")
    (fine_tune / "model.safetensors.index.json").unlink()
    assert len(list(fine_tune.glob("*.safetensors"))) > 1
    assert_same(llama3_raw.load(fine_tune).weights, random_weights(PARAMS, torch.float32, seed=1))


def test_metas_tensors_as_safetensors(fine_tune: Path) -> None:
    """consolidated.safetensors with params.json; next to a config.json too, as some repositories have both."""
    weights = random_weights(PARAMS, torch.float32, seed=3)
    save_file(to_state_dict(PARAMS, weights), fine_tune / "consolidated.safetensors")
    assert_same(llama3_raw.load(fine_tune).weights, random_weights(PARAMS, torch.float32, seed=1))  # no params.json yet
    (fine_tune / "params.json").write_text(json.dumps(SMALL))
    model = llama3_raw.load(fine_tune)
    assert_same(model.weights, weights)
    assert forward(model.weights, model.params, torch.tensor([1, 2])).shape == (2, PARAMS.vocab_size)
