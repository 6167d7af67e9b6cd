"""Fast operations for the CPU: few tokens at a time at the speed of the memory, many at that of the matrix units.

The C source, cpu_kernels.c, is compiled when it is first needed, in some seconds, for the processor at hand, and kept
in the user's cache folder. It is called by ctypes: that costs 2 µs a call and no start-up, where
torch.utils.cpp_extension compiles for half a minute and torch.compile in every process anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..ops import Ops, Tap
from ..quantization.int8 import Int8
from ..quantization.matrix import Matrix, linear
from ..system.files import atomic_write

FEW = 16  # tokens: up to so many are computed by the kernels on every processor, all with the same bits
_MOST = 128  # tokens: with more, torch is faster, which brings the matrix into another order first, or widens it
_MOST_INT8 = 64  # the same, for int8 without tiles; by tiles there is no such number
_MOST_KEYS = 256  # to attend to, for more tokens than a few; with more, torch is faster
_LONGEST = 2**17  # values of a row; above that the sum of int8 products might overflow 32 bits
QUERIES = 128  # tokens that attend to earlier ones at a time, where there are more than a few
_SOURCE = Path(__file__).with_name("cpu_kernels.c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma")
_FLAGS = ("-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC")
# what the compiler is told for each kind of processor; native: the one that it runs on
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "native": ("-march=native",),
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),  # SSE2 on x86, NEON on ARM
}


class CannotBuild(Exception):
    """There is no compiler, or it fails; the message says which."""


class _Shape(ctypes.Structure):
    _fields_ = [  # as ctypes wants it
        (name, ctypes.c_int64)
        for name in (
            *("n_tokens", "n_heads", "n_kv_heads", "head_dim", "start", "use_tiles"),
            *("q_stride", "key_stride", "value_stride"),
        )
    ]


class _CInt8(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Int8._fields]


def build_kernels(instruction_set: str = "native") -> ctypes.CDLL:
    """The compiled kernels, from the user's cache folder if they are there. Raises CannotBuild."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        raise CannotBuild("there is no C compiler (cc)")
    flags = [*_FLAGS, *INSTRUCTION_SETS[instruction_set]]
    # what the compiler defines tells its version and what it takes this processor to be
    defined = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
    key = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), " ".join(flags).encode(), defined))).hexdigest()[:20]
    folder = _cache_folder()
    library = next(filter(_is_whole, folder.glob(f"cpu_kernels-{key}-*.so")), None) or _build(
        compiler, flags, folder, f"cpu_kernels-{key}"
    )
    try:
        for library_of_torch in (Path(torch.__file__).parent / "lib").iterdir():
            if re.match(r"lib(g|i)?omp", library_of_torch.name):
                ctypes.CDLL(str(library_of_torch), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CannotBuild(f"{library} cannot be loaded ({error})") from error


def _build(compiler: Sequence[str], flags: Sequence[str], folder: Path, name: str) -> Path:
    """Compile the kernels -> the library in `folder`, whose name ends with the digest of its content."""
    with tempfile.TemporaryDirectory() as scratch:
        objects, built = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        _run([*compiler, *flags, "-c", str(_SOURCE), "-o", str(objects)])
        # without -fopenmp, so that it takes OpenMP from torch: two pools of threads would fight for the processors
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([*compiler, "-shared", *undefined, str(objects), "-o", str(built), "-lm"])
        content = built.read_bytes()
    library = folder / f"{name}-{_digest(content)}.so"
    try:
        with atomic_write(library) as part:
            part.write_bytes(content)
    except UserError as error:
        raise CannotBuild(str(error)) from error
    return library


def _is_whole(library: Path) -> bool:
    """Whether its content is what its name says: one that was cut short would be a bus error at each start."""
    return library.stem.rpartition("-")[2] == _digest(library.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root, "llama3_raw")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be made ({error.strerror})") from error
    return folder


def _run(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{command[0]} fails: {error.stderr.decode(errors='replace').strip()[-200:]}") from error


def make_ops(kernels: ctypes.CDLL) -> Ops:
    """The operations with these kernels. A product that they do not do (fp32, say) is torch's."""
    by_kernels = _Kernels(kernels)
    return Ops(
        embed=F.embedding, linear=by_kernels.linear, attend=by_kernels.attend, max_packed=by_kernels.max_packed()
    )


class _Kernels:
    """The compiled kernels, for tensors that they do, and torch for others."""

    def __init__(self, kernels: ctypes.CDLL):
        self._kernels = kernels
        self._has_tiles = bool(kernels.has_tiles())
        self._is_x86 = kernels.width() >= 8  # NEON is not measured, beside Apple's matrix units, say

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in], weight [out, in] -> [..., out]; few rows of bf16 at the speed of the memory."""
        outputs, length = weight.shape
        rows = x.numel() // length
        is_int8 = isinstance(weight, Int8)
        by_tiles = (
            self._has_tiles and outputs % 32 == 0 and length % (64 if is_int8 else 32) == 0 and length <= _LONGEST
        )
        if not (rows > 0 and length % 32 == 0 and _is_plain_bf16(x)):
            return linear_by_torch(x, weight)
        if not (isinstance(weight, Int8) or (_is_plain_bf16(weight) and weight.is_contiguous())):
            return linear_by_torch(x, weight)
        if rows > FEW and rows > self._most_rows(is_int8, by_tiles):
            return linear_by_torch(x, weight)
        return self._product(x.contiguous(), weight, by_tiles)

    def _most_rows(self, is_int8: bool, by_tiles: bool) -> float:
        """With more rows torch is faster."""
        if by_tiles:
            return math.inf if is_int8 else _MOST
        if not self._is_x86 or not fp32_is_faster():
            return FEW
        return _MOST_INT8 if is_int8 else _MOST

    def max_packed(self) -> int:
        """How many tokens of several prompts get the same bits together as alone, in bf16 and in int8."""
        return int(min(self._most_rows(is_int8, self._has_tiles) for is_int8 in (False, True)))

    def _product(self, x: Tensor, weight: Matrix, by_tiles: bool) -> Tensor:
        """x [..., in] contiguous, weight [out, in] -> [..., out]"""
        outputs, length = weight.shape
        rows = x.numel() // length
        y = x.new_empty((*x.shape[:-1], outputs))
        if isinstance(weight, Int8):
            multiply = self._kernels.linear_int8
            matrices: tuple[Any, Any] = (None, ctypes.byref(_CInt8(*map(_pointer, weight))))
        else:
            multiply = self._kernels.linear_bf16
            matrices = (_pointer(weight), None)
        if by_tiles:
            multiply = self._kernels.linear_tiles
        if multiply(_pointer(x), *matrices, _pointer(y), *map(ctypes.c_int64, (rows, outputs, length))):
            raise MemoryError(f"no memory for the product of {rows} tokens with a matrix {list(weight.shape)}")
        return y

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
        """As model.attend, but there are no scores to tap. A row of a batch has the same bits as alone."""
        n_tokens, n_heads, head_dim = q.shape[-3:]
        are_plain = all(
            _is_plain_bf16(x) and x.dim() <= 4 and x.stride()[-2:] == (head_dim, 1) for x in (q, keys, values)
        )
        use_tiles = self._has_tiles and n_heads // keys.shape[-2] % 4 == 0
        is_short = n_tokens <= FEW or (self._is_x86 and keys.shape[-3] <= _MOST_KEYS)
        if not are_plain or head_dim % 32 or not (is_short or use_tiles):
            return attend_by_torch(q, keys, values, start)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        rows = zip(*(x.view(-1, *x.shape[-3:]) for x in (q, keys, values, out)), strict=True)  # one for a lone prompt
        starts = itertools.repeat(start) if isinstance(start, int) else start.view(-1).tolist()
        for (q_row, keys_row, values_row, out_row), begin in zip(rows, starts, strict=False):
            self._attend_row(q_row, keys_row, values_row, out_row, begin, use_tiles)
        return out

    def _attend_row(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, start: int, use_tiles: bool) -> None:
        """q and out [T, n_heads, head_dim], keys and values [S, n_kv_heads, head_dim]"""
        n_tokens, n_heads, head_dim = q.shape
        strides = (q.stride(0), keys.stride(0), values.stride(0))
        for first in range(0, n_tokens, FEW):  # so that what is made on the way stays small
            few, to = q[first : first + FEW], out[first : first + FEW]
            shape = _Shape(len(few), n_heads, keys.shape[-2], head_dim, start + first, use_tiles, *strides)
            if self._kernels.attend(*map(_pointer, (few, keys, values, to)), ctypes.byref(shape)):
                raise MemoryError(f"no memory to attend to {start + n_tokens} tokens")


def read_loop(kernels: ctypes.CDLL, x: Tensor) -> None:
    """Reads all of a contiguous tensor on the CPU once, as fast as the memory goes; for measuring."""
    kernels.read_loop.restype = ctypes.c_float
    kernels.read_loop(_pointer(x), ctypes.c_int64(x.nbytes // 256 * 64))


def linear_by_torch(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; in fp32 where the processor has no instructions for bf16."""
    if x.dtype == torch.bfloat16 and fp32_is_faster():
        return linear(x, weight, torch.float32)
    return linear(x, weight)


def fp32_is_faster() -> bool:
    """Whether torch multiplies in fp32 faster than in bf16 here: on a CPU without instructions for bf16.

    By a factor of at least two in either direction on all processors that were tried.
    """
    has = torch.cpu.get_capabilities()
    with_bf16 = any(has.get(instructions) for instructions in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: of ARM
    return not (with_bf16 and torch.backends.mkldnn.is_available())  # without which torch uses none of them


def attend_by_torch(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor) -> Tensor:
    """As model.attend, by blocks of tokens and keys, never with all scores in memory at once. (Dao et al. 2022)"""
    n_kv_heads, n_keys = keys.shape[-2], keys.shape[-3]
    n_rep = q.shape[-2] // n_kv_heads
    original = q.dtype
    in_fp32 = original == torch.bfloat16 and q.device.type == "cpu" and fp32_is_faster()
    dtype = torch.float32 if in_fp32 else original
    q, keys, values = (x.to(dtype) for x in (q, keys, values))
    keys, values = keys.transpose(-3, -2), values.transpose(-3, -2)  # [..., n_kv_heads, S, head_dim]
    out = []
    for begin, block in zip(itertools.count(0, QUERIES), q.split(QUERIES, dim=-3), strict=False):
        length = block.shape[-3]
        offsets = torch.arange(begin, begin + length, device=q.device)
        positions = start + offsets if isinstance(start, int) else start.unsqueeze(-1) + offsets  # [..., T]
        end = start + begin + length if isinstance(start, int) else n_keys  # what is behind it, none of them sees
        seen = torch.arange(end, device=q.device) <= positions.unsqueeze(-1)  # [..., T, S]
        # the query heads that share a kv head become one with so many times the tokens: no key is repeated for them
        block = block.unflatten(-2, (n_kv_heads, n_rep)).movedim(-4, -2).flatten(-3, -2)
        seen = torch.cat([seen] * n_rep, dim=-2).unsqueeze(-3)  # [..., 1, n_rep * T, S]
        four = (1,) * (4 - block.dim())  # torch works by blocks on four dimensions only, the mask's too
        attended = F.scaled_dot_product_attention(
            block.reshape(*four, *block.shape),  # [..., n_kv_heads, n_rep * T, head_dim]
            keys[..., :end, :].reshape(*four, *keys[..., :end, :].shape),
            values[..., :end, :].reshape(*four, *values[..., :end, :].shape),
            attn_mask=seen.reshape(*(1,) * (4 - seen.dim()), *seen.shape),
        )
        attended = attended.reshape(block.shape).unflatten(-2, (n_rep, length)).movedim(-2, -4).flatten(-3, -2)
        out.append(attended)  # [..., T, n_heads, head_dim]
    return torch.cat(out, dim=-3).to(original)


def _is_plain_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not x.requires_grad


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _keep_freed_memory() -> None:
    """Has the C library keep what is freed, instead of giving it back to the system and asking again, page by page.

    The tensors that a prompt of 256 tokens makes on its way cost a tenth of its time otherwise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc's; by the numbers of its malloc.h
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes


@functools.cache
def fast_ops() -> Ops:
    """The fast operations for this machine's CPU; one line on stderr says what is lost where there is no compiler."""
    _keep_freed_memory()
    try:
        return make_ops(build_kernels())
    except CannotBuild as reason:
        print(f"llama3_raw: {reason}; tokens come about half as fast, by torch's own products", file=sys.stderr)
        return Ops(
            embed=F.embedding,
            linear=linear_by_torch,
            attend=lambda q, keys, values, start, tap: attend_by_torch(q, keys, values, start),
        )
