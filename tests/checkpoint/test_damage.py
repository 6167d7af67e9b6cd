"""Damaged bytes of every kind: an error that names the file, never wrong weights."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llama3_raw
from llama3_raw import Tokenizer, UserError
from tests.damage import (
    BYTES,
    CHECKPOINT,
    HF_NORM,
    INDEX,
    SHARD,
    as_before_torch_2_6,
    limited_memory,
    rezip,
    split,
    write_hf,
    write_small,
)
from tests.references import flat


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_no_byte_of_the_zip_directory_can_change_the_weights(tmp_path: Path, older: bool) -> None:
    """Nor a byte of the records' headers or of the pickle. (The download checks those of the weights themselves.)"""
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
    """Return the content after edits between `begin` and `end`."""
    before, part, after = content[:begin], content[begin:end], content[end:] if end is not None else b""
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
    return before + part + after


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model in each format, to be damaged and restored."""
    folders = {}
    for start in (write_small, write_hf):
        folders[start.__name__] = folder = tmp_path_factory.mktemp("damaged")
        start(folder)
    return folders


def read_damaged(file: Path, content: bytes, read: Callable[[], Any]) -> None:
    """Read with this content in the file; any exception but a UserError that names its folder is a failure."""
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
    """Load a model and read every weight."""
    for tensor in flat(llama3_raw.load(folder, tokenizer=False).weights):
        tensor.sum()


@settings(max_examples=300)
@given(changes=edits, in_directory=st.booleans())
def test_a_damaged_checkpoint(models: dict[str, Path], changes: list[Edit], in_directory: bool) -> None:
    file = models["write_small"] / CHECKPOINT
    whole = file.read_bytes()
    begin = whole.index(b"PK\1\2") if in_directory else 0
    read_damaged(file, damaged(whole, changes, begin), lambda: read_model(file.parent))


@pytest.mark.slow
@settings(max_examples=300)
@given(changes=edits)
def test_a_damaged_pickle(models: dict[str, Path], changes: list[Edit]) -> None:
    """In an intact zip file, checksum included, so that the unpickler reads it."""
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


# well-formed JSON without meaning; for params.json see tests/test_params.py
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
