"""Memory-mapped tensors from files of torch.save or safetensors, without executing anything in them.

Nothing is read or copied: the system reads a page of a tensor when it is first used, and may drop it again. Pages are
private, so a write to a weight never reaches the file.
"""

from __future__ import annotations

import json
import logging
import mmap
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, in_short
from ..quantization.matrix import FORMATS, stored_names
from ..system.files import read_beginning
from ..weights import DTYPES, INTEGER_DTYPES

logger = logging.getLogger(__name__)

# buffers in some checkpoints that are computed here instead
_IGNORED_ENDINGS = (
    *("rope.freqs", "freqs_cis", "freqs_cos", "freqs_sin"),
    *("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    *("position_ids", "self_attn.bias", "self_attn.masked_bias"),
)

# what training programs call the weights in a file that holds more
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")

_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # of torch's format before 1.6

UNSUPPORTED_DTYPE = "only bfloat16, float16 and float32 are supported; use the original weights, not quantized ones"


def map_file(file: Path) -> mmap.mmap:
    """Map a file. Writes stay private, and no swap is reserved, so that it may be larger than the RAM."""
    try:
        with open(file, "rb") as opened:
            if sys.platform == "win32":
                return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in Python from 3.13
            flags, protection = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(opened.fileno(), 0, flags=flags, prot=protection)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be mapped ({error.strerror}); check the limits on memory, such as ulimit -v"
        ) from error


def map_checkpoint(file: Path) -> dict[str, Tensor]:
    """Map a file of torch.save: name -> tensor. Only plain tensors are unpickled; nothing in the file can run."""
    beginning = read_beginning(file)
    if beginning.startswith(_MAGIC):
        raise UserError(f"{file}: is in torch's format from before 1.6; {_rewriting(file, weights_only=True)}")
    if not beginning.startswith(b"PK"):
        raise UserError(f"{file}: not a checkpoint of torch.save (not a zip file); download it again")
    memory = map_file(file)
    records, structure = _read_structure(file, memory)
    tensors = {}
    for name, tensor in structure.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{file}: {name!r} should be a name with a plain tensor, is a {what}; download it again")
        if _is_ignored(file, name):
            continue
        if not tensor.numel():
            raise UserError(f"{file}: {name} is empty; download the file again")
        try:
            tensors[name] = _mapped(tensor, memory, records)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{file}: tensor {name} is damaged ({in_short(error)}); download it again") from error
    return tensors


def _read_structure(file: Path, memory: mmap.mmap) -> tuple[dict[int, int], dict[Any, Any]]:
    """Return the length of each record by its offset in the file, and the unpickled dictionary of meta tensors."""
    try:
        records = _check_records(file, memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of unusual pickles, which the user cannot change
            structure = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        protocol = _pickle_protocol(file)
        if protocol > 3:
            raise UserError(
                f"{file}: was saved with pickle_protocol={protocol}, which torch cannot read without running code that "
                f"may be in it; if you trust it, {_rewriting(file, weights_only=False)}"
            ) from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        content = f"{code[1]}, which could run code, " if code else "something other than plain tensors "
        raise UserError(f"{file}: holds {content}and is refused; download it from a source that you trust") from error
    except Exception as error:  # damaged bytes make zipfile and torch raise almost any exception
        raise UserError(f"{file}: damaged or cut short ({in_short(error)}); download it again") from error
    if not isinstance(structure, dict):
        kind = type(structure).__name__
        raise UserError(f"{file}: should hold a dictionary of tensors, holds a {kind}; download it again")
    return records, _unwrapped(structure)


def _unwrapped(structure: dict[Any, Any]) -> dict[Any, Any]:
    """Return the weights of a file that a training program saved, with the state of its optimizer or the like."""
    inner = [structure[name] for name in _WRAPPERS if isinstance(structure.get(name), dict)]
    if len(inner) == 1 and not any(str(name).endswith(".weight") for name in structure):
        return _unwrapped(inner[0])
    return structure


def _pickle_protocol(file: Path) -> int:
    """Return the pickle protocol of a file of torch.save; 2, its default, if that cannot be read."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return archive.read(name)[1]
    except (OSError, ValueError, LookupError, StopIteration, zipfile.BadZipFile):
        return 2


def _rewriting(file: Path, weights_only: bool) -> str:
    """Return how to rewrite a file of torch.save in torch's present format, as text."""
    code = f"torch.save(torch.load('{file.name}', weights_only={weights_only}), 'new.pth')"
    return f'rewrite it, and give the new file its name: python -c "import torch; {code}"'


def _is_ignored(file: Path, name: str) -> bool:
    """Whether a tensor is a buffer that is computed here instead."""
    if name.endswith(_IGNORED_ENDINGS):
        logger.debug("%s: %s is left out, because it is computed here", file, name)
        return True
    return False


def _mapped(tensor: Tensor, memory: mmap.mmap, records: Mapping[int, int]) -> Tensor:
    """Return a view of a meta tensor's bytes, whose offset its storage keeps. Raises ValueError if it has no record."""
    storage = tensor.untyped_storage()
    offset, count = storage._checkpoint_offset, storage.nbytes() // tensor.dtype.itemsize
    if offset is None or records.get(offset) != storage.nbytes():
        raise ValueError("its bytes are not where they should be")
    whole = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _check_records(file: Path, memory: mmap.mmap) -> dict[int, int]:
    """Return the length of each record of a zip file by its offset. Raises ValueError if the directory is wrong.

    torch trusts the directory and checks no checksum: after one flipped bit there, other bytes would become the
    weights. So each record must follow its own name and be followed by the next piece; tensor data is not read.
    """
    records = {}
    with zipfile.ZipFile(file) as archive:
        directory = archive.infolist()
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_RANDOM)  # do not read megabytes around each record's few bytes
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
        if entry.filename.endswith("/byteorder") and content != sys.byteorder.encode():  # crashes torch
            raise ValueError(f"its byte order is {content!r}, this machine's is {sys.byteorder}")
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NORMAL)
    return records


def map_safetensors(file: Path) -> dict[str, Tensor]:
    """Map a safetensors file: name -> tensor."""
    read_beginning(file)
    try:
        with safe_open(file, framework="np"):  # checks the header and the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({in_short(error)}); download it again") from error
    memory = map_file(file)
    header_end = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8:header_end])
    header.pop("__metadata__", None)
    of_matrices = _names_of_quantized(header)
    tensors = {}
    for name, entry in header.items():
        dtypes = DTYPES | INTEGER_DTYPES if name in of_matrices else DTYPES
        dtype = dtypes.get(entry["dtype"])
        begin, end = entry["data_offsets"]
        if _is_ignored(file, name):
            continue
        if dtype is None or begin == end:
            raise UserError(f"{file}: tensor {name} is {entry['shape']} {entry['dtype']}; {UNSUPPORTED_DTYPE}")
        flat = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=header_end + begin)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _names_of_quantized(names: Iterable[str]) -> set[str]:
    """Return the names of the tensors of quantized matrices, of which all tensors are there."""
    known = set(names)
    matrices = (stored_names(name, format_name) for name in known for format_name in FORMATS)
    return {name for matrix in matrices if known.issuperset(matrix) for name in matrix}
