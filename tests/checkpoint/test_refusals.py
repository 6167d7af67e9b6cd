"""Refused files: one table row for each case."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import llama3_raw
from llama3_raw import UserError
from llama3_raw.__main__ import main
from llama3_raw.checkpoint.mapping import map_checkpoint
from tests.damage import (
    BYTES,
    CHECKPOINT,
    HF_NORM,
    INDEX,
    SHARD,
    SMALL,
    SMALL_HF,
    WQ,
    copy_tiny,
    cut,
    drop_output,
    flip,
    header,
    limited_memory,
    offsets,
    params,
    ranks,
    remove,
    rezip,
    save,
    save_code,
    swap_records,
    write,
    write_hf,
    write_int8,
    write_small,
    write_two_shards,
)
from tests.refusals import AGAIN, HTML, LFS, ONE_MODEL, Case, check_refused

THE_CHECKPOINT = {
    "missing": Case(("model: no model here", "it should hold params.json and consolidated.00.pth"), remove(CHECKPOINT)),
    "without its params": Case(("model: holds consolidated.00.pth, but no params.json",), remove("params.json")),
    "empty": Case((CHECKPOINT, "the file is empty", AGAIN), write(CHECKPOINT, b"")),
    "cut after 1 byte": Case((CHECKPOINT, AGAIN), cut(CHECKPOINT, lambda length: 1)),
    "cut at 1 %": Case((CHECKPOINT, "damaged or cut short", AGAIN), cut(CHECKPOINT, lambda length: length // 100)),
    "cut at 50 %": Case((CHECKPOINT, "damaged or cut short", AGAIN), cut(CHECKPOINT, lambda length: length // 2)),
    "cut before the zip directory": Case(
        (CHECKPOINT, "damaged or cut short", AGAIN), cut(CHECKPOINT, lambda length: length - 10_000)
    ),
    "cut by 1 byte": Case((CHECKPOINT, "damaged or cut short", AGAIN), cut(CHECKPOINT, lambda length: length - 1)),
    "a bit of an offset in the zip directory": Case(
        (CHECKPOINT, "the zip directory is wrong about", AGAIN), flip(CHECKPOINT, b"PK\1\2", 43)
    ),
    "a bit of the end of the zip directory": Case((CHECKPOINT, "damaged", AGAIN), flip(CHECKPOINT, b"PK\6\6", 48)),
    "a bit of the pickle": Case((CHECKPOINT, "the checksum of", AGAIN), flip(CHECKPOINT, b"norm.weight", 3)),
    "two swapped records": Case(
        (CHECKPOINT, "the zip directory is wrong about", AGAIN), swap_records, start=write_small
    ),
    "a pickle of protocol 0": Case(
        (CHECKPOINT, "damaged or cut short", AGAIN),
        rezip(lambda name, record: b"\x80\0" if name == "data.pkl" else record),
    ),
    "a record shorter than its tensor": Case(
        (CHECKPOINT, "is damaged (its bytes are not where they should be)", AGAIN),
        rezip(lambda name, record: record[:-2] if name == "data/5" else record),
    ),
    "the byte order of another machine": Case(
        (CHECKPOINT, "its byte order is b'big', this machine's is little", AGAIN),
        rezip(lambda name, record: b"big" if name == "byteorder" else record),
    ),
    "an HTML page": Case((CHECKPOINT, "this is an HTML page", "download the file itself"), write(CHECKPOINT, HTML)),
    "a git-lfs pointer": Case((CHECKPOINT, "this is a git-lfs pointer", "git lfs pull"), write(CHECKPOINT, LFS)),
    "a bare pickle": Case((CHECKPOINT, "not a zip file", AGAIN), write(CHECKPOINT, b"\x80\x02}q\x00.")),
    "a pickle that would run code": Case((CHECKPOINT, "mkdir, which could run code, and is refused"), save_code),
    "a list": Case((CHECKPOINT, "should hold a dictionary of tensors, holds a list", AGAIN), save(lambda t: [t])),
    "a number for a tensor": Case((CHECKPOINT, f"{WQ!r} should be a name with a plain"), save(lambda t: t | {WQ: 3})),
    "a number for a name": Case((CHECKPOINT, "3 should be a name with a plain"), save(lambda t: t | {3: t[WQ]})),
    "a name that clears the screen": Case(
        (CHECKPOINT, "unexpected tensor \ufffd[2Jx", ONE_MODEL), save(lambda t: t | {"\x1b[2Jx": t[WQ]})
    ),
    "a sparse tensor": Case(
        (CHECKPOINT, WQ, "plain tensor, is a torch.sparse_coo"), save(lambda t: t | {WQ: t[WQ].float().to_sparse()})
    ),
    "a tensor without values": Case((CHECKPOINT, f"{WQ} is empty"), save(lambda t: t | {WQ: t[WQ][:0]})),
    "a missing tensor": Case(
        (CHECKPOINT, f"{WQ} is missing; it should be [192, 192]", ONE_MODEL), save(lambda t: t.pop(WQ) is None or t)
    ),
    "an extra tensor": Case(
        (CHECKPOINT, "unexpected tensor x.weight", ONE_MODEL), save(lambda t: t | {"x.weight": t[WQ]})
    ),
    "a wrong shape": Case(
        (CHECKPOINT, f"{WQ} is [5, 192], should be [192, 192]", ONE_MODEL), save(lambda t: t | {WQ: t[WQ][:5]})
    ),
    "a wrong dtype": Case(
        (CHECKPOINT, f"{WQ} is torch.float32, should be torch.bfloat16", "--dtype converts them all"),
        save(lambda t: t | {WQ: t[WQ].float()}),
    ),
    "fp64 throughout": Case(
        (CHECKPOINT, "is torch.float64; only bfloat16, float16 and float32 are supported"),
        save(lambda t: {name: tensor.double() for name, tensor in t.items()}),
    ),
    "integers": Case(
        (CHECKPOINT, f"{WQ} is torch.int32; only", "use the original"), save(lambda t: t | {WQ: t[WQ].int()})
    ),
    "safetensors: empty": Case((SHARD, "the file is empty", AGAIN), write(SHARD, b""), start=write_hf),
    "safetensors: cut by 1 byte": Case(
        (SHARD, "damaged or cut short", AGAIN), cut(SHARD, lambda length: length - 1), start=write_hf
    ),
    "an HTML page after a byte order mark": Case(
        (CHECKPOINT, "this is an HTML page", "download the file itself"),
        write(CHECKPOINT, b"\xef\xbb\xbf\n<!-- --><html>"),
    ),
    "an incomplete download": Case(
        (f"{CHECKPOINT}.part: the download is not complete", "llama3_raw.download again"),
        lambda folder: (folder / CHECKPOINT).rename(folder / f"{CHECKPOINT}.part"),
    ),
    "safetensors: an HTML page": Case((SHARD, "this is an HTML page"), write(SHARD, HTML), start=write_hf),
    "safetensors: a tensor longer than its shape": Case((SHARD, "damaged", AGAIN), offsets(0, 2), start=write_hf),
    "safetensors: a tensor shorter than its shape": Case((SHARD, "damaged", AGAIN), offsets(0, -2), start=write_hf),
    "safetensors: overlapping tensors": Case((SHARD, "damaged", AGAIN), offsets(-2, -2), start=write_hf),
    "safetensors: a tensor beyond the file": Case((SHARD, "damaged", AGAIN), offsets(10**9, 10**9), start=write_hf),
    "safetensors: an end before the beginning": Case((SHARD, "damaged", AGAIN), offsets(64, -64), start=write_hf),
    "safetensors: offsets of 2**64": Case((SHARD, "damaged", AGAIN), offsets(2**64, 2**64), start=write_hf),
    "safetensors: another shape": Case(
        (SHARD, "damaged", AGAIN), header(lambda h: h[HF_NORM].update(shape=[17])), start=write_hf
    ),
    "safetensors: 8-bit values": Case(
        (SHARD, f"{HF_NORM} is [32] F8_E4M3; only", "use the original"),
        header(lambda h: h[HF_NORM].update(shape=[32], dtype="F8_E4M3")),
        start=write_hf,
    ),
    "safetensors: a header of 2**62 bytes": Case(
        (SHARD, "damaged", AGAIN), write(SHARD, (2**62).to_bytes(8, "little") + b"{}"), start=write_hf
    ),
    "safetensors: a header of 90 MB in a short file": Case(
        (SHARD, "damaged", AGAIN), write(SHARD, (90_000_000).to_bytes(8, "little") + b"{}"), start=write_hf
    ),
    "safetensors: a header of 0 bytes": Case((SHARD, "damaged", AGAIN), write(SHARD, bytes(8)), start=write_hf),
    "safetensors: a tensor in two files": Case(
        ("00002-of-00002.safetensors", "is in another file as well", "keep the files of one model only"),
        lambda folder: shutil.copy(folder / SHARD, folder / SHARD.replace("1-of", "2-of")),
        start=write_hf,
    ),
    "safetensors: no output matrix, which config.json requires": Case(
        ("model: tensor lm_head.weight is missing, and config.json does not tie it", "download the rest"),
        drop_output,
        start=write_hf,
    ),
    "index: a missing shard": Case(
        (INDEX, f"names {SHARD}, which is no", "download it"), remove(SHARD), start=write_hf
    ),
    "index: a file outside the folder": Case(
        (INDEX, "names ../model.safetensors, which is no *.safetensors in this folder"),
        write(INDEX, '{"weight_map": {"a": "../model.safetensors"}}'),
        start=write_hf,
    ),
    "index: a list": Case((INDEX, "not a safetensors index", AGAIN), write(INDEX, "[]"), start=write_hf),
    "index: no map": Case((INDEX, "not a safetensors index", AGAIN), write(INDEX, "{}"), start=write_hf),
    "index: deep nesting": Case((INDEX, "not a safetensors index", AGAIN), write(INDEX, "[" * 99_999), start=write_hf),
    "index: a number for a file": Case((INDEX, "names 5"), write(INDEX, '{"weight_map": {"a": 5}}'), start=write_hf),
    "shards of models of different shapes": Case(
        ("model: tensor tok_embeddings.weight is [2304, 192] and [192, 192]", "all of its shards"),
        save(lambda t: t | {"tok_embeddings.weight": t[WQ]}, number=1),
    ),
    "shards of models of the same shapes": Case(
        ("model: the shards differ in norm.weight", "keep the shards of one model only"),
        save(lambda t: t | {"norm.weight": t["norm.weight"] + 1}, number=1),
        start=write_two_shards,
    ),
    "01 without 00": Case(
        ("consolidated.00.pth is missing, but consolidated.01.pth is there", "download the rest"),
        remove(CHECKPOINT),
        start=write_two_shards,
    ),
    "00 and 02 without 01": Case(
        ("consolidated.01.pth is missing, but consolidated.02.pth is there", "download the rest"), save(dict, number=2)
    ),
    "00 without 01": Case(
        (CHECKPOINT, "tok_embeddings.weight is [16, 16], should be [32, 16]", "all of its shards"),
        remove("consolidated.01.pth"),
        start=write_two_shards,
    ),
    "a shard too many": Case(
        ("model: tensor", "is [4608, 192], should be [2304, 192]", ONE_MODEL), save(dict, number=1)
    ),
    "int8: a missing file": Case(
        ("tensor layers.0.attention_norm.weight is missing", ONE_MODEL),
        remove("int8.000.safetensors"),
        start=write_int8,
    ),
    "int8: cut by 1 byte": Case(
        ("int8.000.safetensors: damaged", AGAIN),
        cut("int8.000.safetensors", lambda length: length - 1),
        start=write_int8,
    ),
    "weights of one model with params of another": Case(
        (CHECKPOINT, "unexpected tensor layers.1", "the params describe a model without it", ONE_MODEL),
        write("params.json", json.dumps(SMALL | {"vocab_size": 2304})),
    ),
    "weights of one model with config of another": Case(
        ("model: tensor", "is [32, 16], should be [32, 32]", ONE_MODEL),
        write("config.json", json.dumps(SMALL_HF | {"hidden_size": 32})),
        start=write_hf,
    ),
}

PARAMS_AND_TOKENIZER = {
    "params: empty": Case(("params.json", "the file is empty", AGAIN), write("params.json", b"")),
    "params: an HTML page": Case(("params.json", "this is an HTML page"), write("params.json", HTML)),
    "params: a git-lfs pointer": Case(("params.json", "git lfs pull"), write("params.json", LFS)),
    "params: cut short": Case(("params.json", "not valid JSON", AGAIN), cut("params.json", lambda length: length // 2)),
    "params: not UTF-8": Case(("params.json", "not valid JSON", AGAIN), write("params.json", b'{"dim": "\xff"}')),
    "params: deep nesting": Case(("params.json", "not valid JSON", AGAIN), write("params.json", "[" * 99_999)),
    "params: a number of 5,000 digits": Case(("params.json", "not valid JSON"), write("params.json", "9" * 5_000)),
    "params: a list": Case(
        ("params.json", "should hold a JSON object, holds a list", AGAIN), write("params.json", "[1]")
    ),
    "params: a missing value": Case(("params.json", "dim is missing", "download the file again"), params(dim=None)),
    "params: text for a number": Case(("params.json", "dim should be a positive integer, is '192'"), params(dim="192")),
    "params: an object for a number": Case(
        ("params.json", "norm_eps should be a positive number"), params(norm_eps={})
    ),
    "params: a text of a megabyte": Case(("params.json", "dim should be a positive int"), params(dim="x" * 1_000_000)),
    "params: a file of 4 GB": Case(
        ("params.json", "has 4,000 MB, more than such a file has"), cut("params.json", lambda length: 4_000_000_000)
    ),
    "params: an absurd width": Case((CHECKPOINT, "should be [2304, 1073741820]", ONE_MODEL), params(dim=1073741820)),
    "params: an absurd feed-forward": Case(
        (CHECKPOINT, "should be [2147483647, 192]", ONE_MODEL), params(multiple_of=2**31 - 1)
    ),
    "params: an absurd vocabulary": Case(
        (CHECKPOINT, "should be [2147483647, 192]", ONE_MODEL), params(vocab_size=2**31 - 1)
    ),
    "params: a vocabulary beyond 32 bits": Case(
        ("params.json", "vocab_size should be a positive integer"), params(vocab_size=2**40)
    ),
    "params: absurdly many layers": Case(("params.json", "1073741824 layers are impossible"), params(n_layers=2**30)),
    "params: many layers": Case((CHECKPOINT, "layers.4.attention_norm.weight is missing"), params(n_layers=9_999)),
    "params: an absurd context": Case(
        ("needed on cpu", "a cache for 2147483647 tokens", "what fits: --context"),
        params(max_seq_len=2**31 - 1),
        ("Once upon a time", "--max-new-tokens", str(10**12)),
    ),
    "tokenizer: missing": Case(("there is no tokenizer.model", "give --tokenizer FILE"), remove("tokenizer.model")),
    "tokenizer: missing file of --tokenizer": Case(
        ("none.model", "cannot be read", "check its name"), arguments=("x", "--tokenizer", "none.model")
    ),
    "tokenizer: empty": Case(("tokenizer.model", "the file is empty", AGAIN), write("tokenizer.model", b"")),
    "tokenizer: an HTML page": Case(("tokenizer.model", "this is an HTML page"), write("tokenizer.model", HTML)),
    "tokenizer: a git-lfs pointer": Case(("tokenizer.model", "git lfs pull"), write("tokenizer.model", LFS)),
    "tokenizer: of Hugging Face": Case(
        ("tokenizer.model: model should be a dict, is None", AGAIN),
        write("tokenizer.model", "{}"),
    ),
    "tokenizer: of Llama 2": Case(
        ("tokenizer.model", "a SentencePiece model"),
        write("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n"),
    ),
    "tokenizer: of another model": Case(
        ("tokenizer.model", "has 512 tokens, but the model has 2304", "--tokenizer"),
        write("tokenizer.model", b"\n".join(BYTES)),
    ),
    "tokenizer: another vocab_size than the embeddings": Case(
        (CHECKPOINT, "tok_embeddings.weight is [2304, 192], should be [512, 192] by the params", ONE_MODEL),
        lambda folder: (write("tokenizer.model", b"\n".join(BYTES))(folder), params(vocab_size=512)(folder)),
    ),
    "tokenizer: a rank twice": Case(
        ("tokenizer.model: line 10: the rank is 8, should be 9", AGAIN), ranks(lambda lines: lines.insert(9, lines[8]))
    ),
    "tokenizer: a missing rank": Case(
        ("tokenizer.model: line 10: the rank is 10, should be 9", AGAIN), ranks(lambda lines: lines.pop(9))
    ),
    "tokenizer: a token twice": Case(
        ("tokenizer.model: line 2049: the token b'A' is a duplicate", AGAIN),
        ranks(lambda lines: lines.append(b"QQ== 2048")),
    ),
    "tokenizer: a missing byte": Case(
        ("tokenizer.model: no token for byte 255", AGAIN), write("tokenizer.model", b"\n".join(BYTES[:-1]))
    ),
    "tokenizer: bad base64": Case(
        ("tokenizer.model: line 10: should be base64 and a rank, is b'??? 9'", AGAIN),
        ranks(lambda lines: lines.__setitem__(9, b"??? 9")),
    ),
    "tokenizer: a line without a rank": Case(
        ("tokenizer.model: line 10: should be base64 and a rank", AGAIN),
        ranks(lambda lines: lines.__setitem__(9, b"CQ==")),
    ),
    "tokenizer: a rank that is not a number": Case(
        ("tokenizer.model: line 10: should be base64 and a rank", AGAIN),
        ranks(lambda lines: lines.__setitem__(9, b"CQ== nine")),
    ),
    "tokenizer: binary": Case(
        ("tokenizer.model: line 1: should be base64", AGAIN), write("tokenizer.model", bytes(range(256)))
    ),
    "tokenizer: a file of 4 GB": Case(
        ("tokenizer.model", "has 4,000 MB, more than such a file has"),
        cut("tokenizer.model", lambda length: 4_000_000_000),
    ),
}


@pytest.mark.parametrize("name", THE_CHECKPOINT)
@pytest.mark.usefixtures("_no_gpu")
def test_a_checkpoint_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(THE_CHECKPOINT[name], tmp_path, capfd, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMS_AND_TOKENIZER)
@pytest.mark.usefixtures("_no_gpu")
def test_params_and_tokenizers_are_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(PARAMS_AND_TOKENIZER[name], tmp_path, capfd, monkeypatch)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited by Linux's RLIMIT_AS")
def test_files_above_the_memory_limit(tmp_path: Path) -> None:
    write_small(tmp_path)
    os.truncate(tmp_path / CHECKPOINT, 8_000_000_000)
    with limited_memory(), pytest.raises(UserError, match=r"consolidated\.00\.pth: cannot be mapped .* ulimit -v"):
        llama3_raw.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_instead_of_a_file_does_not_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_tiny(tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    os.mkfifo(tmp_path / CHECKPOINT)
    assert main(["x", "--weights", str(tmp_path)]) == 2
    assert f"{CHECKPOINT}: is not a file; replace it with the model's file" in capsys.readouterr().err


def test_a_file_with_a_similar_name_is_no_shard(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    shutil.copy(tmp_path / CHECKPOINT, tmp_path / "consolidated.00.bak.pth")
    llama3_raw.load(tmp_path)


def test_the_code_in_the_pickle_would_have_run(tmp_path: Path) -> None:
    """The code that is refused in the table above runs when it is not refused."""
    save_code(tmp_path)
    with pytest.raises(UserError, match="mkdir, which could run code"):
        map_checkpoint(tmp_path / CHECKPOINT)
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / CHECKPOINT, weights_only=False)
    assert (tmp_path / "it ran").exists()
