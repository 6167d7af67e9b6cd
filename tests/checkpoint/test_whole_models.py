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
from llama3_raw.chat.dialog import Message
from llama3_raw.chat.formats import format_of
from llama3_raw.compare.__main__ import main as compare
from llama3_raw.convert import main as convert
from tests.chat.test_template import saved
from tests.checkpoint.test_kinds import beside_a_base, network, with_lora
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
    # exactly: rounded to 8 bits, the inputs let another word begin, which is about as likely
    assert main([*run, "--reference", "--chat", "What is the capital of France?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The capital"
    assert "dialogs are formatted by the chat template of" in captured.err
    assert main([*run, "a\x04b"]) == 2
    assert "has no token for byte 0x04" in capsys.readouterr().err


@pytest.fixture
def as_gguf(fine_tune: Path, tmp_path: Path) -> Path:
    """The fine-tune as a GGUF file alone in a folder."""
    (tmp_path / "gguf").mkdir()
    assert convert([str(fine_tune), str(tmp_path / "gguf" / "model.gguf")]) == 0
    return tmp_path / "gguf"


def text_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    return capsys.readouterr().out


def test_a_folder_with_a_gguf_file(fine_tune: Path, as_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer, chat template and end tokens are found there, and stay when another tokenizer is given."""
    expected = text_of(capsys, "--weights", str(fine_tune), "Once")
    answer = text_of(capsys, "--weights", str(fine_tune), "--chat", "Why?")
    for weights in (as_gguf, as_gguf / "model.gguf"):
        for more in ([], ["--tokenizer", str(fine_tune / "tokenizer.json")], ["--tokenizer", str(fine_tune)]):
            run = ["--weights", str(weights), *more]
            assert text_of(capsys, *run, "Once") == expected
            assert text_of(capsys, *run, "--chat", "Why?") == answer
    assert text_of(capsys, "--weights", str(fine_tune), "--tokenizer", str(as_gguf / "model.gguf"), "Once") == expected
    assert main(["--weights", str(as_gguf / "model.gguf"), "--format", "original", "x"]) == 2
    assert "is a single file; leave --format out" in capsys.readouterr().err


def test_a_template_beside_a_gguf_file_is_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert([str(TINY), str(tmp_path / "model.gguf")]) == 0  # a base model: without a template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    assert main(["--weights", str(tmp_path / "model.gguf"), "--chat", "Why?", "--max-new-tokens", "1"]) == 0
    assert "dialogs are formatted" not in capsys.readouterr().err


def test_a_gguf_file_without_a_tokenizer_for_us_ends_where_it_says(
    as_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (as_gguf / "model.gguf").read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(b"llama-bpe", b"llama-xyz"))
    end = llama3_raw.load(as_gguf).tokenizer.special_tokens["<|im_end|>"]
    assert main(["--weights", str(other), "Once"]) == 2
    assert "tokenizer.ggml.pre = 'llama-xyz' is not supported" in capsys.readouterr().err
    assert end in (llama3_raw.load(other, tokenizer=False).stop_ids or ())


def test_conversions_of_a_gguf_file_keep_its_text(
    fine_tune: Path, as_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    expected = text_of(capsys, "--weights", str(fine_tune), "--chat", "Why?")
    for to in ("meta", "hf"):
        assert convert([str(as_gguf / "model.gguf"), str(tmp_path / to), "--to", to]) == 0
        assert text_of(capsys, "--weights", str(tmp_path / to), "--chat", "Why?") == expected
        assert llama3_raw.load(tmp_path / to).stop_ids == llama3_raw.load(as_gguf).stop_ids
    theirs, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", fine_tune))
    messages = [{"role": "user", "content": "Why <think>?"}]
    ids = [tokenizer.apply_chat_template(messages, return_dict=False) for tokenizer in (theirs, original)]
    assert ids[0] == ids[1]


def test_end_tokens_that_a_gguf_file_cannot_hold(
    fine_tune: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = fine_tune / "generation_config.json"
    content = json.loads(file.read_text())
    content["eos_token_id"] = [content["eos_token_id"], 300]
    file.write_text(json.dumps(content))
    assert convert([str(fine_tune), str(tmp_path / "model.gguf")]) == 0
    name = llama3_raw.load(fine_tune).tokenizer.name(300)
    assert f"a GGUF file cannot say that {name} end a text, too" in capsys.readouterr().err


def test_names_of_tokens_beside_a_tokenizer_model(tmp_path: Path) -> None:
    """A template's {{ eos_token }} is that of tokenizer_config.json, not Meta's <|end_of_text|>."""
    shutil.copytree(TINY, tmp_path / "tiny")
    config = {"eos_token": "<|eot_id|>", "chat_template": "{{ messages[0]['content'] }}{{ eos_token }}"}
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = llama3_raw.load(tmp_path / "tiny").tokenizer
    assert tokenizer is not None
    ids = format_of(tokenizer).encode([Message("user", "a")])
    assert ids == [*tokenizer.encode("a"), tokenizer.special_tokens["<|eot_id|>"]]


def test_named_templates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    templates = [{"name": "rag", "template": "Rag: {{ messages[0]['content'] }}"}, {"name": "chat", "template": "x"}]
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    run = ["--weights", str(tmp_path / "tiny"), "--chat", "Why?", "--max-new-tokens", "1"]
    assert main(run) == 2
    assert "its chat templates are rag, chat; name one as --template" in capsys.readouterr().err
    assert main([*run, "--template", "rag"]) == 0
    assert "dialogs are formatted by the chat template rag of" in capsys.readouterr().err


def test_another_template_is_another_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, prompts = tmp_path / "mine.jinja", tmp_path / "in.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n')
    run = [str(prompts), "-o", str(tmp_path / "out.jsonl"), "--max-new-tokens", "1", "--template", str(template)]
    for text, status in (("A {{ messages[0]['content'] }}", 0), ("B {{ messages[0]['content'] }}", 2)):
        template.write_text(text)
        assert batch(run) == status
    assert "finished already" not in capsys.readouterr().err


def test_compare_with_a_gguf_file_and_with_a_merged_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network(max_position_embeddings=512)
    model.save_pretrained(tmp_path / "base")
    tuned = with_lora(model, {"target_modules": "all-linear"})
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    run = ["--weights", str(tmp_path / "base"), "--ids", "3 17 5", "--tolerance", "1e-3"]
    assert compare([*run, "--adapter", str(tmp_path / "adapter"), "--with", str(tmp_path / "merged")]) == 0
    assert compare([*run, "--with", str(tmp_path / "merged")]) == 1
