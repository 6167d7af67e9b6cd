"""The header of a GGUF file: its metadata, and where its tensors are. (github.com/ggml-org/ggml, docs/gguf.md)

gguf.GGUFReader makes arrays of every string in it, which takes nine seconds for Llama 3's vocabulary; here the strings
are only skipped until they are needed, which takes a tenth of a second.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..quantization.blocks import BLOCK_TYPES, BlockType
from ..system.files import read_beginning
from .mapping import map_file

# types of metadata by number, as formats of struct; of a string this is its length
_FORMATS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 6

# the types of tensors by number (ggml_type in ggml.h)
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_BLOCKS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}

_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


class TensorInfo(NamedTuple):
    """A tensor in a GGUF file: its shape [out, in] or [dim], its type and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    kind: torch.dtype | BlockType
    begin: int  # in the file
    n_bytes: int


class GgufHeader(NamedTuple):
    """The header of a mapped GGUF file."""

    file: Path
    memory: mmap.mmap
    metadata: dict[str, Any]  # key -> number, string, list of numbers, or StringArray
    tensors: dict[str, TensorInfo]

    def map(self, name: str) -> Tensor:
        """Return a tensor as a view of the file; one in blocks as uint8 [out, bytes per row]."""
        info = self.tensors[name]
        dtype = torch.uint8 if isinstance(info.kind, BlockType) else info.kind
        flat = torch.frombuffer(self.memory, dtype=dtype, count=info.n_bytes // dtype.itemsize, offset=info.begin)
        return flat.view(*info.shape[:-1], -1)


class StringArray(NamedTuple):
    """An array of strings, decoded when `read` is called."""

    file: Path
    memory: mmap.mmap
    begin: int
    n_strings: int

    def read(self) -> list[str]:
        """Return the strings. Raises UserError if one is not UTF-8."""
        reader = _Reader(self.file, self.memory, self.begin)
        return [reader.string() for _ in range(self.n_strings)]


def read_header(file: Path) -> GgufHeader:
    """Map a GGUF file and read its header. Raises UserError if it is damaged or holds a type that is not supported."""
    beginning = read_beginning(file)
    if not beginning.startswith(b"GGUF"):
        raise UserError(f"{file}: not a GGUF file (it does not begin with GGUF); download it again")
    reader = _Reader(file, map_file(file), 4)
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise UserError(f"{file}: is a big-endian GGUF file; get the little-endian one")
    if version not in (2, 3):
        raise UserError(f"{file}: is version {version} of GGUF, supported are 2 and 3; get a newer file")
    n_tensors, n_keys = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.string()
        if key in metadata:
            raise reader.damaged(f"{in_short(key)} is in it twice")
        metadata[key] = reader.value(reader.number("I"))
    infos = [reader.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise reader.damaged(f"general.alignment = {in_short(alignment)} is not a multiple of 8")
    return GgufHeader(file, reader.memory, metadata, _located(reader, infos, alignment))


def _located(reader: _Reader, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Return the tensors by name, with offsets in the file instead of offsets in its data.

    Each must begin where the one before it ends, as in llama.cpp, and the last one end with the file: a wrong offset or
    type would be wrong weights.
    """
    data, expected, tensors = _padded(reader.offset, alignment), 0, {}
    for info in infos:
        if info.begin != expected:
            raise reader.damaged(f"tensor {info.name} begins at byte {info.begin} of the data, not at {expected}")
        end = data + info.begin + info.n_bytes
        if end > len(reader.memory):
            raise UserError(
                f"{reader.file}: cut short: tensor {info.name} ends at byte {end:,}, the file at "
                f"{len(reader.memory):,}; download it again"
            )
        if info.name in tensors:
            raise reader.damaged(f"tensor {info.name} is in it twice")
        tensors[info.name] = info._replace(begin=data + info.begin)
        expected = _padded(info.begin + info.n_bytes, alignment)
    if len(reader.memory) - data > expected:
        raise reader.damaged(f"{len(reader.memory) - data - expected:,} bytes follow its last tensor")
    return tensors


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Reader:
    """Reads one value after the other from a mapped file. Raises UserError beyond its end."""

    def __init__(self, file: Path, memory: mmap.mmap, offset: int):
        self.file, self.memory, self.offset = file, memory, offset

    def damaged(self, reason: str) -> UserError:
        return UserError(f"{self.file}: damaged: {reason}; download it again")

    def number(self, format: str) -> Any:
        try:
            (value,) = struct.unpack_from("<" + format, self.memory, self.offset)
        except struct.error as error:
            raise UserError(f"{self.file}: cut short in its header; download it again") from error
        self.offset += struct.calcsize("<" + format)
        return value

    def skip(self, n_bytes: int) -> int:
        """Skip bytes, and return where they begin."""
        begin = self.offset
        if n_bytes > len(self.memory) - begin:
            raise UserError(f"{self.file}: cut short in its header; download it again")
        self.offset += n_bytes
        return begin

    def string(self) -> str:
        begin = self.skip(self.number("Q"))
        try:
            return self.memory[begin : self.offset].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text {in_short(self.memory[begin : self.offset])} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Read a value of metadata of this type."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _FORMATS:
            raise self.damaged(f"there is no type {kind} of metadata")
        value = self.number(_FORMATS[kind])
        return _shortest(value) if kind == _FLOAT32 else value

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            array = StringArray(self.file, self.memory, self.offset, count)
            for _ in range(count):
                self.skip(self.number("Q"))
            return array
        if kind not in _FORMATS:
            raise self.damaged(f"there is no array of type {kind} in a model")
        format = _FORMATS[kind]
        begin = self.skip(count * struct.calcsize("<" + format))
        return list(struct.unpack_from(f"<{count}{format}", self.memory, begin))

    def tensor(self) -> TensorInfo:
        """Read where a tensor is; `begin` is still the offset in the data."""
        name, n_dimensions = in_short(self.string()), self.number("I")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise self.damaged(f"tensor {name} has {n_dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(n_dimensions)]))
        kind, begin = self.kind(name, self.number("I")), self.number("Q")
        n_values, n_bytes = (kind.n_values, kind.n_bytes) if isinstance(kind, BlockType) else (1, kind.itemsize)
        if 0 in shape or shape[-1] % n_values:
            raise self.damaged(f"tensor {name} is {list(shape)}, which has no rows of {n_values} values")
        return TensorInfo(name, shape, kind, begin, math.prod(shape) // n_values * n_bytes)

    def kind(self, name: str, number: int) -> torch.dtype | BlockType:
        if number in _DTYPES:
            return _DTYPES[number]
        if number in _BLOCKS:
            return BLOCK_TYPES[_BLOCKS[number]]
        raise UserError(
            f"{self.file}: tensor {name} is in {_name_of_type(number)}, which is not supported; get the model as "
            "Q4_K_M or Q8_0, or as safetensors"
        )


def _name_of_type(number: int) -> str:
    """Return the name of a type of tensors that is not supported here."""
    import gguf

    try:
        return gguf.GGMLQuantizationType(number).name
    except ValueError:
        return f"type {number}"


def _shortest(value: float) -> float:
    """Return the shortest decimal number with the same fp32 value: 1e-05 instead of 9.999999747378752e-06."""
    short = float(f"{value:.7g}")
    return short if not math.isfinite(value) or struct.pack("<f", short) == struct.pack("<f", value) else value
