"""The kernels for ARM, compiled for aarch64 and run by qemu: their error, and the same bits alone and among others."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama3_raw.backends import cpu
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import Matrix, tensors_of
from llama3_raw.weights import format_name
from tests.backends.test_cpu import FEW_BITS, few_bits, tokens_in_8_bits

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR} (Debian's)"
    ),
]

Product = Callable[[Tensor, Matrix], Tensor]


@pytest.fixture(scope="module", params=["armv8-a", "armv8.2-a+dotprod"])
def product(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """product(x [rows, in], w [out, in]) -> [rows, out] by the emulated kernels, of the processors that have these."""
    program = tmp_path_factory.mktemp("neon") / "product"
    sources = [str(source) for source in cpu._SOURCES if source.suffix == ".c"]
    driver = str(Path(__file__).with_name("emulated.c"))
    flags = [*cpu._FLAGS, f"-march={request.param}", "-static"]
    subprocess.run([COMPILER, *flags, *sources, driver, "-o", str(program), "-lm"], check=True)

    def run(x: Tensor, w: Matrix) -> Tensor:
        outputs, length = w.shape
        kind = cpu._KINDS.get(format_name(w), -2 if isinstance(w, Int8) else -1)
        tensors = [x.contiguous(), *tensors_of(w)]
        tensors += [torch.empty(0)] * (4 - len(tensors))
        header = struct.pack("8q", kind, outputs, length, len(x), *(tensor.nbytes for tensor in tensors))
        content = header + b"".join(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors
        )
        done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], input=content, capture_output=True, check=True)
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.bfloat16).view(len(x), outputs)

    return run


@pytest.mark.parametrize("name", [*FEW_BITS, "int8", "bfloat16"])
def test_products(product: Product, name: str) -> None:
    w: Matrix
    if name in FEW_BITS:
        w = few_bits(name, 50, 256)
        in_fp64 = w.dequantize(torch.float32).double()
    else:
        dense = torch.randn(50, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        w = Int8.quantize(dense) if name == "int8" else dense
        in_fp64 = w.dequantize(torch.float64) if isinstance(w, Int8) else dense.double()
    x = tokens_in_8_bits(21, 256)
    y, exact = product(x, w), x.double() @ in_fp64.T
    sizes = x.double().abs() @ in_fp64.abs().T  # of the terms; int8 rounds tokens to 16 bits
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-5 * sizes).all()
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10)):
        assert torch.equal(product(x[first:last], w), y[first:last])
