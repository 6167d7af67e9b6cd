"""What can go wrong in the world, each case a row of one table, and damaged bytes of every kind.

One line on stderr that names the file or option and the way out, exit status 2, nothing on stdout, and every file as
it was before; a traceback only with --debug.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import flat, half_split, random_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama3_raw
from llama3_raw import Params, Tokenizer, UserError, perplexity
from llama3_raw.__main__ import main
from llama3_raw.bench import __main__ as bench
from llama3_raw.chat import __main__ as chat
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.mapping import map_checkpoint
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.cli.entry_point import command_line_tool
from llama3_raw.system import machine
from llama3_raw.weights import tensor_places

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"
SMALL = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 32, "norm_eps": 1e-5, "multiple_of": 16}
SMALL_HF = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 48,
}
CHECKPOINT = "consolidated.00.pth"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
WQ = "layers.0.attention.wq.weight"
HF_NORM = "model.norm.weight"


def write_small(folder: Path) -> None:
    """A model of a few hundred weights, in Meta's files."""
    params = Params.from_meta(SMALL)
    (folder / "params.json").write_text(json.dumps(SMALL))
    torch.save(to_state_dict(params, random_weights(params, torch.bfloat16, seed=0)), folder / CHECKPOINT)


def write_two_shards(folder: Path) -> None:
    """The same split in two as Meta does it: matrices by rows, but wo and w2 by columns, and norms in both."""
    write_small(folder)
    whole = torch.load(folder / CHECKPOINT, weights_only=True)
    for number in (0, 1):
        parts = {
            name: tensor if tensor.dim() == 1 else tensor.chunk(2, 1 if ".wo." in name or ".w2." in name else 0)[number]
            for name, tensor in whole.items()
        }
        torch.save({name: part.clone() for name, part in parts.items()}, folder / f"consolidated.{number:02}.pth")


def write_hf(folder: Path) -> None:
    """The same as Hugging Face has it, in two files with an index."""
    params = Params.from_meta(SMALL)
    tensors = to_state_dict(params, random_weights(params, torch.bfloat16, seed=0))
    files: dict[str, dict[str, Tensor]] = {SHARD: {}, SHARD.replace("1-of", "2-of"): {}}
    for place, file in zip(tensor_places(params), itertools.cycle(files), strict=False):
        tensor = tensors[place.meta_name]
        files[file][place.hf_name] = (
            half_split(tensor, params.head_dim) if place.field in ("wq", "wk") else tensor.clone()
        )
    for file, content in files.items():
        save_file(content, folder / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SMALL_HF))


def write_int8(folder: Path) -> None:
    """The small model with its matrices in int8."""
    with tempfile.TemporaryDirectory() as original:
        write_small(Path(original))
        save_quantized(Path(original), open_checkpoint(Path(original)), folder)


def copy_tiny(folder: Path) -> None:
    shutil.copytree(TINY, folder, dirs_exist_ok=True)


def unharmed(folder: Path) -> None:
    pass


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes | str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, length: Callable[[int], int]) -> Callable[[Path], Any]:
    """Damage: a file is only so long, of its whole length."""
    return lambda folder: os.truncate(folder / name, length((folder / name).stat().st_size))


def flip(name: str, find: bytes, offset: int) -> Callable[[Path], Any]:
    """Damage: one bit of the byte at an offset from the last place where `find` is."""

    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[content.rindex(find) + offset] ^= 1
        (folder / name).write_bytes(content)

    return apply


def rezip(change: Callable[[str, bytes], bytes | None]) -> Callable[[Path], Any]:
    """Damage: other records in the checkpoint's zip file, which is itself whole; None leaves one out."""

    def apply(folder: Path) -> None:
        content = io.BytesIO()
        with zipfile.ZipFile(folder / CHECKPOINT) as old, zipfile.ZipFile(content, "w") as new:
            for entry in old.infolist():
                record = change(entry.filename.split("/", 1)[1], old.read(entry))
                if record is not None:
                    new.writestr(entry.filename, record)
        (folder / CHECKPOINT).write_bytes(content.getvalue())

    return apply


def as_before_torch_2_6(name: str, record: bytes) -> bytes | None:
    """As in the files that Meta published: nothing tells torch that it may work the offsets out by itself."""
    return record if name in ("data.pkl", "version") or name.startswith("data/") else None


def swap_records(folder: Path) -> None:
    """Damage: the zip directory has two records of the same length, w1 and w3, in each other's place."""
    rezip(as_before_torch_2_6)(folder)
    content = bytearray((folder / CHECKPOINT).read_bytes())
    one, two = (content.rindex(f"consolidated.00/data/{number}".encode()) - 4 for number in (7, 9))
    content[one : one + 4], content[two : two + 4] = content[two : two + 4], content[one : one + 4]
    (folder / CHECKPOINT).write_bytes(content)


def save(make: Callable[[dict[str, Tensor]], Any], number: int = 0) -> Callable[[Path], Any]:
    """Damage: what is made of the checkpoint's tensors, as that shard."""

    def apply(folder: Path) -> None:
        tensors = torch.load(folder / CHECKPOINT, weights_only=True)
        torch.save(make(tensors), folder / f"consolidated.{number:02}.pth")

    return apply


def params(**changes: Any) -> Callable[[Path], Any]:
    """Damage: other values in params.json; None removes one."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "params.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "params.json").write_text(json.dumps(kept))

    return apply


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file -> its header, and the bytes behind it."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Damage: a shard with another header before the same data."""

    def apply(folder: Path) -> None:
        content, data = split(folder / SHARD)
        change(content)
        text = json.dumps(content).encode()
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data)

    return apply


def offsets(begin: int, end: int) -> Callable[[Path], Any]:
    """Damage: the header has the last norm begin and end so many bytes later."""

    def change(content: dict[str, Any]) -> None:
        entry = content[HF_NORM]
        entry["data_offsets"] = [entry["data_offsets"][0] + begin, entry["data_offsets"][1] + end]

    return header(change)


def drop_output(folder: Path) -> None:
    """Damage: the embeddings are not tied, and the output matrix is not there."""
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}, file)
    (folder / "config.json").write_text(json.dumps(SMALL_HF | {"tie_word_embeddings": False}))


class Malicious:
    """A pickle of it makes a folder "it ran" when it is loaded."""

    def __init__(self, folder: Path):
        self.trace = folder / "it ran"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


def save_code(folder: Path) -> None:
    torch.save({"norm.weight": Malicious(folder)}, folder / CHECKPOINT)


def ranks(change: Callable[[list[bytes]], Any]) -> Callable[[Path], Any]:
    """Damage: other lines in tokenizer.model."""

    def apply(folder: Path) -> None:
        lines = (folder / "tokenizer.model").read_bytes().splitlines()
        change(lines)
        (folder / "tokenizer.model").write_bytes(b"\n".join(lines))

    return apply


class Case(NamedTuple):
    """A row: what the line says, the name of the file or option first; what is done; how the tool is called."""

    says: tuple[str, ...]
    damage: Callable[[Path], Any] = unharmed
    arguments: tuple[str, ...] = ("Once upon a time",)
    start: Callable[[Path], Any] = copy_tiny
    stdin: bytes | None = None
    free: Mapping[str, int] = MappingProxyType({})  # bytes of "RAM", "container" or "GPU", where not the machine's own
    tool: Callable[[list[str]], int] = main


AGAIN = "download it again"
ONE_MODEL = "take params and weights of one model"
HTML = "<!doctype html><html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0"

THE_CHECKPOINT = {
    "missing": Case(("model: no model here", "it should hold params.json and consolidated.00.pth"), remove(CHECKPOINT)),
    "without its params": Case(("model: no model here", "it should hold params.json"), remove("params.json")),
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
    "two records that changed places": Case(
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
        (CHECKPOINT, f"{WQ} is torch.float32, should be torch.bfloat16", "--dtype makes them all one"),
        save(lambda t: t | {WQ: t[WQ].float()}),
    ),
    "fp64 throughout": Case(
        (CHECKPOINT, "is torch.float64; only bfloat16, float16 and float32 are read"),
        save(lambda t: {name: tensor.double() for name, tensor in t.items()}),
    ),
    "integers": Case(
        (CHECKPOINT, f"{WQ} is torch.int32; only", "take the original"), save(lambda t: t | {WQ: t[WQ].int()})
    ),
    "safetensors: empty": Case((SHARD, "the file is empty", AGAIN), write(SHARD, b""), start=write_hf),
    "safetensors: cut by 1 byte": Case(
        (SHARD, "damaged or cut short", AGAIN), cut(SHARD, lambda length: length - 1), start=write_hf
    ),
    "an HTML page behind a byte order mark": Case(
        (CHECKPOINT, "this is an HTML page", "download the file itself"),
        write(CHECKPOINT, b"\xef\xbb\xbf\n<!-- --><html>"),
    ),
    "a download that is not complete": Case(
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
        (SHARD, f"{HF_NORM} is [32] F8_E4M3; only", "take the original"),
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
    "safetensors: no output matrix where config.json wants one": Case(
        ("model: tensor lm_head.weight is missing, and config.json does not tie it", "download the rest"),
        drop_output,
        start=write_hf,
    ),
    "index: a missing shard": Case(
        (INDEX, f"names {SHARD}, which is no", "download it"), remove(SHARD), start=write_hf
    ),
    "index: a file outside the folder": Case(
        (INDEX, "names ../model.safetensors, which is no *.safetensors in its folder"),
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

BYTES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]

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
        ("params.json", "has 4,000 MB, where a few should do"), cut("params.json", lambda length: 4_000_000_000)
    ),
    "params: an absurd width": Case((CHECKPOINT, "should be [2304, 1073741820]", ONE_MODEL), params(dim=1073741820)),
    "params: an absurd feed-forward": Case(
        (CHECKPOINT, "should be [2147483647, 192]", ONE_MODEL), params(multiple_of=2**31 - 1)
    ),
    "params: an absurd vocabulary": Case(
        (CHECKPOINT, "should be [2147483647, 192]", ONE_MODEL), params(vocab_size=2**31 - 1)
    ),
    "params: more than absurd": Case(
        ("params.json", "vocab_size should be a positive integer"), params(vocab_size=2**40)
    ),
    "params: absurdly many layers": Case(("params.json", "1073741824 layers cannot be"), params(n_layers=2**30)),
    "params: many layers": Case((CHECKPOINT, "layers.4.attention_norm.weight is missing"), params(n_layers=9_999)),
    "params: an absurd context": Case(
        ("needed on cpu", "a cache for 2147483647 tokens", "what fits: --context"),
        params(max_seq_len=2**31 - 1),
        ("Once upon a time", "--max-new-tokens", str(10**12)),
    ),
    "tokenizer: missing": Case(("there is no tokenizer.model", "give --tokenizer FILE"), remove("tokenizer.model")),
    "tokenizer: missing where --tokenizer says": Case(
        ("none.model", "cannot be read", "check its name"), arguments=("x", "--tokenizer", "none.model")
    ),
    "tokenizer: empty": Case(("tokenizer.model", "the file is empty", AGAIN), write("tokenizer.model", b"")),
    "tokenizer: an HTML page": Case(("tokenizer.model", "this is an HTML page"), write("tokenizer.model", HTML)),
    "tokenizer: a git-lfs pointer": Case(("tokenizer.model", "git lfs pull"), write("tokenizer.model", LFS)),
    "tokenizer: of Hugging Face": Case(
        ("tokenizer.model", "a JSON file; take the repository's original/tokenizer.model"),
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
    "tokenizer: vocab_size that is not that of the embedding": Case(
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
        ("tokenizer.model: line 2049: the token b'A' was there before", AGAIN),
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
    "tokenizer: a rank that is no number": Case(
        ("tokenizer.model: line 10: should be base64 and a rank", AGAIN),
        ranks(lambda lines: lines.__setitem__(9, b"CQ== nine")),
    ),
    "tokenizer: binary": Case(
        ("tokenizer.model: line 1: should be base64", AGAIN), write("tokenizer.model", bytes(range(256)))
    ),
    "tokenizer: a file of 4 GB": Case(
        ("tokenizer.model", "has 4,000 MB, where a few should do"),
        cut("tokenizer.model", lambda length: 4_000_000_000),
    ),
}

USE = {
    "no prompt": Case(("give a prompt", "or - to read it from stdin"), arguments=()),
    "empty prompt": Case(("the prompt is empty", "give at least one character"), arguments=("",)),
    "empty stdin": Case(("the prompt is empty", "give at least one character"), arguments=("-",), stdin=b"\n"),
    "prompt longer than the context": Case(
        ("the prompt needs", "but the context holds 512", "shorten the prompt"), arguments=("word " * 600,)
    ),
    "prompt longer than --context": Case(
        ("the prompt needs", "but the context holds 2", "shorten the prompt"), arguments=("Once upon", "--context", "2")
    ),
    "invalid UTF-8 on stdin": Case(
        ("stdin: not valid UTF-8 at byte 2", "convert the text to UTF-8"), arguments=("-",), stdin=b"ab\xff"
    ),
    "unknown device": Case(
        ("--device abacus: there is no such device", "use auto, cpu, cuda"), arguments=("x", "--device", "abacus")
    ),
    "CUDA absent": Case(("--device cuda: torch sees 0", "use --device cpu"), arguments=("x", "--device", "cuda")),
    "CUDA GPU absent": Case(("--device cuda:77: torch sees 0",), arguments=("x", "--device", "cuda:77")),
    "Apple GPU absent": Case(("--device mps: torch sees no", "--device cpu"), arguments=("x", "--device", "mps")),
    "temperature below 0": Case(("--temperature should be 0",), arguments=("x", "--temperature", "-1")),
    "temperature that is no number": Case(("--temperature should be",), arguments=("x", "--temperature", "nan")),
    "top-p above 1": Case(("--top-p should be",), arguments=("x", "--top-p", "1.5")),
    "top-p of 0": Case(("--top-p should be",), arguments=("x", "--top-p", "0")),
    "min-p": Case(("--min-p should be",), arguments=("x", "--min-p", "-1")),
    "top-k": Case(("--top-k should be",), arguments=("x", "--top-k", "-1")),
    "top-k that is no number": Case(("--top-k", "--help"), arguments=("x", "--top-k", "many")),
    "unwritable folder: below a file": Case(
        ("params.json/new: cannot be made: Not a directory", "name a folder you may write to"),
        arguments=("--make-synthetic", "1b", "{folder}/params.json/new"),
        tool=bench.main,
    ),
    "unwritable folder: a file": Case(
        ("params.json: cannot be made: File exists", "name a folder you may write to"),
        arguments=("--make-synthetic", "1b", "{folder}/params.json"),
        tool=bench.main,
    ),
    "folder that holds a model": Case(
        ("consolidated.00.pth: is there already", "name another folder, or remove it first"),
        arguments=("--make-synthetic", "1b", "{folder}"),
        tool=bench.main,
    ),
    "--weights: nothing": Case(("--weights: should not be empty",), arguments=("x", "--weights", "")),
    "chat: --context above the model's": Case(
        ("--context 99999: the model's own context is 512",), arguments=("--context", "99999"), tool=chat.main
    ),
    "chat: --system that is not UTF-8": Case(
        ("--system: not valid UTF-8", "convert the text"), arguments=("--system", "\udcff"), tool=chat.main
    ),
    "--weights: no such folder": Case(
        ("--weights lost: there is no such folder, and weights/ holds",), arguments=("x", "--weights", "lost")
    ),
    "--weights: not in the Hugging Face cache": Case(
        ("--weights nobody/nothing: neither a folder here nor in the Hugging Face cache",),
        arguments=("x", "--weights", "nobody/nothing"),
    ),
    "--weights: a file": Case(
        ("--weights", "params.json: is a file; give the folder it is in"),
        arguments=("x", "--weights", "{folder}/params.json"),
    ),
    "--weights: a folder without a model": Case(("/: no model here",), arguments=("x", "--weights", "/")),
    "--weights: a name of 5,000 letters": Case(("File name too long",), arguments=("x", "--weights", "x" * 5000)),
    "--max-new-tokens": Case(("--max-new-tokens should be 0 or more",), arguments=("x", "--max-new-tokens", "-1")),
    "--context 0": Case(("--context", "should be 1 or more"), arguments=("x", "--context", "0")),
    "--context above the model's": Case(
        ("--context 99999: the model's own context is 512",), arguments=("x", "--context", "99999")
    ),
    "--threads 0": Case(("--threads", "should be 1 or more"), arguments=("x", "--threads", "0")),
    "--threads above the machine's": Case(
        ("--threads 99999: this process may use", "give at most that"), arguments=("x", "--threads", "99999")
    ),
    "--layers": Case(("--layers 99:", "4 layers; give a number from 1"), arguments=("x", "--layers", "99")),
    "--dtype": Case(("--dtype", "bfloat16"), arguments=("x", "--dtype", "int3")),
    "--seed": Case(("--seed: should be from 0",), arguments=("x", "--seed", "9" * 23)),
    "--stats": Case(("--stats", "json"), arguments=("x", "--stats=loud")),
    "--stop that is empty": Case(("--stop should not be empty",), arguments=("x", "--stop", "")),
    "--stop that looks like an option": Case(
        ("--stop", "a value that begins with - goes behind a ="), arguments=("x", "--stop", "---")
    ),
    "--ids: words": Case(("--ids: 'one' is not a token id", "give numbers"), arguments=("one two", "--ids")),
    "--ids: outside the vocabulary": Case(
        ("token id 99999 is outside the model's vocabulary of 2304",), arguments=("5 99999", "--ids")
    ),
    "--ids with --stop": Case(("--stop needs text", "leave one of them out"), arguments=("5", "--ids", "--stop", "x")),
    "perplexity: no file": Case(("FILE", "--help"), arguments=(), tool=perplexity.main),
    "perplexity: a file that is not there": Case(
        ("lost.txt: cannot be read: No such file", "check its name"), arguments=("lost.txt",), tool=perplexity.main
    ),
    "perplexity: an empty file": Case(
        ("text: is empty", "give a text"), write("text", b""), ("{folder}/text",), tool=perplexity.main
    ),
    "perplexity: empty stdin": Case(
        ("stdin: is empty", "give a text"), arguments=("-",), stdin=b"", tool=perplexity.main
    ),
    "perplexity: a file that is not UTF-8": Case(
        ("text: not valid UTF-8 at byte 2", "convert the text"),
        write("text", b"ab\xff"),
        ("{folder}/text",),
        tool=perplexity.main,
    ),
    "perplexity: text for --ids": Case(
        ("text: 'Once' is not a token id", "give numbers"),
        write("text", "Once upon"),
        ("{folder}/text", "--ids"),
        tool=perplexity.main,
    ),
    "perplexity: a lone id": Case(
        ("there is nothing to score", "give at least two"), arguments=("-", "--ids"), stdin=b"5", tool=perplexity.main
    ),
    "perplexity: an id outside the vocabulary": Case(
        ("token id 2304 is outside the model's vocabulary of 2304",),
        arguments=("-", "--ids"),
        stdin=b"5 2304",
        tool=perplexity.main,
    ),
    "perplexity: a stride beyond the context": Case(
        ("--stride 257: should be from 1 to the context of 256",),
        arguments=("-", "--context", "256", "--stride", "257"),
        stdin=b"Once",
        tool=perplexity.main,
    ),
    "perplexity: --context above the model's": Case(
        ("--context 513: the model's own context is 512",),
        arguments=("-", "--context", "513"),
        stdin=b"Once",
        tool=perplexity.main,
    ),
    "perplexity: --context of one token": Case(
        ("--context 1: should be 2 or more",), arguments=("-", "--context", "1"), stdin=b"Once", tool=perplexity.main
    ),
    "--quantize": Case(("--quantize", "int8"), arguments=("x", "--quantize", "int3")),
    "--quantize: with --max-ram": Case(
        ("--max-ram leaves the weights in their file", "by --save-quantized"),
        arguments=("x", "--quantize", "int8", "--max-ram", "9GB"),
    ),
    "--quantize: in int8 already": Case(
        ("--quantize int8: ", "model is in int8 already; leave it out"),
        arguments=("x", "--quantize", "int8"),
        start=write_int8,
    ),
    "--save-quantized: nothing": Case(("--save-quantized: should not be empty",), arguments=("--save-quantized", "")),
    "--save-quantized: the model's own folder": Case(
        ("model: is there already, and is not empty", "name another folder"), arguments=("--save-quantized", "{folder}")
    ),
    "--save-quantized: below a file": Case(
        ("params.json/new: cannot be written: ", "name another folder"),
        arguments=("--save-quantized", "{folder}/params.json/new"),
    ),
    "--save-quantized: a part of the layers": Case(
        ("--save-quantized writes the whole model", "leave --layers out"),
        arguments=("--save-quantized", "{folder}/new", "--layers", "2"),
    ),
    "unknown option": Case(("--nonsense", "--help"), arguments=("x", "--nonsense")),
    "half an option": Case(("--deb", "--help"), arguments=("x", "--deb")),
}

MACHINE = {
    "too little RAM for another dtype": Case(
        (
            CHECKPOINT,
            "MB are needed on cpu (weights in float32",
            "7.0 MB are free; what fits: no --dtype, or --layers 2",
        ),
        arguments=("x", "--dtype", "float32"),
        free={"RAM": 7_000_000},
    ),
    "too little left of the container": Case(
        (
            CHECKPOINT,
            "MB are needed on cpu (weights in float32",
            "7.0 MB are free; what fits: no --dtype, or --layers 2",
        ),
        arguments=("x", "--dtype", "float32"),
        free={"RAM": 10**10, "container": 7_000_000},
    ),
    "too little GPU memory": Case(
        (CHECKPOINT, "needed on cuda", "502.0 MB are free; what fits: --gpu-layers 1, or --device cpu, or --layers 1"),
        arguments=("x", "--device", "cuda"),
        free={"GPU": 502_000_000},
    ),
    "too little RAM for the cache": Case(
        (CHECKPOINT, "a cache for 512 tokens", "1.2 MB are free; what fits: --context 4"),
        arguments=("x", "--max-new-tokens", "999"),
        free={"RAM": 1_200_000},
    ),
    "too little RAM for the window of a chat": Case(
        (CHECKPOINT, "a cache for 512 tokens", "10.0 MB are free; what fits: --context 24"),
        arguments=(),
        stdin=b"hi\n",
        free={"RAM": 10_000_000},
        tool=chat.main,
    ),
    "too little RAM for the logits of a text to score": Case(
        (CHECKPOINT, "a cache for 512 tokens 0.5 MB, to work in 27.1 MB", "15.0 MB are free; what fits: --context 238"),
        arguments=("-",),
        stdin=b"Once upon a time " * 200,
        free={"RAM": 15_000_000},
        tool=perplexity.main,
    ),
    "too little RAM for anything": Case((CHECKPOINT, "nothing of it fits, take a smaller model"), free={"RAM": 1_000}),
}

WORLD = {
    f"{part}: {name}": case
    for part, cases in {
        "checkpoint": THE_CHECKPOINT,
        "params and tokenizer": PARAMS_AND_TOKENIZER,
        "use": USE,
        "machine": MACHINE,
    }.items()
    for name, case in cases.items()
}


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """An attempt to take a gigabyte more than the process has fails."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 1_000_000_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def content_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below a folder with its length and its content, of which 100 MB count, and every folder."""

    def beginning(file: Path) -> bytes:
        with open(file, "rb") as opened:
            return opened.read(100_000_000)

    return {path: (path.stat().st_size, beginning(path)) if path.is_file() else (0, b"") for path in folder.rglob("*")}


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: Mapping[str, int]) -> None:
    """The machine says that so much memory is free."""
    if "RAM" in free:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free["RAM"]))
    if "container" in free:
        monkeypatch.setattr(machine, "container_free", lambda: [free["container"]])
    if "GPU" in free:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["GPU"], 10**12))


@pytest.mark.parametrize("name", WORLD)
@pytest.mark.usefixtures("_no_gpu")
def test_one_line_and_nothing_damaged(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = WORLD[name]
    folder = tmp_path / "model"
    folder.mkdir()
    case.start(folder)
    case.damage(folder)
    before = content_of(tmp_path)
    arguments = [argument.format(folder=folder) for argument in case.arguments]
    if case.tool is not bench.main:
        arguments = ["--weights", str(folder), *arguments]
        if case.start is not copy_tiny:  # which has no tokenizer
            arguments = [*arguments, "--tokenizer", str(TINY / "tokenizer.model")]
    if case.stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    pretend_free(monkeypatch, case.free)

    with limited_memory(), warnings.catch_warnings(record=True) as remarks:
        status = case.tool(arguments)
    assert not remarks  # which would be more lines on stderr
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("llama3_raw: error: ")
    assert len(err) < 1000
    assert err.removesuffix("\n").isprintable()
    for text in case.says:
        assert text in err
    assert content_of(tmp_path) == before

    if case.stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    with pytest.raises((UserError, OSError)):  # which Python shows as a traceback
        case.tool([*arguments, "--debug"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited by Linux's RLIMIT_AS")
def test_a_limit_on_memory_that_the_files_exceed(tmp_path: Path) -> None:
    write_small(tmp_path)
    os.truncate(tmp_path / CHECKPOINT, 8_000_000_000)
    with limited_memory(), pytest.raises(UserError, match=r"consolidated\.00\.pth: cannot be mapped .* ulimit -v"):
        llama3_raw.load(tmp_path)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llama3_raw", "--weights", str(TINY), *arguments]


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["-"], b"ab\xff", "stdin: not valid UTF-8 at byte 2"),
        (["x", "--weights", "{folder}"], b"", "consolidated.00.pth: damaged or cut short"),
    ],
)
def test_a_process_says_the_same(tmp_path: Path, arguments: list[str], stdin: bytes, says: str) -> None:
    """What Python and torch print by themselves is in the count here."""
    copy_tiny(tmp_path)
    cut(CHECKPOINT, lambda length: length // 2)(tmp_path)
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr.decode()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_on_the_way(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    """When other programs take it after the check, say."""

    @command_line_tool
    def tool(arguments: Sequence[str]) -> int:
        raise kind("CUDA out of memory.\nTried to allocate 20 GB")

    assert tool([]) == 2
    line = "llama3_raw: error: out of memory (CUDA out of memory. Tried to allocate 20 GB); lower --max-new-tokens or "
    assert capsys.readouterr().err.startswith(line)
    with pytest.raises(kind):
        tool(["--debug"])


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(command("x", "--top-p", "7", "--debug"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback")


# What is no error: stdout or stderr that is closed. (A reader that goes away, a shell's redirections.)


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    long = command("Once upon a time", "--max-new-tokens", "400")
    with subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 141
    assert errors.splitlines() == [
        f"llama3_raw: {TINY} (--weights) on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "prompt", "status", "says"),
    [
        ("2>&-", "Once upon a time", 0, ""),
        (">&-", "Once upon a time", 0, "llama3_raw: stopped after 3 new tokens"),
        ("<&-", "-", 2, "llama3_raw: error: stdin is closed; give it a file by < FILE"),
        (">/dev/full", "Once upon a time", 2, "llama3_raw: error: output: No space left on device"),
    ],
)
def test_streams_that_are_closed_or_full(redirection: str, prompt: str, status: int, says: str) -> None:
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command(prompt, "--max-new-tokens", "3")]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert bool(done.stdout) == (redirection == "2>&-")
    assert says in (done.stderr.splitlines() or [""])[-1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_tiny(tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    os.mkfifo(tmp_path / CHECKPOINT)
    assert main(["x", "--weights", str(tmp_path)]) == 2
    assert f"{CHECKPOINT}: is not a file; put the model's file in its place" in capsys.readouterr().err


def test_another_file_of_a_similar_name_is_no_shard(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    shutil.copy(tmp_path / CHECKPOINT, tmp_path / "consolidated.00.bak.pth")
    llama3_raw.load(tmp_path)


def test_the_code_in_the_pickle_would_have_run(tmp_path: Path) -> None:
    """What the table's row refuses does its work where it is not refused."""
    save_code(tmp_path)
    with pytest.raises(UserError, match="mkdir, which could run code"):
        map_checkpoint(tmp_path / CHECKPOINT)
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / CHECKPOINT, weights_only=False)
    assert (tmp_path / "it ran").exists()


# Damaged bytes


@pytest.mark.parametrize("older", [False, True])
def test_no_byte_of_the_zip_directory_can_change_the_weights(tmp_path: Path, older: bool) -> None:
    """Nor one of the records' headers or of the pickle. (Those of the weights themselves the download checks.)"""
    write_small(tmp_path)
    if older:
        rezip(as_before_torch_2_6)(tmp_path)
    file = tmp_path / CHECKPOINT
    whole = bytearray(file.read_bytes())
    expected = [tensor.clone() for tensor in flat(llama3_raw.load(tmp_path).weights)]
    weights: set[int] = set()
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                begin = whole.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
                begin += int.from_bytes(whole[entry.header_offset + 28 : entry.header_offset + 30], "little")
                weights.update(range(begin, begin + entry.file_size))
    refused = 0
    for position in set(range(len(whole))) - weights:
        whole[position] ^= 0x01
        file.write_bytes(whole)
        whole[position] ^= 0x01
        try:
            loaded = llama3_raw.load(tmp_path)
        except UserError:
            refused += 1
        else:
            assert all(map(torch.equal, flat(loaded.weights), expected)), f"byte {position}"
    assert refused > 1000


Edit = tuple[str, int, bytes]
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "delete", "swap", "cut"]),
        st.integers(0, 2**16),
        st.binary(min_size=1, max_size=12) | st.sampled_from([b"99999999999", b"[[[", b'"', b"-", b"\xff" * 8]),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes: list[Edit], begin: int = 0, end: int | None = None) -> bytes:
    """The content after edits somewhere in the part from `begin` to `end`."""
    before, part, behind = content[:begin], content[begin:end], content[end:] if end is not None else b""
    for kind, position, new in changes:
        at = position % (len(part) + 1)
        if kind == "flip":
            part = part[:at] + bytes(byte ^ 1 << position % 8 for byte in part[at : at + 1]) + part[at + 1 :]
        elif kind == "overwrite":
            part = part[:at] + new + part[at + len(new) :]
        elif kind == "insert":
            part = part[:at] + new + part[at:]
        elif kind == "delete":
            part = part[:at] + part[at + len(new) :]
        elif kind == "swap":
            part = part[at : at + len(new)] + part[len(new) : at] + part[: len(new)] + part[at + len(new) :]
        else:
            part = part[:at]
    return before + part + behind


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model in each format, to be damaged and made whole again."""
    folders = {}
    for start in (write_small, write_hf):
        folders[start.__name__] = folder = tmp_path_factory.mktemp("damaged")
        start(folder)
    return folders


def read_damaged(file: Path, content: bytes, read: Callable[[], Any]) -> None:
    """Reads with this content in the file; whatever comes out but a UserError that names it is a failure."""
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        with limited_memory():
            read()
    except UserError as error:
        if str(file.parent) not in str(error):
            raise
    finally:
        file.write_bytes(whole)


def read_model(folder: Path) -> None:
    """Loads it, and reads every weight."""
    for tensor in flat(llama3_raw.load(folder, tokenizer=False).weights):
        tensor.sum()


@settings(max_examples=300)
@given(changes=edits, in_directory=st.booleans())
def test_a_damaged_checkpoint(models: dict[str, Path], changes: list[Edit], in_directory: bool) -> None:
    file = models["write_small"] / CHECKPOINT
    whole = file.read_bytes()
    begin = whole.index(b"PK\1\2") if in_directory else 0
    read_damaged(file, damaged(whole, changes, begin), lambda: read_model(file.parent))


@settings(max_examples=300)
@given(changes=edits)
def test_a_damaged_pickle(models: dict[str, Path], changes: list[Edit]) -> None:
    """In a zip file that is whole, checksum included, so that the unpickler gets to see it."""
    file = models["write_small"] / CHECKPOINT
    whole = file.read_bytes()
    rezip(lambda name, record: damaged(record, changes) if name == "data.pkl" else record)(file.parent)
    content = file.read_bytes()
    file.write_bytes(whole)
    read_damaged(file, content, lambda: read_model(file.parent))


@settings(max_examples=300)
@given(changes=edits, in_header=st.booleans())
def test_a_damaged_safetensors_file(models: dict[str, Path], changes: list[Edit], in_header: bool) -> None:
    file = models["write_hf"] / SHARD
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little") if in_header else len(whole)
    read_damaged(file, damaged(whole, changes, 0, end), lambda: read_model(file.parent))


@settings(max_examples=300)
@given(changes=edits, name=st.sampled_from(["params.json", "config.json", INDEX]))
def test_damaged_params(models: dict[str, Path], changes: list[Edit], name: str) -> None:
    file = models["write_small" if name == "params.json" else "write_hf"] / name
    read_damaged(file, damaged(file.read_bytes(), changes), lambda: read_model(file.parent))


# well-formed JSON that makes no sense; for a params.json see tests/test_params.py
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300)
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=values | st.lists(st.integers(0, 2**64), max_size=3) | st.sampled_from(["F64", "F4", "I8", "BOOL"]),
)
def test_values_in_a_safetensors_header(models: dict[str, Path], field: str, value: Any) -> None:
    file = models["write_hf"] / SHARD
    content, data = split(file)
    content[HF_NORM][field] = value
    text = json.dumps(content).encode()
    read_damaged(file, len(text).to_bytes(8, "little") + text + data, lambda: read_model(file.parent))


@settings(max_examples=300)
@given(value=values, deeper=st.booleans())
def test_values_in_an_index(models: dict[str, Path], value: Any, deeper: bool) -> None:
    file = models["write_hf"] / INDEX
    content = json.dumps({"weight_map": {HF_NORM: value} if deeper else value}).encode()
    read_damaged(file, content, lambda: read_model(file.parent))


@settings(max_examples=300)
@given(changes=edits)
def test_a_damaged_tokenizer(tmp_path_factory: pytest.TempPathFactory, changes: list[Edit]) -> None:
    file = tmp_path_factory.getbasetemp() / "tokenizer.model"
    file.write_bytes(b"\n".join(BYTES))
    read_damaged(file, damaged(file.read_bytes(), changes), lambda: Tokenizer(file).encode("hello"))
