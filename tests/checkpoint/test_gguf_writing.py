"""GGUF files that convert writes: gguf reads the values back, and llama.cpp makes the same tokens from texts."""

from __future__ import annotations

import json
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import llama3_raw
from llama3_raw import Params, convert
from llama3_raw.chat.dialog import Message, encode_dialog
from llama3_raw.checkpoint.gguf_header import StringArray, read_header
from llama3_raw.checkpoint.gguf_reading import read_gguf
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.convert import main
from llama3_raw.params import RopeScaling
from llama3_raw.tokenizer import Tokenizer
from tests.llama3_sized import CASES, N_TOKENS, WITH_SPECIAL_NAMES, write_llama3_sized
from tests.paths import TINY
from tests.references import hf_model, random_weights

PARAMS = Params(64, 2, 4, 2, 2304, 16, 96, 1e-5, 10000.0, None, 512)
UNUSED_ROWS = 64


def write(source: Path, file: Path, *options: str) -> Path:
    assert main([str(source), str(file), "--to", "gguf", *options]) == 0
    return file


def in_meta(folder: Path, params: Params, dtype: torch.dtype, scale: float = 1.0) -> Path:
    """Write a random model in Meta's format, with the tokenizer of the built-in model."""
    weights = random_weights(params, dtype, seed=3)
    weights.layers[0].wv.mul_(scale)
    folder.mkdir()
    torch.save(to_state_dict(params, weights), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params.to_meta()))
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


class LlamaCpp:
    """llama.cpp's server with a model."""

    def __init__(self, file: Path):
        xllamacpp: Any = pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this system")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = 256
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.fit_params = False
        params.cache_ram_mib = 0
        params.verbosity = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def ask(self, path: str, **request: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        url = f"{self._server.listening_address}/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), headers)) as answer:
            return json.load(answer)

    def ids(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        ids: list[int] = self.ask("tokenize", content=text, add_special=bos, parse_special=special)["tokens"]
        return ids

    def complete(self, prompt: str, count: int) -> Any:
        """Return the answer to a prompt, with its tokens, the most likely ones."""
        settings = {"temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        return self.ask("completion", prompt=prompt, n_predict=count, **settings)


# Llama 3's vocabulary


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, meta_tokenizer_file: Path) -> Path:
    """A GGUF file with Llama 3's vocabulary, trained on dialogs, with rows in the embeddings that have no token."""
    folder = tmp_path_factory.mktemp("large")
    vocab_size = N_TOKENS + UNUSED_ROWS
    return write(
        write_llama3_sized(folder / "Small-Instruct", meta_tokenizer_file, trained=True, vocab_size=vocab_size),
        folder / "model.gguf",
    )


@pytest.fixture(scope="module")
def llama_cpp(large: Path) -> LlamaCpp:
    return LlamaCpp(large)


def test_llama_cpp_makes_the_same_tokens(llama_cpp: LlamaCpp, llama3: Tokenizer) -> None:
    assert len(CASES) == 47
    for text in CASES:
        assert llama_cpp.ids(text) == llama3.encode(text)
        assert llama_cpp.ids(text, bos=True) == llama3.encode(text, bos=True)


@pytest.mark.parametrize("special", [False, True])
def test_llama_cpp_and_the_names_of_special_tokens(llama_cpp: LlamaCpp, llama3: Tokenizer, special: bool) -> None:
    ids = llama3.encode(WITH_SPECIAL_NAMES, allow_special=special)
    assert (llama3.eot_id in ids) == special
    assert llama_cpp.ids(WITH_SPECIAL_NAMES, special=special) == ids


def test_llama_cpp_formats_a_dialog_as_this_chat_does(llama_cpp: LlamaCpp, llama3: Tokenizer) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", " Why?\n"),
        Message("assistant", "So."),
        Message("user", "No"),
    ]
    prompt = llama_cpp.ask("apply-template", messages=[message._asdict() for message in messages])["prompt"]
    assert llama_cpp.ids(prompt, bos=not prompt.startswith("<|begin_of_text|>"), special=True) == encode_dialog(
        llama3, messages
    )


def test_llama_cpp_ends_at_the_same_tokens(llama_cpp: LlamaCpp, llama3: Tokenizer) -> None:
    """With ignore_eos, the server lists the tokens that are never chosen."""
    settings = llama_cpp.complete("a", 1)["generation_settings"]
    assert {entry["token"] for entry in settings["logit_bias"]} == llama3.stop_ids


def test_metadata(large: Path) -> None:
    """Rows of the embeddings without a token are unused; no text occurs twice."""
    metadata = read_header(large).metadata
    types, tokens = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    kinds = gguf.TokenType
    assert types == [kinds.NORMAL] * 128000 + [kinds.CONTROL] * 256 + [kinds.UNUSED] * UNUSED_ROWS
    texts = tokens.read()
    assert len(set(texts)) == len(texts) == len(types)
    ids = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom")]
    assert ids == [128000, 128001, 128009, 128008]
    assert metadata["general.name"] == "Small-Instruct"
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


# values

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("outtype", [None, *TYPES, "q8_0"])
def test_gguf_reads_the_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outtype: str | None, tiny: llama3_raw.Model
) -> None:
    """Written in small pieces: those of any type, from bf16; norms in fp32."""
    monkeypatch.setattr(convert, "CHUNK", 3000)
    file = write(TINY, tmp_path / "tiny.gguf", "--verify", *(["--outtype", outtype] if outtype else []))
    entries = {entry.name: entry for entry in gguf.GGUFReader(file).tensors}
    assert len(entries) == 38
    for name, tensor in (
        ("token_embd.weight", tiny.weights.tok_embeddings),
        ("blk.3.attn_k.weight", tiny.weights.layers[3].wk),
        ("blk.0.ffn_down.weight", tiny.weights.layers[0].w2),
        ("blk.2.ffn_norm.weight", tiny.weights.layers[2].ffn_norm),
    ):
        assert isinstance(tensor, torch.Tensor)
        data, kind = entries[name].data, entries[name].tensor_type
        if tensor.dim() == 1:
            assert kind == gguf.GGMLQuantizationType.F32
            assert np.array_equal(data, tensor.float().numpy())
        elif outtype == "q8_0":
            assert kind == gguf.GGMLQuantizationType.Q8_0
            assert np.array_equal(data, gguf.quantize(tensor.float().numpy(), kind))
        else:
            assert kind.name.lower() == (outtype or "bf16")
            expected = tensor.to(TYPES[outtype or "bf16"]).float().numpy()
            assert np.array_equal(gguf.dequantize(data, kind), expected)


PROMPT = "Once upon a time, there was a little girl named"


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_llama_cpp_continues_the_built_in_model(tmp_path: Path, outtype: str) -> None:
    """From a text; in fp32 and, as long as rounding does not matter, in Q8_0."""
    model = llama3_raw.load(TINY, dtype=torch.float32)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(PROMPT, bos=True)
    ours = list(llama3_raw.generate(model, ids, max_new_tokens=20, stop_ids=(), ops=llama3_raw.REFERENCE))
    answer = LlamaCpp(write(TINY, tmp_path / "tiny.gguf", "--outtype", outtype)).complete(PROMPT, 20)
    assert answer["tokens_evaluated"] == len(ids)
    count = 20 if outtype == "f32" else 8
    assert answer["tokens"][:count] == ours[:count]


@pytest.mark.parametrize("source_format", ["meta", "two shards", "hf"])
def test_llama_cpp_continues_any_source(tmp_path: Path, source_format: str) -> None:
    """Scaled RoPE, heads narrower than dim / n_heads, untied embeddings; sharded or in Hugging Face's row order."""
    params = Params(64, 2, 4, 2, 2304, 32, 96, 1e-5, 10000.0, RopeScaling(8.0, original_max_seq_len=8192), 131072)
    source = in_meta(tmp_path / "meta", params, torch.float32)
    model = llama3_raw.load(source)
    assert model.tokenizer is not None
    if source_format == "two shards":
        assert main([str(source), str(tmp_path / "shards"), "--shards", "2"]) == 0
        source = tmp_path / "shards"
    elif source_format == "hf":
        source = tmp_path / "hf"
        hf_model(params, model.weights).save_pretrained(source)
        (source / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    file = write(source, tmp_path / "model.gguf", "--verify")
    assert read_gguf(file).params == params
    ids = model.tokenizer.encode(PROMPT, bos=True)
    ours = list(llama3_raw.generate(model, ids, max_new_tokens=8, stop_ids=(), ops=llama3_raw.REFERENCE))
    assert LlamaCpp(file).complete(PROMPT, 8)["tokens"] == ours


def test_from_a_gguf_file_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors and the same tokenizer.model; blocks are not converted."""
    file = write(TINY, tmp_path / "tiny.gguf")
    assert main([str(file), str(tmp_path / "meta"), "--to", "meta", "--verify"]) == 0
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    again, tiny = (
        torch.load(folder / "consolidated.00.pth", weights_only=True) for folder in (tmp_path / "meta", TINY)
    )
    assert all(
        torch.equal(again[name], tensor.float() if tensor.dim() == 1 else tensor) for name, tensor in tiny.items()
    )
    assert again.keys() == tiny.keys()
    file = write(TINY, tmp_path / "blocks.gguf", "--outtype", "q8_0")
    assert f"{file}: is in blocks, which no other format has" in refusal(capsys, file, tmp_path / "new")


# --verify, and what is refused


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    *_, line = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return line.removeprefix("llama3_raw: error: ")


def test_an_existing_file_is_only_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(TINY, tmp_path / "tiny.gguf", "--outtype", "q8_0")
    content = bytearray(file.read_bytes())
    assert f"{file}: already exists; name another file" in refusal(capsys, "tiny", file)
    assert main(["tiny", str(file), "--outtype", "q8_0", "--verify"]) == 0
    assert capsys.readouterr().out.startswith(f"38 tensors of {file} have the bits")
    assert file.read_bytes() == content
    assert "tensor token_embd.weight differs, in rows 0 to" in refusal(capsys, "tiny", file, "--verify")
    content[-1] ^= 1  # of the last norm
    file.write_bytes(content)
    line = refusal(capsys, "tiny", file, "--outtype", "q8_0", "--verify")
    assert "tensor output_norm.weight differs, in rows 0 to 191; it is not what" in line
    other = in_meta(tmp_path / "other", PARAMS, torch.bfloat16)
    assert "dim is 192, not 64" in refusal(capsys, other, file, "--verify")


def without_tokenizer(folder: Path) -> Path:
    (in_meta(folder, PARAMS, torch.bfloat16) / "tokenizer.model").unlink()
    return folder


def with_a_tokenizer_too_large(folder: Path) -> Path:
    return in_meta(folder, replace(PARAMS, vocab_size=96), torch.bfloat16)


def with_another_tokenizer(folder: Path) -> Path:
    """Write a model with the tokenizer of the built-in one, but other splits."""
    source = in_meta(folder.with_name("meta"), PARAMS, torch.bfloat16)
    assert main([str(source), str(folder)]) == 0
    shutil.rmtree(source)
    (folder / "tokenizer.model").unlink()
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}+"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def with_large_values(folder: Path) -> Path:
    return in_meta(folder, PARAMS, torch.bfloat16, scale=1e6)


def narrow(folder: Path) -> Path:
    return in_meta(folder, Params(48, 1, 2, 2, 2304, 24, 96, 1e-5, 10000.0, None, 512), torch.bfloat16)


def plain(folder: Path) -> Path:
    return in_meta(folder, PARAMS, torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "name", "options", "message"),
    [
        (without_tokenizer, "new.gguf", "", "SOURCE: there is no tokenizer, which belongs into a GGUF file"),
        (
            with_a_tokenizer_too_large,
            "new.gguf",
            "",
            "SOURCE/tokenizer.model: has 2304 tokens, but the model has 96; give the model's tokenizer as "
            "tokenizer.json or tokenizer.model in SOURCE",
        ),
        (with_another_tokenizer, "new.gguf", "", "SOURCE/tokenizer.json: splits or merges a text in another way"),
        (with_large_values, "new.gguf", "--outtype f16", "blk.0.attn_v.weight: has values beyond 65,504"),
        (
            narrow,
            "new.gguf",
            "--outtype q8_0",
            "tok_embeddings.weight: its rows of 48 values do not divide into blocks",
        ),
        (plain, "new", "--to gguf", "new: the name of a GGUF file ends in .gguf"),
        (plain, "new.gguf", "--to hf", "new.gguf: the name of a GGUF file ends in .gguf"),
        (plain, "new", "--outtype q8_0", "--outtype q8_0: is only for a GGUF file"),
        (plain, "new.gguf", "--shards 2", "--shards 2: is only for Meta's format"),
        (plain, "new.gguf", "--outtype q4_0", "argument --outtype: invalid choice: 'q4_0'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused(
    make: Any,
    name: str,
    options: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(Path("source"))
    assert refusal(capsys, source, name, *options.split()).startswith(message.replace("SOURCE", str(source)))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
