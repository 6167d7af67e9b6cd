"""The kernels for ARM on another processor: compiled for aarch64, and run by qemu in a process of their own."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from llama3_raw.backends import cpu
from llama3_raw.quantization.blocks import BLOCK_TYPES

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PROCESSORS = {  # flags of the compiler for each kind
    "neon": "armv8-a",
    "neon_dotprod": "armv8.2-a+dotprod",
    "neon_bf16": "armv8.6-a",
}
_KERNELS = ("linear_bf16", "linear_int8", "linear_quantized", "attend", "rms_norm", "rope", "swiglu", "interleave")
_SIZE, _ADDRESS = 1 << 28, 1 << 40
_BLOCKS = [(kind.n_values, kind.n_bytes) for kind in BLOCK_TYPES.values()]


def can_emulate() -> bool:
    """Whether the compiler and the emulator are installed."""
    return bool(shutil.which(COMPILER) and shutil.which(EMULATOR))


def compile_for(processor: str, program: Path) -> None:
    """Compile the kernels and emulated.c."""
    sources = [str(source) for source in cpu._SOURCES if source.suffix == ".c"]
    flags = [*cpu._FLAGS, f"-march={PROCESSORS[processor]}", "-static", "-Wall", "-Wextra"]
    driver = str(Path(__file__).with_name("emulated.c"))
    subprocess.run([COMPILER, *flags, *sources, driver, "-o", str(program), "-lm"], check=True)


class EmulatedKernels:
    """What `cpu.make_ops` calls, with the arguments of the C functions: copies the tensors to a file and back."""

    def __init__(self, processor: str):
        self._folder = tempfile.TemporaryDirectory()
        program, file = Path(self._folder.name, "kernels"), Path(self._folder.name, "memory")
        compile_for(processor, program)
        with open(file, "w+b") as opened:
            opened.truncate(_SIZE)
            self._memory = mmap.mmap(opened.fileno(), _SIZE)
        command = [EMULATOR, "-cpu", "max", str(program), str(file), str(_SIZE), str(_ADDRESS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._used = 0
        self._results: list[tuple[int, int, int]] = []  # where in the file, where in this process, bytes

    def has_tiles(self) -> int:
        return 0

    def width(self) -> int:
        return 4

    def linear_bf16(self, x: int, w: int, _: None, y: int, rows: int, outputs: int, length: int) -> int:
        tensors = (self._sent(x, 2 * rows * length), self._sent(w, 2 * outputs * length), 0)
        return self._call("linear_bf16", *tensors, self._result(y, 2 * rows * outputs), rows, outputs, length)

    def linear_int8(self, x: int, _: None, w: Any, y: int, rows: int, outputs: int, length: int) -> int:
        values, row_scales, column_scales = (getattr(w._obj, name) for name, _ in w._obj._fields_)
        matrix = struct.pack(
            "3q",
            self._sent(values, outputs * length),
            self._sent(row_scales, 4 * outputs),
            self._sent(column_scales, 4 * length),
        )
        tensors = (self._sent(x, 2 * rows * length), 0, self._copied(matrix))
        return self._call("linear_int8", *tensors, self._result(y, 2 * rows * outputs), rows, outputs, length)

    def linear_quantized(self, x: int, w: Any, y: int, rows: int) -> int:
        tensors = (self._sent(x, 2 * rows * w._obj.length), self._matrix(w._obj))
        return self._call("linear_quantized", *tensors, self._result(y, 2 * rows * w._obj.n_outputs), rows)

    def attend(self, q: int, keys: int, values: int, out: int, shape: Any) -> int:
        s = shape._obj
        seen, kv_size = s.start + s.n_tokens, s.n_kv_heads * s.head_dim
        size = s.n_heads * s.head_dim
        tensors = (
            self._sent(q, 2 * ((s.n_tokens - 1) * s.q_stride + size)),
            self._sent(keys, 2 * ((seen - 1) * s.key_stride + kv_size)),
            self._sent(values, 2 * ((seen - 1) * s.value_stride + kv_size)),
        )
        return self._call("attend", *tensors, self._result(out, 2 * s.n_tokens * size), self._copied(bytes(s)))

    def rms_norm(self, x: int, weight: int, y: int, rows: int, dim: int, eps: float) -> int:
        tensors = (self._sent(x, 2 * rows * dim), self._sent(weight, 2 * dim))
        return self._call("rms_norm", *tensors, self._result(y, 2 * rows * dim), rows, dim, number=eps)

    def rope(self, x: int, cos: int, sin: int, y: int, shape: Any) -> int:
        s = shape._obj
        n_bytes = 2 * s.n_rows * s.n_heads * s.head_dim
        angles = 4 * ((s.n_angles - 1) * s.angle_stride + (s.head_dim // 2 - 1) * s.pair_stride + 1)
        tensors = (self._sent(x, n_bytes), self._sent(cos, angles), self._sent(sin, angles))
        return self._call("rope", *tensors, self._result(y, n_bytes), self._copied(bytes(s)))

    def swiglu(self, gate: int, up: int, y: int, n: int) -> int:
        return self._call("swiglu", self._sent(gate, 2 * n), self._sent(up, 2 * n), self._result(y, 2 * n), n)

    def interleave(self, w: Any, to: int) -> int:
        return self._call("interleave", self._matrix(w._obj), self._result(to, _n_bytes(w._obj)))

    def _matrix(self, w: Any) -> int:
        """Send the struct and its tensors: the values, and of int4 two more."""
        padded = -(-w.n_outputs // 16) * 16
        pointers = [getattr(w, name) for name, _ in w._fields_[3:6]]
        sizes = [_n_bytes(w), padded * w.length // 16, 8 * w.n_outputs]
        sent = [self._sent(pointer, size) if pointer else 0 for pointer, size in zip(pointers, sizes, strict=True)]
        return self._copied(struct.pack("7q", w.kind, w.n_outputs, w.length, *sent, w.is_interleaved))

    def _sent(self, address: int, n_bytes: int) -> int:
        """Copy memory of this process to the file, and return where the emulated process has it."""
        return self._copied(ctypes.string_at(address, n_bytes))

    def _copied(self, content: bytes) -> int:
        begin = self._used
        self._memory[begin : begin + len(content)] = content
        self._used = begin + len(content) + 63 & -64
        return _ADDRESS + begin

    def _result(self, address: int, n_bytes: int) -> int:
        self._results.append((self._used, address, n_bytes))
        return self._copied(bytes(n_bytes))

    def _call(self, name: str, *integers: int, number: float = 0.0) -> int:
        integers += (0,) * (7 - len(integers))
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(struct.pack("2i7qfi", _KERNELS.index(name), torch.get_num_threads(), *integers, number, 0))
        answer = stdout.read(4)
        assert len(answer) == 4, f"{name} ended the emulated process with status {self._process.wait()}"
        for begin, address, n_bytes in self._results:
            ctypes.memmove(address, self._memory[begin : begin + n_bytes], n_bytes)
        self._results.clear()
        self._used = 0
        return int(struct.unpack("i", answer)[0])


def _n_bytes(w: Any) -> int:
    """Return the bytes of the values of a matrix of few bits."""
    if w.kind == len(_BLOCKS):  # int4, padded to 16 outputs
        return -(-int(w.n_outputs) // 16) * 16 * int(w.length) // 2
    n_values, n_bytes = _BLOCKS[w.kind]
    return int(int(w.n_outputs) * int(w.length) // n_values * n_bytes)
