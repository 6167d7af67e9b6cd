"""The fast CPU operations: as accurate as the exact ones, and a token has the same bits alone and among others."""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import REFERENCE, KVCache, Model, Params, forward, generate
from llama3_raw.backends import cpu
from llama3_raw.model import rms_norm, rope, rope_rotation, token_positions
from llama3_raw.ops import Ops, no_tap
from llama3_raw.quantization.blocks import BLOCK_TYPES, Blocks
from llama3_raw.quantization.int4 import Int4
from llama3_raw.quantization.int8 import Int8
from tests.backends.emulated import COMPILER, EMULATOR, PROCESSORS, EmulatedKernels, can_emulate
from tests.blocks import random_blocks
from tests.conftest import one_at_a_time
from tests.paths import ROOT
from tests.references import cast, random_weights


def runs_here(instruction_set: str) -> bool:
    """Whether this processor has the instructions, by /proc/cpuinfo."""
    needed = {
        "amx": "amx_bf16 amx_int8",
        "avx512_bf16": "avx512_bf16",
        "avx512_vnni": "avx512_vnni",
        "avx512": "avx512bw",
        "avx_vnni": "avx_vnni",
        "avx2": "avx2 f16c",
    }
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return set(needed.get(instruction_set, "").split()) <= flags


THREADS = torch.get_num_threads()


def kernels_for(instruction_set: str) -> Any:
    if instruction_set in PROCESSORS:
        return emulated_kernels(instruction_set)
    if not runs_here(instruction_set):
        pytest.skip(f"this processor has no {instruction_set}")
    with one_at_a_time():  # another process of the tests may need the same ones
        try:
            kernels = cpu.build_kernels(instruction_set)
        except cpu.CannotBuild as reason:
            pytest.skip(f"cannot be built here: {reason}")
    if instruction_set == "amx" and not kernels.has_tiles():
        pytest.skip("the system does not let this process use tiles")
    return kernels


@functools.cache
def emulated_kernels(processor: str) -> Any:
    if not can_emulate():
        pytest.skip(f"needs {COMPILER} and {EMULATOR} (Debian's gcc-aarch64-linux-gnu and qemu-user)")
    return EmulatedKernels(processor)


def built_for(instruction_set: str) -> Ops:
    return cpu.make_ops(kernels_for(instruction_set))


USUAL = ("native", "avx2", "baseline")
X86 = [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in cpu.INSTRUCTION_SETS]
ARM = [pytest.param(processor, marks=(pytest.mark.slow, pytest.mark.emulated)) for processor in PROCESSORS]


@pytest.fixture(scope="module", params=[*X86, *ARM])
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Each kind of processor that kernels are built for. `native` stands for the strongest one that runs here."""
    strongest = next(name for name in list(cpu.INSTRUCTION_SETS)[1:] if runs_here(name))
    if request.param == strongest and platform.machine() == "x86_64":
        pytest.skip("native has the same instructions here")
    return str(request.param)


@pytest.fixture(scope="module")
def ops(instruction_set: str) -> Ops:
    """The operations built for `instruction_set`."""
    return built_for(instruction_set)


def rms_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).square().mean().sqrt())


@pytest.mark.parametrize(("outputs", "length"), [(256, 96), (130, 4096), (1, 32), (7, 64)])
def test_products_are_as_accurate_as_torchs(ops: Ops, outputs: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, length, generator=generator).bfloat16()
    w = torch.randn(outputs, length, generator=generator).bfloat16()
    exact = x.double() @ w.double().T
    theirs = rms_error(torch.nn.functional.linear(x, w), exact)
    together = ops.linear(x, w)
    assert rms_error(together, exact) <= 1.01 * theirs
    for rows in range(1, 17):
        assert torch.equal(ops.linear(x[-rows:], w), together[-rows:])
    assert torch.equal(ops.linear(x.view(2, 8, length), w), together.view(2, 8, outputs))
    assert torch.equal(ops.linear(x[3], w), together[3])


# outputs and length: several blocks of 256 rows and a remainder, and rows of several steps and a remainder; numbers of
# outputs and lengths that tiles do not support; a remainder of 32 bytes in int8
MANY = [(544, 2112), (288, 64), (130, 128), (96, 96)]


@pytest.mark.parametrize(("outputs", "length"), MANY)
def test_many_rows(ops: Ops, outputs: int, length: int) -> None:
    """With torch, or with the kernels, where a row has the same bits among any number of rows up to 128."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, length, generator=generator).bfloat16()
    w = torch.randn(outputs, length, generator=generator).bfloat16()
    exact = x.double() @ w.double().T
    theirs = rms_error(torch.nn.functional.linear(x, w), exact)
    for rows in (17, 33, 256, 257, 300):
        assert rms_error(ops.linear(x[:rows], w), exact[:rows]) <= 1.01 * theirs


@pytest.mark.parametrize("instruction_set", ["amx", "avx2"])
@pytest.mark.parametrize(("outputs", "length"), [MANY[0], MANY[1]])
def test_a_row_has_the_same_bits_among_any_number_of_rows(
    instruction_set: str, outputs: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles, and where torch would have to upcast or dequantize the matrix."""
    monkeypatch.setattr(cpu, "fp32_is_faster", lambda: True)
    ops = built_for(instruction_set)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(128, length, generator=generator).bfloat16()
    w = torch.randn(outputs, length, generator=generator).bfloat16()
    together = ops.linear(x, w)
    for rows in (1, 2, 15, 16, 17, 31, 33, 127):
        assert torch.equal(ops.linear(x[-rows:], w), together[-rows:])
    x, w8 = x[:64], random_int8(outputs, length, generator)
    together = ops.linear(x, w8)
    for rows in (1, 16, 17, 63):
        assert torch.equal(ops.linear(x[-rows:], w8), together[-rows:])


def random_int8(outputs: int, length: int, generator: torch.Generator) -> Int8:
    """Return a matrix whose rows and columns have values of different sizes."""
    sizes = torch.rand(length, generator=generator) + 0.1
    matrix = torch.randn(outputs, length, generator=generator) * sizes
    return Int8.quantize((matrix * (torch.rand(outputs, 1, generator=generator) + 0.1)).bfloat16())


@pytest.mark.parametrize(("outputs", "length"), [*MANY, (1, 32), (7, 4096), (32, 14336)])
def test_int8_products(ops: Ops, outputs: int, length: int) -> None:
    """As accurate as rounding the results to bf16 allows, and with the same bits alone and among other rows."""
    generator = torch.Generator().manual_seed(7)
    w = random_int8(outputs, length, generator)
    x = torch.randn(300, length, generator=generator).bfloat16()
    exact = x.double() @ w.dequantize(torch.float64).T
    together = ops.linear(x[:16], w)
    for rows in (1, 2, 3, 15, 16, 17, 33, 256, 257, 300):
        y = ops.linear(x[:rows], w)
        rounding = rms_error(exact[:rows].bfloat16(), exact[:rows])
        if rows <= 16:
            assert rms_error(y, exact[:rows]) <= 1.05 * rounding
            assert torch.equal(y, together[:rows])
            assert torch.equal(ops.linear(x[rows - 1], w), together[rows - 1])
        else:  # without tiles torch may compute it, with the matrix rounded to bf16 too
            assert rms_error(y, exact[:rows]) <= 2 * rounding


def test_int8_with_tiles() -> None:
    """Any number of rows has the same sums, which are integers and thus equal on all processors."""
    ops = built_for("amx")
    generator = torch.Generator().manual_seed(8)
    for outputs, length in MANY[:2]:
        w = random_int8(outputs, length, generator)
        x = torch.randn(300, length, generator=generator).bfloat16()
        together = ops.linear(x, w)
        exact = x.double() @ w.dequantize(torch.float64).T
        assert rms_error(together, exact) <= 1.01 * rms_error(exact.bfloat16(), exact)
        for rows in (1, 2, 15, 16, 17, 31, 33, 129, 256, 257):
            assert torch.equal(ops.linear(x[-rows:], w), together[-rows:])


def test_int8_products_are_the_same_on_all_processors() -> None:
    """On those with fused multiply-add; without it, tokens are rounded slightly differently."""
    fused = [name for name in ("amx", "avx512_bf16", "avx512", "avx2") if runs_here(name)]
    if len(fused) < 2:
        pytest.skip("this processor has only one kind of instructions with fused multiply-add")
    generator = torch.Generator().manual_seed(9)
    w = random_int8(544, 1152, generator)
    x = torch.randn(16, 1152, generator=generator).bfloat16()
    results = [built_for(name).linear(x, w) for name in fused]
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_int8_products_of_special_values(ops: Ops) -> None:
    """Zeros, negligible values, an outlier, infinities and NaN, each in its own row."""
    w = random_int8(64, 128, torch.Generator().manual_seed(10))
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(11)).bfloat16()
    before = ops.linear(x, w)
    x[1] = 0
    x[2] = 1e-36
    x[3, 77] = 1e6
    x[4, 5], x[5, 5], x[6, 127] = torch.inf, -torch.inf, torch.nan
    y = ops.linear(x, w)
    assert torch.equal(y[[0, 7]], before[[0, 7]])
    assert not y[1:3].any()
    outlier = 1e6 * w.dequantize(torch.float64)[:, 77]
    assert ((y[3] - outlier).abs() <= 2**-8 * outlier.abs() + 4 * 1e6 / 32384 * float(w.row_scales.max())).all()
    assert y[4:7].isnan().all()
    for row in (4, 5, 6):
        assert ops.linear(x[row], w).isnan().all()


def test_the_largest_sums_of_an_int8_product(ops: Ops) -> None:
    """All values are the largest possible: the sum has 36 bits."""
    w = Int8.quantize(torch.ones(32, 14336))
    y = ops.linear(torch.ones(2, 14336).bfloat16(), w)
    assert torch.equal(y, torch.full((2, 32), 14336.0).bfloat16())


@pytest.mark.parametrize(
    ("capabilities", "has_mkldnn", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, True, True),
        ({"architecture": "x86_64", "avx512_f": True}, True, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, True, False),
        ({"architecture": "x86_64", "amx_bf16": True}, True, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, False, True),  # on a Mac
    ],
)
def test_whether_fp32_is_faster(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], has_mkldnn: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_mkldnn)
    assert cpu.fp32_is_faster() == expected


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(8, 2), (6, 2)])
def test_packed_prompts_have_the_same_bits_as_alone(
    instruction_set: str, n_heads: int, n_kv_heads: int, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens as `max_packed` allows, padded on the right, through a whole model."""
    monkeypatch.setattr(cpu, "fp32_is_faster", lambda: not has_bf16)
    ops = built_for(instruction_set)
    sizes = {"dim": 128 * n_heads, "n_layers": 1, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    params = Params.from_meta({**sizes, "vocab_size": 96, "norm_eps": 1e-5, "multiple_of": 64})
    weights = random_weights(params, torch.bfloat16, seed=3)
    width = ops.max_packed // 2
    prompts = torch.randint(96, (2, width), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for length in range(max(1, width - 15), width, 3):
            ends = torch.tensor([width - 1, length - 1])
            together = forward(weights, params, prompts, logits_at=ends, ops=ops)
            assert torch.equal(forward(weights, params, prompts[0], logits_at=-1, ops=ops), together[0])
            assert torch.equal(forward(weights, params, prompts[1, :length], logits_at=-1, ops=ops), together[1])


@pytest.mark.parametrize("in_fp32", [True, False])
def test_products_with_a_converted_matrix(monkeypatch: pytest.MonkeyPatch, in_fp32: bool) -> None:
    """In pieces, for int8 and for processors without bf16 instructions: as accurate, and in the dtype of the input."""
    monkeypatch.setattr(cpu, "fp32_is_faster", lambda: in_fp32)
    monkeypatch.setattr("llama3_raw.quantization.matrix.ROWS_AT_ONCE", 32)
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(2, 20, 96, generator=generator).bfloat16()
    w = torch.randn(70, 96, generator=generator).bfloat16()
    for matrix, in_fp64 in ((w, w.double()), (int8 := Int8.quantize(w), int8.dequantize(torch.float64))):
        exact = x.double() @ in_fp64.T
        y = cpu.linear_by_torch(x, matrix)
        assert (y.dtype, y.shape) == (torch.bfloat16, exact.shape)
        assert rms_error(y, exact) <= 1.01 * rms_error(REFERENCE.linear(x, matrix), exact)
        assert rms_error(cpu.linear_by_torch(x.float(), matrix if matrix is int8 else w.float()), exact) < 1e-4


FEW_BITS = (*BLOCK_TYPES, "int4")


def few_bits(name: str, outputs: int, length: int, fill: int | None = None) -> Blocks | Int4:
    """A matrix of a format with random values, or with all their bits as in the byte `fill`, and scales about 0.01."""
    if name == "int4":
        generator = torch.Generator().manual_seed(outputs)
        matrix = Int4.quantize(0.1 * torch.randn(outputs, length, generator=generator))
        if fill is not None:
            matrix.values.fill_(fill)
        return matrix
    kind = BLOCK_TYPES[name]
    data = random_blocks(kind, outputs, length // kind.n_values, seed=outputs, largest=0.01)
    if fill is not None:
        scales, blocks = data.clone().unflatten(1, (-1, kind.n_bytes)), data.unflatten(1, (-1, kind.n_bytes))
        blocks.fill_(fill)
        fields = {"Q6_K": slice(192, 210), "Q4_K": slice(0, 16), "Q5_K": slice(0, 16)}
        kept = fields.get(name, slice(0, 4 if name in ("Q4_1", "Q5_1") else 2))
        blocks[..., kept] = scales[..., kept]
    return Blocks(data, kind, torch.bfloat16)


def tokens_in_8_bits(rows: int, length: int) -> Tensor:
    """Tokens [rows, length] that need no rounding: each 32 inputs are integers up to 127 times a power of two."""
    generator = torch.Generator().manual_seed(length)
    integers = torch.randint(-127, 128, (rows, length // 32, 32), generator=generator)
    integers[..., 5] = 127
    return (integers * 2.0 ** torch.randint(-9, 0, (rows, length // 32, 1), generator=generator)).flatten(1).bfloat16()


@pytest.mark.parametrize("name", FEW_BITS)
def test_products_with_few_bits(ops: Ops, name: str) -> None:
    """As those of the same numbers in fp64, but for the rounding to bf16; the same bits alone and among others."""
    is_long = name.endswith("_K")
    for outputs, length in ((64, 512), (50, 256 if is_long else 288), (17, 256 if is_long else 32)):
        w = few_bits(name, outputs, length)
        in_fp64 = w.dequantize(torch.float32).double()
        x = tokens_in_8_bits(300, length)
        x[3, :32], x[5] = 0, 0  # a group and a token of zeros
        y, exact = ops.linear(x, w), x.double() @ in_fp64.T
        sizes = x.double().abs() @ in_fp64.abs().T  # of the terms
        assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2e-6 * sizes).all()
        for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 27), (27, 300)):
            assert torch.equal(ops.linear(x[first:last], w), y[first:last])
        torch.set_num_threads(1)
        assert torch.equal(ops.linear(x, w), y)
        torch.set_num_threads(THREADS)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_interleaved_blocks(instruction_set: str, name: str) -> None:
    """They are the same numbers, and their products have the same bits, with any number of tokens."""
    kernels = kernels_for(instruction_set)
    ops = cpu.make_ops(kernels)
    for outputs, length in ((64, 512), (48, 256 if name.endswith("_K") else 288)):
        w = few_bits(name, outputs, length)
        assert isinstance(w, Blocks)
        together = cpu.interleaved(kernels, w)
        assert (together.shape, together.nbytes) == (w.shape, w.nbytes)
        assert torch.equal(together.dequantize(torch.float32), w.dequantize(torch.float32))
        pieces = [piece.dequantize(torch.float32) for piece in together.split(32)]
        assert torch.equal(torch.cat(pieces), w.dequantize(torch.float32))
        x = torch.randn(40, length, generator=torch.Generator().manual_seed(0)).bfloat16()
        for rows in (1, 2, 7, 40):
            assert torch.equal(ops.linear(x[:rows], together), ops.linear(x[:rows], w))


@pytest.mark.parametrize("name", FEW_BITS)
def test_tokens_are_rounded_to_8_bits(ops: Ops, name: str) -> None:
    """By at most half of a 127th of the largest of 32 inputs."""
    w = few_bits(name, 32, 256)
    in_fp64 = w.dequantize(torch.float32).double()
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    groups = x.double().unflatten(-1, (-1, 32))
    steps = (groups.abs().amax(-1, keepdim=True) / 127).expand_as(groups).flatten(1)
    exact = x.double() @ in_fp64.T
    error = (ops.linear(x, w).double() - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 0.5001 * steps @ in_fp64.abs().T).all()
    assert error.square().mean() > 2 * (exact.bfloat16().double() - exact).square().mean()  # it is the rounding


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", FEW_BITS)
def test_sums_of_few_bits_do_not_overflow(ops: Ops, name: str, fill: int) -> None:
    """With the largest values of both signs, which sums of 16 bits just hold."""
    w = few_bits(name, 32, 256, fill)
    for x in (torch.ones(2, 256), -torch.ones(2, 256), torch.tensor([1.0, -1.0]).repeat(2, 128)):
        exact = x.double() @ w.dequantize(torch.float32).double().T
        sizes = x.double().abs() @ w.dequantize(torch.float32).double().abs().T
        y = ops.linear(x.bfloat16(), w).double()
        assert ((y - exact).abs() <= 2**-8 * exact.abs() + 2e-6 * sizes).all()


@pytest.mark.parametrize("name", FEW_BITS)
def test_a_token_that_is_not_finite_spoils_only_itself(ops: Ops, name: str) -> None:
    w = few_bits(name, 32, 256)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = ops.linear(x, w)
    x[2, 70], x[4, 0] = torch.nan, torch.inf
    y = ops.linear(x, w)
    assert y[[2, 4]].isnan().all()
    assert torch.equal(y[[0, 1, 3, 5, 6]], expected[[0, 1, 3, 5, 6]])


@pytest.mark.parametrize("name", FEW_BITS)
def test_damaged_scales_are_seen(ops: Ops, name: str) -> None:
    """Bytes of ones are numbers that are NaN, whose mantissa must not be carried over to zero."""
    w = few_bits(name, 32, 256)
    if isinstance(w, Int4):
        w.row_scales.view(torch.int32).fill_(-1)
    else:
        w.data.fill_(0xFF)
    assert ops.linear(torch.ones(2, 256).bfloat16(), w).isnan().all()


def test_the_kernels_know_the_formats_by_these_numbers() -> None:
    source = (Path(cpu.__file__).parent / "kernels" / "blocks.c").read_text()
    names = re.search(r"enum \{ (.*?) \};", source)
    sizes = re.search(r"FORMATS\[\] = \{(.*?)\};", source, re.DOTALL)
    assert names is not None
    assert sizes is not None
    assert [name.lower() for name in names[1].split(", ")] == [name.lower() for name in cpu._KINDS]
    numbers = [(int(values), int(n_bytes)) for values, n_bytes in re.findall(r"\{(\d+), (\d+),", sizes[1])]
    assert numbers[:-1] == [(kind.n_values, kind.n_bytes) for kind in BLOCK_TYPES.values()]


def test_sizes_that_do_not_fit_are_refused(ops: Ops) -> None:
    x, ones = torch.randn(4, 2, 64).bfloat16(), torch.ones(3, 1, 32)
    with pytest.raises(RuntimeError):
        ops.linear(torch.randn(4, 256).bfloat16(), torch.randn(64, 512).bfloat16())
    assert ops.rms_norm is not None
    assert ops.rope is not None
    with pytest.raises(RuntimeError):
        ops.rms_norm(x, torch.ones(32).bfloat16(), 1e-5)
    with pytest.raises(RuntimeError):
        ops.rope(x, ones, ones)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_norms_and_rotations_are_as_accurate_as_the_reference(ops: Ops, batch: tuple[int, ...]) -> None:
    """With cos and sin as model.rope_rotation gives them, for one start and for one per row."""
    assert ops.rms_norm is not None
    assert ops.rope is not None
    generator = torch.Generator().manual_seed(5)
    x, weight = 3 * torch.randn(*batch, 7, 4096, generator=generator).bfloat16(), torch.rand(4096).bfloat16()
    exact = rms_norm(x.double(), weight.double(), 1e-5)
    y = ops.rms_norm(x, weight, 1e-5)
    assert rms_error(y, exact) <= 1.01 * rms_error(rms_norm(x, weight, 1e-5), exact)
    assert torch.equal(ops.rms_norm(x[..., 2:3, :], weight, 1e-5), y[..., 2:3, :])
    params = Params.from_meta({"dim": 4096, "n_layers": 1, "n_heads": 32, "vocab_size": 8, "norm_eps": 1e-5})
    heads = x.unflatten(-1, (32, 128))
    for start in (5, torch.tensor([3, 0, 900]) if batch else 5):
        cos, sin = rope_rotation(token_positions(start, 7, x.device), params)
        exact = rope(heads.float(), cos, sin)
        rotated = ops.rope(heads, cos, sin)
        assert rms_error(rotated, exact) <= 1.01 * rms_error(rope(heads, cos, sin), exact)
    assert torch.equal(ops.rope(heads[..., :1, :, :], cos[..., :1, :, :], sin[..., :1, :, :]), rotated[..., :1, :, :])


def test_swiglu_has_the_bits_of_torch(ops: Ops) -> None:
    """For all numbers in bf16 down to -87; below that it is 0, where torch has up to 1e-36."""
    assert ops.swiglu is not None
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    up = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, y = torch.nn.functional.silu(gate) * up, ops.swiglu(gate, up)
    small = (gate < -87) & (gate > -90)
    assert torch.equal(y[~small].nan_to_num(7), expected[~small].nan_to_num(7))
    assert (y[small] == 0).all()
    assert torch.equal(ops.swiglu(gate[64:96], up[64:96]).nan_to_num(7), y[64:96].nan_to_num(7))
    assert ops.swiglu(gate[:7], up[:7]).shape == (7,)  # by torch


def test_products_with_few_bits_that_torch_computes(ops: Ops) -> None:
    tokens = torch.randn(2, 512, generator=torch.Generator().manual_seed(2))
    for w in (few_bits("Q4_K", 3, 512), few_bits("int4", 3, 512)):
        for x in (tokens, tokens[:0].bfloat16(), tokens.bfloat16()):
            expected = torch.nn.functional.linear(x, w.dequantize(x.dtype))
            torch.testing.assert_close(ops.linear(x, w), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", ["float32", "odd length", "many rows", "not contiguous", "with gradient"])
def test_products_computed_by_torch(ops: Ops, case: str) -> None:
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    if case == "float32":
        x, w = x.float(), w.float()
    elif case == "odd length":
        x, w = x[:, :33], w[:, :33]
    elif case == "many rows":  # and few outputs, which tiles do not support
        x = torch.randn(129, 64).bfloat16()
    elif case == "not contiguous":
        w = torch.randn(64, 64).bfloat16().t()
    else:
        w.requires_grad_()
    assert torch.equal(ops.linear(x, w), torch.nn.functional.linear(x, w))


# n_heads, n_kv_heads, head_dim, tokens before: one chunk of keys, its edges, several
SHAPES = [(32, 8, 128, 700), (9, 3, 64, 241), (6, 6, 32, 0), (8, 1, 64, 255), (10, 2, 32, 256), (4, 2, 96, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_as_accurate_as_the_reference(ops: Ops, shape: tuple[int, int, int, int]) -> None:
    n_heads, n_kv_heads, head_dim, start = shape
    generator = torch.Generator().manual_seed(1)
    q = 3 * torch.randn(16, n_heads, head_dim, generator=generator).bfloat16()
    keys, values = (torch.randn(start + 16, n_kv_heads, head_dim, generator=generator).bfloat16() for _ in "kv")
    exact = REFERENCE.attend(q.double(), keys.double(), values.double(), start, no_tap)
    reference = REFERENCE.attend(q, keys, values, start, no_tap)
    together = ops.attend(q, keys, values, start, no_tap)
    assert rms_error(together, exact) <= rms_error(reference, exact)
    for t in range(16):
        end = start + t + 1
        alone = ops.attend(q[t : t + 1], keys[:end], values[:end], start + t, no_tap)
        assert torch.equal(alone, together[t : t + 1])
    many = cpu.attend_by_torch(q, keys, values, start)
    assert rms_error(many, exact) <= rms_error(reference, exact)


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("starts", [None, (), (2,)], ids=["int", "tensor", "batch"])
def test_attention_of_many_tokens_in_blocks(
    monkeypatch: pytest.MonkeyPatch, in_fp32: bool, starts: tuple[int, ...] | None
) -> None:
    """Only the scores of one block are in memory; those of all tokens would grow with the square of the length."""
    monkeypatch.setattr(cpu, "fp32_is_faster", lambda: in_fp32)
    masks = []
    by_torch = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        masks.append(attn_mask.shape)
        return by_torch(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    generator = torch.Generator().manual_seed(13)
    batch = starts or ()
    q = 3 * torch.randn(*batch, 300, 6, 32, generator=generator).bfloat16()
    keys, values = (torch.randn(*batch, 350, 2, 32, generator=generator).bfloat16() for _ in "kv")
    start: int | Tensor = 40 if starts is None else torch.tensor([40, 50] if starts else 40)
    if starts is None:
        keys, values = keys[:340], values[:340]
    exact = REFERENCE.attend(q.double(), keys.double(), values.double(), start, no_tap)
    reference = REFERENCE.attend(q, keys, values, start, no_tap)
    blocks = cpu.attend_by_torch(q, keys, values, start)
    assert (blocks.dtype, blocks.shape) == (torch.bfloat16, q.shape)
    assert rms_error(blocks, exact) <= rms_error(reference, exact)
    assert max(shape[-2] for shape in masks) == 3 * cpu.QUERIES  # for the three heads that share keys
    assert len(masks) == 3


def test_attention_with_extreme_scores(ops: Ops) -> None:
    """Weights that vanish next to one that is 1, and a token that sees only itself."""
    q = torch.zeros(2, 1, 32).bfloat16()
    q[..., 0] = 100.0
    keys, values = torch.zeros(300, 1, 32).bfloat16(), torch.randn(300, 1, 32).bfloat16()
    keys[7, 0, 0], keys[298, 0, 0] = 200.0, -200.0
    assert torch.equal(ops.attend(q, keys, values, 298, no_tap), values[7].expand(2, 1, 32))
    assert torch.equal(ops.attend(q[:1], keys[:1], values[:1], 0, no_tap)[0], values[0])


def test_the_number_of_threads_does_not_change_the_bits(ops: Ops) -> None:
    x, w = torch.randn(5, 512).bfloat16(), torch.randn(992, 512).bfloat16()
    int8 = Int8.quantize(w)
    q, keys, values = (torch.randn(length, 4, 64).bfloat16() for length in (5, 900, 900))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products = [ops.linear(x, w), ops.linear(x[:, :480], w[:, :480].contiguous()), ops.linear(x, int8)]
            results.append([*products, ops.attend(q, keys, values, 895, no_tap)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def logits_in_pieces(model: Model, ops: Ops, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = KVCache.allocate(model.params, max_seq_len=len(ids), like=model.weights)
    start, logits = 0, []
    for size in sizes:
        piece = ids[start : start + size]
        logits.append(forward(model.weights, model.params, piece, cache=cache, start=start, ops=ops))
        start += size
    return torch.cat(logits)


def test_a_token_has_the_same_bits_alone_and_among_others(ops: Ops, tiny: Model) -> None:
    """The whole model, 1 to 16 tokens at a time; prompt lookup depends on it."""
    ids = torch.randint(2000, (48,), generator=torch.Generator().manual_seed(2))
    alone = logits_in_pieces(tiny, ops, ids, [1] * 48)
    assert torch.equal(logits_in_pieces(tiny, ops, ids, [16, 16, 16]), alone)
    assert torch.equal(logits_in_pieces(tiny, ops, ids, [3, 13, 1, 15, 2, 14]), alone)


@pytest.mark.slow
def test_the_model_is_as_accurate_as_with_the_reference(ops: Ops, smollm2: Model) -> None:
    """Trained weights in bf16: the error relative to the fp32 result, token by token and all at once."""
    ids = torch.randint(49152, (40,), generator=torch.Generator().manual_seed(3))
    exact = forward(smollm2.weights, smollm2.params, ids)
    bf16 = smollm2._replace(weights=cast(smollm2.weights, torch.bfloat16))
    reference = rms_error(forward(bf16.weights, bf16.params, ids), exact)
    for sizes in ([1] * 40, [40]):
        assert rms_error(logits_in_pieces(bf16, ops, ids, sizes), exact) <= 1.5 * reference


def test_generate_uses_them(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast = cpu.fast_ops()
    counting = fast._replace(linear=lambda x, w: calls.append(x.shape) or fast.linear(x, w))
    monkeypatch.setattr("llama3_raw.backends.choose.fast_ops", lambda: counting)
    assert list(generate(tiny, [1, 2, 3], max_new_tokens=3, stop_ids=()))
    assert calls
    calls.clear()
    list(generate(tiny, [1, 2, 3], max_new_tokens=3, ops=REFERENCE))
    assert not calls


@pytest.mark.slow
def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    """A line says so, and the text is the same, up to rounding."""
    command = [sys.executable, "-m", "llama3_raw", "--weights", "weights/tiny", "Once upon a time"]
    lines = []
    texts = []
    no_cache = {"XDG_CACHE_HOME": str(tmp_path)}
    for extra in ({}, {"CC": "no-such-compiler"} | no_cache, {"CC": "false"} | no_cache):
        done = subprocess.run(
            [*command, "--max-new-tokens", "20"],
            cwd=ROOT,
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0
        texts.append(done.stdout)
        lines.append([line for line in done.stderr.splitlines() if "computed by torch" in line])
    assert texts[0] == texts[1] == texts[2]
    assert [len(each) for each in lines] == [0, 1, 1]
    assert "no-such-compiler" in lines[1][0]
    assert "false" in lines[2][0]


def test_what_a_compiler_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text(
        "#!/bin/sh\necho In a function >&2\necho 'x.c:1: error: no such thing' >&2\necho the end >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(cpu.CannotBuild) as raised:
        cpu.build_kernels()
    assert str(raised.value) == f"{script} fails: x.c:1: error: no such thing"


@pytest.mark.usefixtures("new_cache")
@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
def test_clang_builds_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own OpenMP, whose number of threads is torch's."""
    monkeypatch.setenv("CC", "clang")
    kernels = cpu.build_kernels()
    assert kernels.omp_get_max_threads() == torch.get_num_threads()
    x = torch.randn(3, 64).bfloat16()
    y = torch.empty_like(x)
    kernels.swiglu(x.data_ptr(), x.data_ptr(), y.data_ptr(), x.numel())
    assert torch.equal(y, torch.nn.functional.silu(x) * x)


@pytest.fixture
def new_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder without kernels, and sources that are compiled in a second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_SOURCES", [file for file in cpu._SOURCES if file.stem in ("pointwise", "shared")])
    monkeypatch.setattr(cpu, "_REQUIRED", ("swiglu",))


@pytest.mark.usefixtures("new_cache")
def test_the_kernels_are_built_once(tmp_path: Path) -> None:
    cpu.build_kernels()
    (built,) = (tmp_path / "llama3_raw").iterdir()
    time = built.stat().st_mtime_ns
    cpu.build_kernels()
    assert [file.stat().st_mtime_ns for file in (tmp_path / "llama3_raw").iterdir()] == [time]


@pytest.mark.usefixtures("new_cache")
@pytest.mark.parametrize("left", [0, 100, 9_000])
def test_truncated_kernels_are_built_anew(tmp_path: Path, left: int) -> None:
    """As after a power failure; loading them would be a bus error."""
    cpu.build_kernels()
    (built,) = (tmp_path / "llama3_raw").iterdir()
    whole = built.read_bytes()
    built.unlink()  # this process has it mapped
    built.write_bytes(whole[:left])
    cpu.build_kernels()
    (again,) = (tmp_path / "llama3_raw").iterdir()
    assert again.read_bytes() == whole


@pytest.mark.usefixtures("new_cache")
def test_a_cache_folder_that_is_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels are used, and a line says that they are not kept."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cpu.build_kernels().swiglu
    assert "every run compiles the kernels: " in (line := capsys.readouterr().err)
    assert ".so: cannot be written (No space left on device); choose another place ($XDG_CACHE_HOME)\n" in line


@pytest.mark.usefixtures("new_cache")
def test_a_compiler_that_leaves_something_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is not kept."""
    monkeypatch.setattr(cpu, "_REQUIRED", ("swiglu", "no_such_kernel"))
    with pytest.raises(cpu.CannotBuild, match="the compiler left no_such_kernel out"):
        cpu.build_kernels()
    assert list((tmp_path / "llama3_raw").iterdir()) == []


@pytest.mark.parametrize(
    ("compiler", "message"), [("gcc 'x", r"\$CC is no command"), ("sleep", "sleep takes more than 0.2 seconds")]
)
def test_what_is_no_compiler(compiler: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler == "sleep":
        script = tmp_path / compiler
        script.write_text("#!/bin/sh\nexec sleep 20\n")
        script.chmod(0o755)
        compiler = str(script)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(cpu, "_LONGEST", 0.2)
    with pytest.raises(cpu.CannotBuild, match=message):
        cpu.build_kernels()


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/maps")
def test_there_is_one_thread_pool() -> None:
    """The kernels, built by gcc, use torch's OpenMP: no second library with its own pool is loaded."""
    if "clang" in os.environ.get("CC", ""):
        pytest.skip("clang has an OpenMP of its own")
    code = "from llama3_raw.backends.cpu import build_kernels\nbuild_kernels()\nprint(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(set(re.findall(r"\S+/lib[gi]?omp[^/\s]*", done.stdout))) == 1


@pytest.mark.parametrize("start", [7, torch.tensor([7, 3])], ids=["int", "tensor"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["single", "batch"])
def test_torch_attends_in_blocks(batch: tuple[int, ...], start: int | torch.Tensor) -> None:
    """With a mask that has not two or four dimensions, torch computes all scores at once, at half the speed."""
    if isinstance(start, torch.Tensor) and not batch:
        start = start[0]
    q, keys, values = (torch.ones(*batch, length, heads, 32) for length, heads in ((3, 4), (10, 2), (10, 2)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert cpu.attend_by_torch(q, keys, values, start).shape == q.shape  # raises if it cannot


def test_without_a_folder_for_temporary_files_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(cpu.CannotBuild, match="the kernels cannot be compiled"):
        cpu.build_kernels("native")
