"""Fast operations for the CPU: few tokens at the speed of the memory, many at the speed of the matrix units.

The C sources in kernels/ are compiled for this processor when they are first needed, in some seconds, and kept in the
user's cache folder. They are called with ctypes, which costs 2 µs per call and no start-up time;
torch.utils.cpp_extension would compile for half a minute, and torch.compile anew in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..model import rms_norm, rope
from ..ops import Ops, Tap
from ..quantization.blocks import BLOCK_TYPES, Blocks
from ..quantization.int4 import OUTPUTS, Int4
from ..quantization.int8 import Int8
from ..quantization.matrix import Matrix, embed, linear, tensors_of
from ..system.files import atomic_write

MAX_DECODE_ROWS = 16  # tokens that the kernels compute on every processor, each with the same bits as alone
_MAX_ROWS = 128  # tokens in bf16; with more, torch is faster, as it first reorders or upcasts the matrix
_MAX_ROWS_BF16 = 64  # the same where torch has instructions for bf16, and this processor no tiles
_MAX_KEYS = 256  # for more than MAX_DECODE_ROWS tokens; with more keys, torch is faster
_MAX_LENGTH = 2**17  # values of a row, for the tiles; above that, a sum of int8 products may overflow 32 bits
QUERIES = 128  # tokens that torch attends for at a time
_KINDS = {name: number for number, name in enumerate((*BLOCK_TYPES, "int4"))}  # the enum in blocks.c
_SOURCES = sorted(Path(__file__).with_name("kernels").glob("*.[ch]"))
COMPILERS = ("gcc", "cc", "clang")  # gcc first: its OpenMP is torch's on Linux, and clang's is a library of its own
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# -fno-tree-ter keeps GCC from reordering the products of few bits: on AVX2 their sums did not fit into the registers
_OPENMP = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)  # Apple's clang refuses the latter
_FLAGS = ("-O3", "-fno-tree-ter", "-ffp-contract=fast", *_OPENMP, "-fPIC")
# compiler flags for each kind of processor; native: this one (clang for ARM knows it only as a CPU)
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "native": ("-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",),
    "amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx_vnni": (*_AVX2, "-mavxvnni"),
    "avx2": _AVX2,
    "baseline": (),  # SSE2 on x86, NEON on ARM
}

_LONGEST = 300  # seconds of a compiler; on a slow machine it takes 20


class CannotBuild(Exception):
    """The kernels cannot be compiled or loaded; the message is the reason."""


class _Shape(ctypes.Structure):
    _fields_ = [  # the layout of Shape in attention.c
        (name, ctypes.c_int64)
        for name in (
            *("n_tokens", "n_heads", "n_kv_heads", "head_dim", "start", "use_tiles"),
            *("q_stride", "key_stride", "value_stride"),
        )
    ]


class _Rotation(ctypes.Structure):
    _fields_ = [  # the layout of Rotation in pointwise.c
        (name, ctypes.c_int64) for name in ("n_rows", "n_heads", "head_dim", "n_angles", "angle_stride", "pair_stride")
    ]


class _CInt8(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Int8._fields]


class _CMatrix(ctypes.Structure):
    _fields_ = [  # the layout of Matrix in blocks.c
        *((name, ctypes.c_int64) for name in ("kind", "n_outputs", "length")),
        *((name, ctypes.c_void_p) for name in Int4._fields),
        ("is_interleaved", ctypes.c_int64),
    ]


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("linear_bf16", "linear_int8", "linear_tiles"), (*[_POINTER] * 4, *[_INT] * 3)),
    "linear_quantized": (*[_POINTER] * 3, _INT),
    "attend": (_POINTER,) * 5,
    "rms_norm": (*[_POINTER] * 3, *[_INT] * 2, ctypes.c_float),
    "rope": (_POINTER,) * 5,
    "swiglu": (*[_POINTER] * 3, _INT),
    "interleave": (_POINTER,) * 2,
    "read_loop": (_POINTER, _INT),
}


_REQUIRED = ("has_tiles", "width", *sorted(_SIGNATURES.keys() - {"linear_tiles"}))  # that is there only with tiles


def build_kernels(instruction_set: str = "native") -> ctypes.CDLL:
    """Load the kernels from the user's cache folder, and compile them first if necessary. Raises CannotBuild."""
    if sys.platform == "win32":
        raise CannotBuild("the kernels are not built on Windows")
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or list(filter(shutil.which, COMPILERS))[:1]
    except ValueError as error:
        raise CannotBuild(f"$CC is no command ({error})") from error
    if not compiler:
        raise CannotBuild(f"there is no C compiler ({', '.join(COMPILERS)})")
    flags = [*_FLAGS, *INSTRUCTION_SETS[instruction_set]]
    # the predefined macros identify the compiler's version and the processor that it compiles for
    defined = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
    sources = [file.read_bytes() for file in _SOURCES]
    key = _digest(b"\0".join((*sources, " ".join(flags).encode(), defined)))
    folder = _cache_folder()
    has_own_openmp = sys.platform == "linux" and b"__clang__" in defined
    library = next(filter(_is_complete, folder.glob(f"cpu_kernels-{key}-*.so")), None)
    if library is not None:
        return _loaded(library, has_own_openmp)
    return _build(compiler, flags, folder, f"cpu_kernels-{key}", has_own_openmp)


def _loaded(library: Path, has_own_openmp: bool) -> ctypes.CDLL:
    """Load a library of the kernels. Raises CannotBuild, and deletes one that is not what it should be."""
    try:
        for library_of_torch in (Path(torch.__file__).parent / "lib").iterdir():
            if re.match(r"lib(g|i)?omp", library_of_torch.name):
                ctypes.CDLL(str(library_of_torch), mode=ctypes.RTLD_GLOBAL)
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        raise CannotBuild(f"{library} cannot be loaded ({error})") from error
    lacking = [name for name in _REQUIRED if not hasattr(kernels, name)]
    if lacking:
        with contextlib.suppress(OSError):
            library.unlink()
        raise CannotBuild(f"the compiler left {lacking[0]} out")
    if has_own_openmp:
        kernels.omp_set_num_threads(torch.get_num_threads())
    for name, arguments in _SIGNATURES.items():
        if hasattr(kernels, name):
            getattr(kernels, name).argtypes = arguments
    return kernels


def _build(compiler: Sequence[str], flags: Sequence[str], folder: Path, name: str, has_own_openmp: bool) -> ctypes.CDLL:
    """Compile the kernels, keep the library in `folder`, and load it; its name ends with the digest of its content.

    has_own_openmp: link the compiler's own OpenMP. Without it they use torch's: two pools of threads would compete for
    the processors.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch, "kernels.so")

            def compiled(source: Path) -> str:
                name = str(Path(scratch, f"{source.stem}.o"))
                _run([*compiler, *flags, "-c", str(source), "-o", name])
                return name

            with ThreadPoolExecutor() as pool:
                objects = list(pool.map(compiled, (file for file in _SOURCES if file.suffix == ".c")))
            undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
            openmp = ["-fopenmp"] if has_own_openmp else []
            _run([*compiler, "-shared", *openmp, *undefined, *objects, "-o", str(built), "-lm"])
            content = built.read_bytes()
            library = folder / f"{name}-{_digest(content)}.so"
            try:
                with atomic_write(library) as part:
                    part.write_bytes(content)
            except UserError as error:
                kernels = _loaded(built, has_own_openmp)
                print(f"llama3_raw: every run compiles the kernels: {error} ($XDG_CACHE_HOME)", file=sys.stderr)
                return kernels
    except OSError as error:  # of the temporary folder
        raise CannotBuild(f"the kernels cannot be compiled ({error})") from error
    return _loaded(library, has_own_openmp)


def _is_complete(library: Path) -> bool:
    """Whether the content has the digest in the name: loading a truncated library would be a bus error."""
    try:
        return library.stem.rpartition("-")[2] == _digest(library.read_bytes())
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root == "~/.cache":  # not expanded: a user without a home, as in some containers
        raise CannotBuild("there is no home folder; set XDG_CACHE_HOME to a folder that you can write to")
    folder = Path(root, "llama3_raw")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be created ({error.strerror})") from error
    return folder


def _run(command: Sequence[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=_LONGEST).stdout
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"{command[0]} takes more than {_LONGEST} seconds") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"status {error.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1]).strip()
        raise CannotBuild(f"{command[0]} fails: {reason[-200:]}") from error


def make_ops(kernels: ctypes.CDLL) -> Ops:
    """Return the operations with these kernels. What they do not support, such as fp32, torch computes."""
    wrapper = _Kernels(kernels)
    return Ops(
        embed=embed,
        linear=wrapper.linear,
        attend=wrapper.attend,
        rms_norm=wrapper.rms_norm,
        rope=wrapper.rope,
        swiglu=wrapper.swiglu,
        max_packed=wrapper.max_packed(),
    )


class _Kernels:
    """The compiled kernels for tensors that they support, and torch for the others."""

    def __init__(self, kernels: ctypes.CDLL):
        self._kernels = kernels
        self._has_tiles = bool(kernels.has_tiles())
        self._has_wide_vectors = kernels.width() >= 8  # else not measured, as NEON against Apple's matrix units

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in], weight [out, in] -> [..., out]; few rows at the speed of the memory."""
        outputs, length = weight.shape
        rows = x.numel() // length
        if not (rows > 0 and x.shape[-1] == length and length % 32 == 0 and _is_plain_bf16(x) and _is_plain(weight)):
            return linear_by_torch(x, weight)
        if isinstance(weight, Int4 | Blocks):
            fits = isinstance(weight, Int4) or outputs >= OUTPUTS
            return self._product_of_few_bits(x.contiguous(), weight, rows) if fits else linear_by_torch(x, weight)
        is_int8 = isinstance(weight, Int8)
        by_tiles = (
            self._has_tiles and outputs % 32 == 0 and length % (64 if is_int8 else 32) == 0 and length <= _MAX_LENGTH
        )
        if is_int8 or rows <= self._max_rows(by_tiles):
            return self._product(x.contiguous(), weight, (rows, outputs, length), by_tiles)
        return linear_by_torch(x, weight)

    def _max_rows(self, by_tiles: bool) -> int:
        """Return the number of rows in bf16 above which torch is faster."""
        if not self._has_wide_vectors:
            return MAX_DECODE_ROWS
        return _MAX_ROWS if by_tiles or fp32_is_faster() else _MAX_ROWS_BF16

    def max_packed(self) -> int:
        """Return how many tokens of several prompts get the same bits together as alone, however they are stored."""
        return min(self._max_rows(by_tiles) for by_tiles in {False, self._has_tiles})

    def _product(self, x: Tensor, weight: Tensor | Int8, sizes: tuple[int, int, int], by_tiles: bool) -> Tensor:
        """x [..., in] contiguous, weight [out, in] -> [..., out]; sizes: rows of x, out, in."""
        y = x.new_empty((*x.shape[:-1], sizes[1]))
        if isinstance(weight, Int8):
            multiply = self._kernels.linear_int8
            matrices: tuple[Any, Any] = (None, ctypes.byref(_CInt8(*map(Tensor.data_ptr, weight))))
        else:
            multiply = self._kernels.linear_bf16
            matrices = (weight.data_ptr(), None)
        if by_tiles:
            multiply = self._kernels.linear_tiles
        if multiply(x.data_ptr(), *matrices, y.data_ptr(), *sizes):
            raise MemoryError(f"out of memory in the product of {sizes[0]} tokens with a matrix {list(weight.shape)}")
        return y

    def _product_of_few_bits(self, x: Tensor, weight: Int4 | Blocks, rows: int) -> Tensor:
        """x [..., in] contiguous, of this many rows, weight [out, in] -> [..., out]"""
        matrix = _c_matrix(weight)
        y = x.new_empty((*x.shape[:-1], matrix.n_outputs))
        if self._kernels.linear_quantized(x.data_ptr(), ctypes.byref(matrix), y.data_ptr(), rows):
            raise MemoryError(f"out of memory in the product of {rows} tokens with a matrix {list(weight.shape)}")
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Like model.rms_norm, in one pass."""
        dim = x.shape[-1]
        fits = weight.shape == (dim,) and weight.is_contiguous() and dim % 32 == 0
        if not (fits and x.numel() and _is_plain_bf16(x) and _is_plain_bf16(weight)):
            return rms_norm(x, weight, eps)
        x = x.contiguous()
        y = x.new_empty(x.shape)
        self._kernels.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // dim, dim, eps)
        return y

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Like model.rope, in one pass."""
        *leading, n_heads, head_dim = x.shape
        sizes, strides = cos.shape, cos.stride()
        are_alike = (
            sin.shape == sizes == (*leading[x.dim() - cos.dim() :], 1, head_dim // 2) and sin.stride() == strides
        )
        is_even = len(sizes) == 3 or (len(sizes) == 4 and strides[0] == sizes[1] * strides[1])  # from row to row
        if not (_is_plain_bf16(x) and x.numel() and are_alike and is_even and cos.dtype == sin.dtype == torch.float32):
            return rope(x, cos, sin)
        x = x.contiguous()
        y = x.new_empty(x.shape)
        n_angles = math.prod(sizes[:-1])
        shape = _Rotation(x.numel() // (n_heads * head_dim), n_heads, head_dim, n_angles, strides[-3], strides[-1])
        self._kernels.rope(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), ctypes.byref(shape))
        return y

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Like F.silu(gate) * up, in one pass."""
        are_plain = _is_plain_bf16(gate) and _is_plain_bf16(up) and gate.is_contiguous() and up.is_contiguous()
        if not (are_plain and gate.shape == up.shape and gate.numel() % 32 == 0):
            return F.silu(gate) * up
        y = gate.new_empty(gate.shape)
        self._kernels.swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel())
        return y

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
        """Like model.attend, without taps of the scores. A row of a batch has the same bits as alone."""
        n_tokens, n_heads, head_dim = q.shape[-3:]
        are_plain = _are_heads(q) and _are_heads(keys) and _are_heads(values)
        use_tiles = self._has_tiles and n_heads // keys.shape[-2] % 4 == 0
        is_short = n_tokens <= MAX_DECODE_ROWS or (self._has_wide_vectors and keys.shape[-3] <= _MAX_KEYS)
        if not are_plain or head_dim % 32 or not (is_short or use_tiles):
            return attend_by_torch(q, keys, values, start)
        out = q.new_empty(q.shape)
        if q.dim() == 3 and isinstance(start, int):
            self._attend_row(q, keys, values, out, start, use_tiles)
            return out
        rows = zip(*(x.view(-1, *x.shape[-3:]) for x in (q, keys, values, out)), strict=True)  # one for a single prompt
        starts = itertools.repeat(start) if isinstance(start, int) else start.view(-1).tolist()
        for (q_row, keys_row, values_row, out_row), begin in zip(rows, starts, strict=False):
            self._attend_row(q_row, keys_row, values_row, out_row, begin, use_tiles)
        return out

    def _attend_row(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, start: int, use_tiles: bool) -> None:
        """q and out [T, n_heads, head_dim], keys and values [S, n_kv_heads, head_dim]"""
        n_tokens, n_heads, head_dim = q.shape
        strides = (q.stride(0), keys.stride(0), values.stride(0))
        for first in range(0, n_tokens, MAX_DECODE_ROWS):  # keeps the buffers of the kernel small
            count = min(MAX_DECODE_ROWS, n_tokens - first)
            shape = _Shape(count, n_heads, keys.shape[1], head_dim, start + first, use_tiles, *strides)
            query, result = q.data_ptr() + 2 * first * q.stride(0), out.data_ptr() + 2 * first * out.stride(0)
            if self._kernels.attend(query, keys.data_ptr(), values.data_ptr(), result, ctypes.byref(shape)):
                raise MemoryError(f"out of memory in attention to {start + n_tokens} tokens")


def interleaved(kernels: ctypes.CDLL, matrix: Blocks) -> Blocks:
    """Return a copy of a matrix in blocks, interleaved. It has a multiple of 16 outputs, and no gaps in memory."""
    outputs, length = matrix.shape
    blocks = length // matrix.kind.n_values
    data = matrix.data.new_empty((outputs // OUTPUTS, blocks, OUTPUTS * matrix.kind.n_bytes))
    kernels.interleave(ctypes.byref(_c_matrix(matrix)), data.data_ptr())
    return matrix._replace(data=data, is_interleaved=True)


def read_loop(kernels: ctypes.CDLL, x: Tensor) -> None:
    """Read all of a contiguous CPU tensor once, as fast as the memory allows; for measurements."""
    kernels.read_loop.restype = ctypes.c_float
    kernels.read_loop(x.data_ptr(), x.nbytes // 256 * 64)


def linear_by_torch(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; in fp32 if the processor has no instructions for bf16."""
    if x.dtype == torch.bfloat16 and fp32_is_faster():
        return linear(x, weight, torch.float32)
    return linear(x, weight)


def fp32_is_faster() -> bool:
    """Whether torch multiplies faster in fp32 than in bf16 here: on a CPU without instructions for bf16.

    The difference is a factor of at least two, in either direction, on all processors that were tried.
    """
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # bf16: ARM's
    return not (has_bf16 and torch.backends.mkldnn.is_available())  # torch uses them only through oneDNN


def attend_by_torch(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor) -> Tensor:
    """Like model.attend, in blocks of tokens and keys, so that not all scores are in memory. (Dao et al. 2022)"""
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
        end = start + begin + length if isinstance(start, int) else n_keys  # the keys after it are masked
        seen = torch.arange(end, device=q.device) <= positions.unsqueeze(-1)  # [..., T, S]
        # the n_rep query heads of a kv head become one head with n_rep * T tokens, so that no key is repeated
        block = block.unflatten(-2, (n_kv_heads, n_rep)).movedim(-4, -2).flatten(-3, -2)
        seen = torch.cat([seen] * n_rep, dim=-2).unsqueeze(-3)  # [..., 1, n_rep * T, S]
        four = (1,) * (4 - block.dim())  # torch works in blocks only with four dimensions, also of the mask
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
    return x.dtype == torch.bfloat16 and x.is_cpu and not x.requires_grad


def _are_heads(x: Tensor) -> bool:
    """Whether [..., T, heads, head_dim] is in bf16, with at most one dimension before T, and a token's heads adjoin."""
    return _is_plain_bf16(x) and x.dim() <= 4 and x.stride()[-2:] == (x.shape[-1], 1)


def _is_plain(weight: Matrix) -> bool:
    """Whether the tensors of a matrix are on the CPU without gaps, in bf16 unless it is quantized."""
    if isinstance(weight, Tensor):
        return weight.is_contiguous() and _is_plain_bf16(weight)
    return all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors_of(weight))


def _c_matrix(weight: Int4 | Blocks) -> _CMatrix:
    is_interleaved = isinstance(weight, Int4) or weight.is_interleaved
    pointers: list[int | None] = [*map(Tensor.data_ptr, tensors_of(weight)), None, None]
    return _CMatrix(_KINDS[weight.format], *weight.shape, *pointers[:3], is_interleaved)


def _keep_freed_memory() -> None:
    """Make the C library keep freed memory, instead of returning it to the system and requesting it again by pages.

    Otherwise the intermediate tensors of a prompt of 256 tokens cost a tenth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc's; the values are in its malloc.h
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)  # the largest allowed


@functools.cache
def compiled_kernels() -> ctypes.CDLL | None:
    """Return the kernels for this CPU, or None without a compiler; a line on stderr then says so, once."""
    try:
        return build_kernels()
    except CannotBuild as reason:
        print(
            f"llama3_raw: {reason}; computed by torch: tokens come about half as fast, and from few bits far slower",
            file=sys.stderr,
        )
        return None


@functools.cache
def fast_ops() -> Ops:
    """Return the fast operations for this CPU; torch computes where there is no compiler."""
    _keep_freed_memory()
    kernels = compiled_kernels()
    if kernels is not None:
        return make_ops(kernels)
    return Ops(
        embed=embed,
        linear=linear_by_torch,
        attend=lambda q, keys, values, start, tap: attend_by_torch(q, keys, values, start),
    )
