"""From what a user has to the text: a fine-tune in the Hugging Face cache, with all that is beside the weights."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llama3_raw
from llama3_raw import Tokenizer
from llama3_raw.__main__ import main
from llama3_raw.batch.__main__ import main as batch
from llama3_raw.chat.__main__ import main as chat
from llama3_raw.convert import main as convert
from tests.chat.test_template import saved
from tests.checkpoint.test_kinds import beside_a_base, network
from tests.paths import CACHE, TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fine_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fine-tune with ChatML in the cache of transformers, its vocabulary padded, as snapshot_download leaves it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--somebody--fine-tune"
    folder = repo / "snapshots" / COMMIT
    tokenizer = saved(folder, "ChatML")
    model = network(vocab_size=-(-len(tokenizer) // 64) * 64, max_position_embeddings=512)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return folder


def test_its_text_by_one_command(fine_tune: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens are those that transformers generates, and its decoded text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs: Any = AutoModelForCausalLM.from_pretrained(fine_tune, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(fine_tune)
    ids = tokenizer("Once upon a time", return_tensors="pt")
    expected = theirs.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert main(["--weights", "somebody/fine-tune", "--max-new-tokens", "9", "Once upon a time"]) == 0
    # transformers prints nothing for ids without a token, either
    assert capsys.readouterr().out == tokenizer.decode(expected, clean_up_tokenization_spaces=False)


def test_a_revision(fine_tune: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--ids", "3", "--max-new-tokens", "1", "--weights"]
    (fine_tune.parents[1] / "refs" / "v2").write_text(COMMIT)
    for name in ("somebody/fine-tune@main", "somebody/fine-tune@v2", f"somebody/fine-tune@{COMMIT}"):
        assert main([*run, name]) == 0
    shutil.rmtree(fine_tune.parents[1] / "refs")  # as a download that was pinned by commit leaves it
    for name in ("somebody/fine-tune", f"somebody/fine-tune@{COMMIT[:9]}"):
        assert main([*run, name]) == 0
    capsys.readouterr()
    assert main([*run, "somebody/fine-tune@v3"]) == 2
    assert "neither a folder here nor in the Hugging Face cache; fetch it with" in capsys.readouterr().err
    shutil.copytree(fine_tune, fine_tune.with_name("f" * 40))
    assert main([*run, "somebody/fine-tune"]) == 2
    assert (
        "several revisions; give somebody/fine-tune@ and one of 0123456789ab, ffffffffffff" in capsys.readouterr().err
    )


def test_its_chat(fine_tune: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["--weights", str(fine_tune), "--max-new-tokens", "3", "--temperature", "0"]
    assert main([*run, "--chat", "Why?"]) == 0
    captured = capsys.readouterr()
    assert f"dialogs are formatted by the chat template of {fine_tune / 'tokenizer.json'}" in captured.err
    answer = captured.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Why?\n")))
    assert chat(run) == 0
    captured = capsys.readouterr()
    assert captured.out == answer + "\n"
    assert "dialogs are formatted by the chat template" in captured.err
    monkeypatch.chdir(fine_tune)
    Path("in.jsonl").write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n')
    assert batch(["in.jsonl", "-o", "out.jsonl", *run]) == 0
    assert json.loads(Path("out.jsonl").read_text())["text"] == answer
    capsys.readouterr()
    assert main([*run, "--chat", "--template", "llama3", "Why?"]) == 0
    assert "dialogs are formatted" not in capsys.readouterr().err


def test_ids_without_a_token(fine_tune: Path) -> None:
    model = llama3_raw.load(fine_tune)
    assert model.tokenizer is not None
    last = model.params.vocab_size - 1
    assert model.tokenizer.name(last) == f"<|unused_{last}|>"
    assert model.tokenizer.decode([last]) == ""
    name_as_text = model.tokenizer.encode(f"<|unused_{last}|>", allow_special=True)
    assert last not in name_as_text
    assert model.tokenizer.decode(name_as_text) == f"<|unused_{last}|>"


def test_fewer_rows_than_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    network(vocab_size=tokenizer.n_words - 1).save_pretrained(tmp_path)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    assert main(["--weights", str(tmp_path), "Once"]) == 2
    assert "tokenizer.model: has 2304 tokens, but the model has 2303" in capsys.readouterr().err


def test_what_an_int8_copy_keeps(fine_tune: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer, its chat template and the tokens that end its texts."""
    copy = tmp_path / "int8"
    assert main(["--weights", str(fine_tune), "--dtype", "bfloat16", "--save-quantized", str(copy)]) == 0
    ours, theirs = llama3_raw.load(copy), llama3_raw.load(fine_tune)
    assert ours.tokenizer is not None
    assert theirs.tokenizer is not None
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template is not None
    assert ours.tokenizer.special_tokens == theirs.tokenizer.special_tokens
    assert ours.stop_ids == theirs.stop_ids == frozenset([theirs.tokenizer.special_tokens["<|im_end|>"]])
    assert main(["--weights", str(copy), "--chat", "Why?", "--max-new-tokens", "1"]) == 0
    assert "dialogs are formatted by the chat template" in capsys.readouterr().err


def test_convert_says_which_files_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside_a_base(tmp_path / "both", network())
    for arguments, line in (
        ([], "SOURCE is model.safetensors, not original/consolidated.00.pth; --format takes the other"),
        (["--format", "original"], ""),
    ):
        assert (
            convert([str(tmp_path / "both"), str(tmp_path / f"copy{len(arguments)}"), "--to", "meta", *arguments]) == 0
        )
        err = capsys.readouterr().err
        assert line in err
        assert ("SOURCE is" in err) == bool(line)
    norms = [llama3_raw.load(tmp_path / name).weights.norm for name in ("copy0", "copy2", "both", "both/original")]
    assert torch.equal(norms[0], norms[2])
    assert torch.equal(norms[1], norms[3])
    assert not torch.equal(norms[0], norms[1])


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_one_gguf_file(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2 in Q4_1, with a tokenizer of its own: another pattern, and no token for some bytes."""
    run = ["--weights", str(CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"), "--max-new-tokens", "2"]
    assert main([*run, "The capital of France is"]) == 0
    assert capsys.readouterr().out == " Paris."
    assert main([*run, "--chat", "What is the capital of France?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The capital"
    assert "dialogs are formatted by the chat template of" in captured.err
    assert main([*run, "a\x04b"]) == 2
    assert "has no token for byte 0x04" in capsys.readouterr().err
