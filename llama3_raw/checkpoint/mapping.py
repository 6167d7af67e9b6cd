"""Files as tensors: windows into what torch.save or safetensors wrote, in which nothing can run.

On the CPU nothing is read or copied: each tensor's pages come in when they are first used, may be dropped again, and
are private, so a write to a weight never reaches the file.
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, in_short
from ..system.files import read_beginning
from ..weights import DTYPES, SCALE_ENDINGS

# tables that some checkpoints carry along and that are computed here instead
_IGNORED_ENDINGS = ("rope.freqs", "rotary_emb.inv_freq")

NOT_READ = "only bfloat16, float16 and float32 are read; take the original, not quantised weights"


def _map_file(file: Path) -> mmap.mmap:
    """The file as memory: writes stay private, and no swap is reserved, so that it may be larger than the RAM."""
    try:
        with open(file, "rb") as opened:
            if sys.platform == "win32":
                return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in Python from 3.13
            flags, protection = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(opened.fileno(), 0, flags=flags, prot=protection)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be mapped ({error.strerror}); is there a limit on memory, by ulimit -v say?"
        ) from error


def map_checkpoint(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of a file that torch.save wrote. Only plain tensors are unpickled; nothing in the file can run."""
    if not read_beginning(file).startswith(b"PK"):
        raise UserError(f"{file}: not a checkpoint of torch.save (not a zip file); download it again")
    memory = _map_file(file)
    records, structure = _structure(file, memory)
    tensors = {}
    for name, tensor in structure.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{file}: {name!r} should be a name with a plain tensor, is a {what}; download it again")
        if name.endswith(_IGNORED_ENDINGS):
            continue
        if not tensor.numel():
            raise UserError(f"{file}: {name} is empty; download the file again")
        try:
            tensors[name] = _window(tensor, memory, records)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{file}: tensor {name} is damaged ({in_short(error)}); download it again") from error
    return tensors


def _structure(file: Path, memory: mmap.mmap) -> tuple[dict[int, int], dict[Any, Any]]:
    """Where the records of a file begin, with their lengths, and what its pickle holds, tensors without content."""
    try:
        records = _check_records(file, memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has remarks on odd pickles, which are none of the user's making
            structure = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        content = f"{code[1]}, which could run code, " if code else "something other than plain tensors "
        raise UserError(f"{file}: holds {content}and is refused; download it from a source that you trust") from error
    except Exception as error:  # on damaged bytes zipfile and torch raise nearly every kind there is
        raise UserError(f"{file}: damaged or cut short ({in_short(error)}); download it again") from error
    if not isinstance(structure, dict):
        kind = type(structure).__name__
        raise UserError(f"{file}: should hold a dictionary of tensors, holds a {kind}; download it again")
    return records, structure


def _window(tensor: Tensor, memory: mmap.mmap, records: Mapping[int, int]) -> Tensor:
    """The tensor with its content: its storage remembers where in the file that is. Raises ValueError if it is not."""
    storage = tensor.untyped_storage()
    offset, count = storage._checkpoint_offset, storage.nbytes() // tensor.dtype.itemsize
    if offset is None or records.get(offset) != storage.nbytes():
        raise ValueError("its bytes are not where they should be")
    whole = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _check_records(file: Path, memory: mmap.mmap) -> dict[int, int]:
    """Where the records of a zip file begin -> how many bytes each has. Raises ValueError where that cannot be.

    torch believes the directory, and checks no checksum: with a bit of it turned, other bytes would be the weights.
    So each record should have the name before it and its end behind it; the data of the tensors is not read.
    """
    records = {}
    with zipfile.ZipFile(file) as archive:
        directory = archive.infolist()
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_RANDOM)  # or each record's few bytes would bring megabytes around them
    for entry in directory:
        name_length, extra_length = struct.unpack_from("<26xHH", memory, entry.header_offset)
        name_begin = entry.header_offset + 30
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        begin = name_begin + name_length + extra_length
        end = begin + entry.file_size
        # every piece of a zip file begins with PK
        if memory[name_begin : name_begin + name_length] != name or memory[end : end + 2] != b"PK":
            raise ValueError(f"the zip directory is wrong about {entry.filename}")
        records[begin] = entry.file_size
        if "/data/" in entry.filename:
            continue
        content = memory[begin:end]
        if entry.CRC and zlib.crc32(content) != entry.CRC:  # 0: saved without checksums
            raise ValueError(f"the checksum of {entry.filename} is wrong")
        if entry.filename.endswith("/byteorder") and content != sys.byteorder.encode():  # which torch dies of
            raise ValueError(f"its byte order is {content!r}, this machine's is {sys.byteorder}")
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NORMAL)
    return records


def map_safetensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file."""
    read_beginning(file)
    try:
        with safe_open(file, framework="np"):  # checks the header and the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({in_short(error)}); download it again") from error
    memory = _map_file(file)
    header_end = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8:header_end])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        has_scales = all(name + ending in header for ending in SCALE_ENDINGS)
        dtype = torch.int8 if entry["dtype"] == "I8" and has_scales else DTYPES.get(entry["dtype"])
        begin, end = entry["data_offsets"]
        if name.endswith(_IGNORED_ENDINGS):
            continue
        if dtype is None or begin == end:
            raise UserError(f"{file}: tensor {name} is {entry['shape']} {entry['dtype']}; {NOT_READ}")
        flat = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=header_end + begin)
        tensors[name] = flat.view(entry["shape"])
    return tensors
