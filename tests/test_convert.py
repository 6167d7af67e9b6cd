"""Conversion keeps the bits, for any number of shards and both formats; transformers loads it; memory stays low."""

from __future__ import annotations

import errno
import filecmp
import itertools
import json
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import llama3_raw
from llama3_raw import Params, Tokenizer, convert, forward
from llama3_raw.chat.dialog import Message, encode_dialog
from llama3_raw.checkpoint import writing
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.convert import main
from llama3_raw.params import RopeScaling
from llama3_raw.weights import tensor_specs
from tests.llama3_sized import CASES, CONTENT, N_TOKENS, WITH_SPECIAL_NAMES, write_llama3_sized
from tests.paths import TINY
from tests.references import hf_model, random_weights

# every dimension divides by 8; with 8 shards each has two rows of wk, less than a head
DIVISIBLE = {
    "dim": 64,
    "n_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "norm_eps": 1e-5,
    "multiple_of": 32,
}
COUNTS = (1, 2, 4, 8)
WQ, WK = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so small that tensors have several, with other boundaries than the shards."""
    monkeypatch.setattr(convert, "CHUNK", 3000)


def state_dict(seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    params = Params.from_meta(DIVISIBLE)
    return to_state_dict(params, random_weights(params, dtype, seed, tied))


def split(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Split as Meta does: matrices by rows, but wo and w2 by columns, and norms in each shard."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        dimension = 1 if ".wo." in name or ".w2." in name else 0
        slices = [tensor] * count if tensor.dim() == 1 else tensor.chunk(count, dimension)
        for shard, piece in zip(shards, slices, strict=True):
            shard[name] = piece.clone()
    return shards


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(DIVISIBLE))
    for number, shard in enumerate(split(tensors, count)):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    return folder


def run(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the command, which must fail. Return its error line; stdout is empty."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *before, line = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("llama3_raw")]
    assert all("wrote" in other or "only compared" in other for other in before)
    return line.removeprefix("llama3_raw: error: ")


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(file.name for file in ours.iterdir())
    assert names == sorted(file.name for file in theirs.iterdir())
    assert filecmp.cmpfiles(ours, theirs, names, shallow=False) == (names, [], [])


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of shards -> a folder converted from a single file, one chunk per tensor."""
    folder = tmp_path_factory.mktemp("direct")
    whole = write_shards(folder / "whole", state_dict())
    for count in COUNTS:
        run(whole, folder / str(count), "--shards", str(count))
    return {count: folder / str(count) for count in COUNTS}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("old", "new"), list(itertools.product(COUNTS, COUNTS)))
def test_every_number_of_shards(
    tmp_path: Path, old: int, new: int, direct: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file has the tensors of a direct split, and the same bytes whatever it was converted from."""
    tensors = state_dict()
    source = write_shards(tmp_path / "source", tensors, old)
    capsys.readouterr()
    run(source, tmp_path / "new", "--shards", str(new), "--verify")
    assert capsys.readouterr().out.startswith(f"{len(tensors)} tensors of {tmp_path / 'new'} have the same bits")
    files = sorted(file for file in (tmp_path / "new").iterdir() if file.suffix == ".pth")
    assert len(files) == new
    for file, expected in zip(files, split(tensors, new), strict=True):
        assert_same_tensors(torch.load(file, weights_only=True, mmap=True), expected)
    assert_same_files(tmp_path / "new", direct[new])
    assert json.loads((tmp_path / "new" / "params.json").read_text()) == DIVISIBLE


MODELS: dict[str, tuple[dict[str, Any], bool, torch.dtype]] = {
    "grouped": ({}, False, torch.float32),
    "tied": ({}, True, torch.float32),
    "scaled as Llama 3.1": ({"rope_scaling": RopeScaling(8.0), "max_seq_len": 131072}, False, torch.float32),
    "scaled as Llama 3.2, tied": ({"rope_scaling": RopeScaling(32.0), "rope_theta": 5e5}, True, torch.float32),
    "multi-head, bf16": ({"n_kv_heads": 8, "hidden_dim": 88}, False, torch.bfloat16),
    "wide heads": ({"head_dim": 16}, False, torch.float32),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("model", MODELS)
def test_to_meta_and_back(tmp_path: Path, model: str) -> None:
    """A folder that transformers wrote: the same tensors come back, and the same files the second time."""
    changes, tied, dtype = MODELS[model]
    params = replace(Params.from_meta(DIVISIBLE), **changes)
    weights = random_weights(params, dtype, seed=1, tied=tied)
    hf_model(params, weights).save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "meta", "--verify")
    in_meta = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert_same_tensors(in_meta, to_state_dict(params, weights))
    assert Params.from_file(tmp_path / "meta" / "params.json") == params
    run(tmp_path / "meta", tmp_path / "hf again", "--verify")
    assert_same_tensors(
        load_file(tmp_path / "hf again" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    )
    run(tmp_path / "hf again", tmp_path / "meta again")
    run(tmp_path / "meta again", tmp_path / "hf at the end")
    assert_same_files(tmp_path / "meta again", tmp_path / "meta")
    assert_same_files(tmp_path / "hf at the end", tmp_path / "hf again")


def from_pretrained(folder: Path) -> Any:
    """Load a folder with transformers in fp32; no tensor may be missing or unexpected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaForCausalLM

        loaded: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, loading_info = loaded
    assert not any(loading_info.values()), loading_info
    return model.eval()


def assert_same_logits(folder: Path, source: Path) -> None:
    model = llama3_raw.load(source, dtype=torch.float32)
    tokens = torch.randint(model.params.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = from_pretrained(folder)(tokens).logits
        ours = forward(model.weights, model.params, tokens)
        assert torch.equal(forward(*llama3_raw.load(folder, dtype=torch.float32)[:2], tokens), ours)
    assert ours.abs().max() > 1
    assert (theirs - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_the_same(tmp_path: Path, model: str) -> None:
    changes, tied, dtype = MODELS[model]
    params = replace(Params.from_meta(DIVISIBLE), **changes)
    tensors = to_state_dict(params, random_weights(params, dtype, seed=2, tied=tied))
    source = write_shards(tmp_path / "meta", tensors, 2)
    (source / "params.json").write_text(json.dumps(params.to_meta()))
    run(source, tmp_path / "hf")
    assert_same_logits(tmp_path / "hf", source)


def test_the_built_in_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is copied too, and the config has the tokens with which a text begins and ends."""
    monkeypatch.chdir(tmp_path)
    run("tiny", "tiny-hf", "--verify")
    run("tiny-hf", "tiny-2", "--shards", "2")
    out, err = capsys.readouterr()
    assert out.startswith("38 tensors of tiny-hf have the same bits as those of ")
    assert "llama3_raw: wrote tiny-hf, in Hugging Face's format; run it with --weights tiny-hf\n" in err
    assert "llama3_raw: wrote tiny-2, in Meta's format, 2 shards; run it with --weights tiny-2\n" in err
    Path("tiny-hf").rename("hf")
    assert_same_logits(tmp_path / "hf", TINY)
    assert filecmp.cmp(tmp_path / "hf" / "tokenizer.model", TINY / "tokenizer.model", shallow=False)
    tokenizer = llama3_raw.Tokenizer(TINY / "tokenizer.model")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.bos_token_id == tokenizer.bos_id
    assert set(config.eos_token_id) == tokenizer.stop_ids
    assert config.dtype == torch.bfloat16


def test_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file with a single tensor may exceed the limit; safetensors and transformers read all of them."""
    tensors = state_dict()
    monkeypatch.setattr(convert, "LARGEST_FILE", 8000)
    run(write_shards(tmp_path / "meta", tensors), tmp_path / "hf", "--verify")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    seen: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 8000 or len(sizes) == 1
        seen |= dict.fromkeys(sizes, file.name)
    assert index["weight_map"] == seen
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same_logits(tmp_path / "hf", tmp_path / "meta")


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    """In safetensors the wider dtypes come first, so that all tensors are aligned."""
    tensors = state_dict()
    tensors = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    run(write_shards(tmp_path / "meta", tensors), tmp_path / "hf", "--verify")
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(loaded["model.norm.weight"], tensors["norm.weight"])
    assert loaded["model.norm.weight"].dtype == torch.float32
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    by_offset = sorted(header.values(), key=lambda entry: entry["data_offsets"])
    assert [entry["dtype"] for entry in by_offset] == ["F32"] * 3 + ["BF16"] * 9


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


HF_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_files_that_are_copied_too(tmp_path: Path, to: str) -> None:
    """In a repository with Meta's files in original/: Hugging Face's files, but not a config of another model."""
    source = tmp_path / "repository"
    write_shards(source / "original", state_dict())
    (source / "original" / "tokenizer.model").write_text("of the base, perhaps")
    for name in (*HF_FILES, "README.md"):
        (source / name).write_text("{}" if name.endswith("config.json") else name)
    run(source, tmp_path / "new", "--to", to)
    weights = {"model.safetensors", "tokenizer.model"} if to == "hf" else {"consolidated.00.pth", "params.json"}
    assert names_in(tmp_path / "new") == {*HF_FILES, *weights}
    copied = [name for name in HF_FILES if (to, name) != ("hf", "config.json")]
    assert filecmp.cmpfiles(source, tmp_path / "new", copied, shallow=False) == (copied, [], [])
    if to == "hf":
        assert (tmp_path / "new" / "tokenizer.model").read_text() == "of the base, perhaps"
        config = json.loads((tmp_path / "new" / "config.json").read_text())
        assert (config["hidden_size"], config["eos_token_id"]) == (64, None)


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_an_unreadable_tokenizer_model_is_copied(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_shards(tmp_path / "source", state_dict())
    (source / "tokenizer.model").write_text("unchanged")
    run(source, tmp_path / "new", "--to", to)
    assert (tmp_path / "new" / "tokenizer.model").read_text() == "unchanged"
    assert "tokenizer.json" not in names_in(tmp_path / "new")
    assert ("has no tokenizer.json, because" in capsys.readouterr().err) == (to == "hf")


# Hugging Face's small files


@pytest.fixture(scope="module")
def llama3_in_hf(tmp_path_factory: pytest.TempPathFactory, meta_tokenizer_file: Path) -> Path:
    """A model with Llama 3's tokenizer.model that was trained on dialogs, converted to Hugging Face's format."""
    folder = tmp_path_factory.mktemp("llama3")
    run(write_llama3_sized(folder / "meta", meta_tokenizer_file, trained=True), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def auto_tokenizer(llama3_in_hf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama3_in_hf)


def test_transformers_makes_the_same_tokens(auto_tokenizer: Any, llama3: Tokenizer) -> None:
    assert len(CASES) == 47
    for text in (*CASES, WITH_SPECIAL_NAMES.removeprefix("<|begin_of_text|>")):
        ids = llama3.encode(text, bos=True, allow_special=True)
        assert auto_tokenizer.encode(text) == ids
        assert auto_tokenizer.encode(text, add_special_tokens=False) == ids[1:]
        assert auto_tokenizer.decode(ids) == llama3.decode(ids)
        ordinary = [token for token in ids if token < len(llama3.ranks)]
        assert auto_tokenizer.decode(ids, skip_special_tokens=True) == llama3.decode(ordinary)
    assert auto_tokenizer("a", "b")["input_ids"] == [
        llama3.bos_id,
        *llama3.encode("a"),
        llama3.bos_id,
        *llama3.encode("b"),
    ]


def test_transformers_knows_the_same_special_tokens(auto_tokenizer: Any, llama3: Tokenizer) -> None:
    assert (auto_tokenizer.bos_token_id, auto_tokenizer.eos_token_id) == (llama3.bos_id, llama3.eos_id)
    assert len(auto_tokenizer) == llama3.n_words
    assert auto_tokenizer.get_added_vocab() == llama3.special_tokens
    assert auto_tokenizer.model_max_length == 8192
    assert auto_tokenizer("a").keys() == {"input_ids", "attention_mask"}  # what LlamaForCausalLM takes


def test_what_transformers_4_has_to_be_told(llama3_in_hf: Path) -> None:
    """By default it returned token types too, and removed spaces before punctuation."""
    settings = json.loads((llama3_in_hf / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["clean_up_tokenization_spaces"] is False


def test_tokenizer_json_is_that_of_transformers(llama3_in_hf: Path, meta_tokenizer_file: Path) -> None:
    """Its own converter makes the same model from tokenizer.model, and the same special tokens."""
    import tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter: Any = TikTokenConverter
    theirs = converter(
        str(meta_tokenizer_file), extra_special_tokens=list(Tokenizer(meta_tokenizer_file).special_tokens)
    ).converted()
    ours = tokenizers.Tokenizer.from_file(str(llama3_in_hf / "tokenizer.json"))
    first, second = (json.loads(tokenizer.to_str()) for tokenizer in (ours, theirs))
    for key in ("model", "added_tokens", "normalizer"):
        assert first[key] == second[key], key


def test_a_dialog_in_transformers(auto_tokenizer: Any, llama3: Tokenizer) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", " Why?\n"),
        Message("assistant", "So."),
        Message("user", "?"),
    ]
    dialog = [message._asdict() for message in messages]
    ids = auto_tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert ids == encode_dialog(llama3, messages)
    text = auto_tokenizer.apply_chat_template(dialog[:3], tokenize=False)
    assert text.endswith("<|end_header_id|>\n\nSo.<|eot_id|>")


def test_generation_ends_at_the_same_tokens(llama3_in_hf: Path, llama3: Tokenizer) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig.from_pretrained(llama3_in_hf)
    assert settings.bos_token_id == llama3.bos_id
    assert set(settings.eos_token_id) == llama3.stop_ids


def test_a_base_model_gets_no_chat_template(tmp_path: Path, meta_tokenizer_file: Path) -> None:
    """It was never trained on the tokens of dialogs."""
    run(write_llama3_sized(tmp_path / "meta", meta_tokenizer_file, trained=False), tmp_path / "hf")
    assert "chat_template" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())


def test_files_of_the_source_are_kept(tmp_path: Path) -> None:
    """Only what is missing beside tokenizer.model is made."""
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    (source / "generation_config.json").write_text('{"eos_token_id": 2057}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text("{}")
    run(source, tmp_path / "hf")
    assert names_in(tmp_path / "hf") == {*HF_FILES, "model.safetensors", "tokenizer.model"}
    kept = ["generation_config.json", "chat_template.jinja", "special_tokens_map.json"]
    assert filecmp.cmpfiles(source, tmp_path / "hf", kept, shallow=False) == (kept, [], [])
    assert "chat_template" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [2057]


def test_a_tokenizer_json_of_the_source_stays_alone(tmp_path: Path) -> None:
    """Settings made for tokenizer.model may not be those of the other tokenizer."""
    source = shutil.copytree(TINY, tmp_path / "source")
    (source / "tokenizer.json").write_text("another")
    run(source, tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "another"
    assert names_in(tmp_path / "hf").isdisjoint({"tokenizer_config.json", "special_tokens_map.json"})


def hf_folder(folder: Path, tokenizer_folder: Path) -> Path:
    """Write a model as transformers does, with everything that Meta's format cannot express."""
    params = replace(Params.from_meta({**CONTENT, "vocab_size": N_TOKENS}), head_dim=16)
    model = hf_model(params, random_weights(params, torch.bfloat16, seed=5))
    model.config.update(
        {"eos_token_id": [128008, 128009], "pad_token_id": 128004, "pretraining_tp": 1, "note": "a ⟨b⟩"}
    )
    model.generation_config.update(eos_token_id=[128008, 128009], do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder)
    for name in HF_FILES:
        if (tokenizer_folder / name).exists() and not (folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, folder / name)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_to_meta_and_back_keeps_everything(tmp_path: Path, llama3_in_hf: Path, meta_tokenizer_file: Path) -> None:
    """Of config.json and of the tokenizer; a tokenizer.model is made, that of Meta byte for byte."""
    source = hf_folder(tmp_path / "hf", llama3_in_hf)
    run(source, tmp_path / "meta", "--verify")
    assert names_in(tmp_path / "meta") == {*HF_FILES, "params.json", "consolidated.00.pth", "tokenizer.model"}
    assert filecmp.cmp(tmp_path / "meta" / "tokenizer.model", meta_tokenizer_file, shallow=False)
    assert open_checkpoint(tmp_path / "meta").stop_ids == frozenset((128008, 128009))
    run(tmp_path / "meta", tmp_path / "back", "--verify")
    assert names_in(tmp_path / "back") == names_in(source) | {"tokenizer.model"}
    assert filecmp.cmpfiles(source, tmp_path / "back", HF_FILES, shallow=False) == (list(HF_FILES), [], [])


def test_config_json_changes_where_it_must(tmp_path: Path, llama3_in_hf: Path) -> None:
    """Its dtype and whether embeddings are tied; that of another model is not used."""
    source = hf_folder(tmp_path / "hf", llama3_in_hf)
    run(source, tmp_path / "meta")
    tensors = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    del tensors["output.weight"]
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "meta" / "consolidated.00.pth")
    run(tmp_path / "meta", tmp_path / "back")
    expected = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True, "dtype": "float16"}
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == expected
    (tmp_path / "meta" / "config.json").write_text(json.dumps(expected | {"rms_norm_eps": 1e-6}))
    run(tmp_path / "meta", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert "note" not in config


def rename_reserved(content: Any) -> None:
    content["added_tokens"][4]["content"] = "<|reserved_special_token_250|>"  # Llama 3 and 3.1 number them differently


def rename_needed(content: Any) -> None:
    content["added_tokens"][9]["content"] = "<|reserved_special_token_250|>"  # <|eot_id|>


def rename_other(content: Any) -> None:
    content["added_tokens"][20]["content"] = "<|im_start|>"


def add_token(content: Any) -> None:
    content["added_tokens"].append({**content["added_tokens"][20], "id": 2304, "content": "<|im_start|>"})


def begin_with_nothing(content: Any) -> None:
    content["post_processor"] = None


def split_otherwise(content: Any) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}+"


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (rename_reserved, True),
        (rename_needed, False),
        (rename_other, False),
        (add_token, False),
        (begin_with_nothing, False),
        (split_otherwise, False),
    ],
)
def test_tokenizer_model_only_if_it_gives_the_same_tokens(
    tmp_path: Path, change: Callable[[Any], None], made: bool
) -> None:
    """Even if that of the base is in original/: in Meta's format it would come before tokenizer.json."""
    source = tmp_path / "hf"
    run("tiny", source)
    (source / "original").mkdir()
    (source / "tokenizer.model").rename(source / "original" / "tokenizer.model")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (source / "tokenizer.json").write_text(json.dumps(content))
    run(source, tmp_path / "meta")
    assert ("tokenizer.model" in names_in(tmp_path / "meta")) == made


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    run("tiny", tmp_path / "new", "--shards", "2")
    assert (tmp_path / "new" / "consolidated.01.pth").exists()


# --verify


def flip(file: Path, tensor: Tensor, offset: int) -> None:
    """Flip the sign of one value of a tensor, whose bytes are searched for in the file."""
    content = bytearray(file.read_bytes())
    bits = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    assert content.count(bits) == 1
    content[content.index(bits) + tensor.itemsize * (offset + 1) - 1] ^= 0x80
    file.write_bytes(content)


def test_one_flipped_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both formats, even if 0 becomes -0; NaN equals itself."""
    tensors = state_dict()
    tensors[WK][3, 5] = 0
    tensors["norm.weight"][1] = float("nan")
    source = write_shards(tmp_path / "source", tensors)
    run(source, tmp_path / "meta", "--shards", "1", "--verify")
    run(source, tmp_path / "hf", "--to", "hf", "--verify")
    flip(tmp_path / "meta" / "consolidated.00.pth", tensors[WK], 3 * 64 + 5)
    line = refusal(capsys, source, tmp_path / "meta", "--verify")
    assert f"tensor {WK} differs, first in row 3; it is not a copy of" in line
    written = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    flip(tmp_path / "hf" / "model.safetensors", written, 64 * written.shape[1] - 1)
    line = refusal(capsys, source, tmp_path / "hf", "--verify")
    assert "tensor model.layers.0.mlp.down_proj.weight differs, first in row 63;" in line


def test_what_is_not_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = state_dict()
    source = write_shards(tmp_path / "source", tensors)
    tied = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    line = refusal(capsys, source, write_shards(tmp_path / "tied", tied), "--verify")
    assert "only one of the two has a separate output matrix" in line
    wide = write_shards(tmp_path / "wide", {name: tensor.float() for name, tensor in tensors.items()})
    assert f"tensor {next(iter(tensors))} is in float32, not in bfloat16" in refusal(capsys, source, wide, "--verify")
    other = write_shards(tmp_path / "other", tensors)
    (other / "params.json").write_text(json.dumps({**DIVISIBLE, "norm_eps": 1e-6}))
    assert "norm_eps is 1e-06, not 1e-05" in refusal(capsys, source, other, "--verify")


def test_an_existing_folder_is_only_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_shards(tmp_path / "source", state_dict())
    existing = write_shards(tmp_path / "existing", state_dict(), 4)
    before = {file: file.stat().st_mtime_ns for file in existing.iterdir()}
    for options in ([], ["--shards", "4"]):
        run(source, existing, "--verify", *options)
        out, err = capsys.readouterr()
        assert out == f"12 tensors of {existing} have the same bits as those of {source}\n"
        assert "exists already, in Meta's format, 4 shards; it is only compared" in err
    assert {file: file.stat().st_mtime_ns for file in existing.iterdir()} == before
    for options in (["--shards", "2"], ["--to", "hf"]):
        line = refusal(capsys, source, existing, "--verify", *options)
        assert "exists already, in Meta's format, 4 shards, not in" in line


# Errors, and what they leave behind


def scaling(folder: Path) -> Path:
    params = replace(Params.from_meta(DIVISIBLE), rope_scaling=RopeScaling(8.0, low_freq_factor=2.0))
    hf_model(params, random_weights(params, torch.bfloat16, seed=0)).save_pretrained(folder)
    return folder


def in_int8(folder: Path) -> Path:
    save_quantized(TINY, open_checkpoint(TINY), folder)
    return folder


def in_int4(folder: Path) -> Path:
    save_quantized(TINY, open_checkpoint(TINY), folder, quantize="int4")
    return folder


def mixed(folder: Path) -> Path:
    write_shards(folder, state_dict(), 2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(shard | {WQ: shard[WQ].float()}, folder / "consolidated.01.pth")
    return folder


def meta(folder: Path) -> Path:
    return write_shards(folder, state_dict())


def in_hf(folder: Path) -> Path:
    run(meta(folder.with_name("meta")), folder)
    return folder


REFUSED: list[tuple[Callable[[Path], Path], str, str]] = [
    (meta, "--shards 5", "--shards 5: the 96 rows of tok_embeddings.weight do not divide"),
    (meta, "--shards 32", "--shards 32: the 16 rows of layers.0.attention.wk.weight do not divide"),
    (meta, "--shards 128", "--shards 128: Meta numbers its files from 00 to 99"),
    (meta, "--shards 0", "argument --shards: should be 1 or more"),
    (meta, "--to hf --shards 2", "--shards 2: is only for Meta's format"),
    (meta, "--to ggml", "argument --to: invalid choice: 'ggml'"),
    (in_hf, "--to hf", "--to hf: SOURCE is in Hugging Face's format already"),
    (in_int8, "--to hf", "SOURCE: is in int8, which no other format has"),
    (in_int4, "--to gguf", "SOURCE: is in int4, which no other format has"),
    (mixed, "", f"SOURCE: the shards have {WQ} in several dtypes"),
    (scaling, "", "SOURCE/config.json: RopeScaling(factor=8.0, low_freq_factor=2.0"),
]


@pytest.mark.parametrize(
    ("make", "options", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)[:30])
)
def test_refused(
    make: Callable[[Path], Path], options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source")
    before = sorted(tmp_path.iterdir())
    line = refusal(capsys, source, tmp_path / "new", *options.split())
    assert line.startswith(message.replace("SOURCE", str(source)))
    assert sorted(tmp_path.iterdir()) == before


def test_source_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = meta(tmp_path / "source")
    assert "is SOURCE itself" in refusal(capsys, source, tmp_path / "." / "source", "--verify")
    (tmp_path / "link").symlink_to(source)
    assert "is SOURCE itself" in refusal(capsys, source, tmp_path / "link")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("precious")
    assert "already exists and is not empty" in refusal(capsys, source, tmp_path / "other")
    assert "already exists and is not empty" in refusal(capsys, source, tmp_path / "other" / "precious")
    assert "no model here" in refusal(capsys, source, tmp_path / "other", "--verify")
    assert (tmp_path / "other" / "precious").read_text() == "precious"
    assert "SOURCE nowhere: there is no such folder" in refusal(capsys, "nowhere", tmp_path / "new")


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    assert "0.0 GB are needed, 0.0 GB are free" in refusal(capsys, "tiny", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_the_system_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit on address space (ulimit -v): tensors for the file's structure use addresses, but no memory."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty_like", refused)
    assert "can't allocate memory; name another" in refusal(capsys, "tiny", tmp_path / "new", "--shards", "2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_left_behind(
    error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk becomes full, or the user presses Ctrl-C, in the middle of the tensors."""
    count = itertools.count()

    def write_at(*arguments: Any) -> None:
        if next(count) == 20:
            raise error
        writing.write_at(*arguments)

    monkeypatch.setattr(convert, "write_at", write_at)
    assert main(["tiny", str(tmp_path / "new"), "--shards", "2"]) == (2 if isinstance(error, OSError) else 130)
    assert ("No space left" in capsys.readouterr().err) == isinstance(error, OSError)
    assert next(count) > 20
    assert list(tmp_path.iterdir()) == []


# Memory

# prints the most anonymous memory at any write; the model is zeros, which take no space on the disk
WATCHED = """
import os, shutil
from pathlib import Path
from llama3_raw import convert

def anonymous_memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

write_at, peak = convert.write_at, 0

def watched(*arguments):
    global peak
    peak = max(peak, anonymous_memory())
    write_at(*arguments)

convert.write_at = watched
for source, folder, to, shards in (
    ("meta", "sharded", "meta", 4), ("sharded", "hf", "hf", 1), ("hf", "back", "meta", 2), ("back", "whole", "meta", 1)
):
    if os.fork() == 0:  # separate processes: freed memory would be reused without asking the system
        checkpoint = convert.open_source(Path(source))
        before = anonymous_memory()
        convert.convert(Path(source), checkpoint, Path(folder), to, shards)
        print(peak - before, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0
    shutil.rmtree(source)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
def test_in_the_memory_of_two_tensors(tmp_path: Path) -> None:
    """The model is seven times as large. Memory-mapped pages of the file do not count."""
    content = {**DIVISIBLE, "dim": 1024, "n_heads": 16, "n_layers": 6, "vocab_size": 12288, "multiple_of": 2816}
    specs = list(tensor_specs(Params.from_meta(content)))
    sizes = [2 * torch.Size(spec.shape).numel() for spec in specs]
    empty = {spec.meta_name: torch.empty(spec.shape, dtype=torch.bfloat16, device="meta") for spec in specs}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(content))
    writing.write_empty_checkpoint(tmp_path / "meta" / "consolidated.00.pth", empty)
    assert sum(sizes) > 7 * max(sizes)
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    assert all(0 < int(peak) <= 2 * max(sizes) for peak in done.stdout.split()), done.stdout
