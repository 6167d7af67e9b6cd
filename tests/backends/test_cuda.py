"""The GPU's operations: their kernels in Triton's interpreter if there is no GPU, and compiled for two kinds of GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama3_raw import REFERENCE, KVCache, Model, Params, forward
from llama3_raw.backends import cuda, cuda_operators
from llama3_raw.backends.cpu import attend_by_torch
from llama3_raw.model import attend, rms_norm, rope, rope_rotation, token_positions
from llama3_raw.ops import Ops, no_tap
from llama3_raw.quantization.int4 import Int4
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import FORMATS
from tests.references import cast, converted, dense

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
ON = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter cannot multiply bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(ON, DTYPE)


def error(tensor: Tensor, exact: Tensor) -> float:
    return float((tensor.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize(("rows", "outputs", "length"), [(1, 70, 100), (3, 64, 512), (16, 33, 300)])
def test_few_rows_times_a_matrix(rows: int, outputs: int, length: int) -> None:
    """Partial blocks too; as near to the exact product as torch's own."""
    x, matrix = random(rows, length), random(outputs, length, seed=1)
    y = cuda.fast_linear(x, matrix)
    exact = x.double() @ matrix.double().T
    assert y.dtype == DTYPE
    assert error(y, exact) <= 1.1 * error(REFERENCE.linear(x, matrix), exact)


def test_int8_times_few_rows() -> None:
    x, matrix = random(4, 200), random(50, 200, seed=1) * torch.rand(200).to(ON, DTYPE)
    rounded = Int8.quantize(matrix)
    exact = x.double() @ rounded.dequantize(torch.float64).T
    assert error(cuda.fast_linear(x, rounded), exact) <= 1.5 * error(REFERENCE.linear(x, rounded), exact)


@pytest.fixture
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter compute in bfloat16, which it holds as uint16: multiply, subtract, and round to it."""
    if ON.type == "cuda":
        return
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    names = ("create_dot", "create_fsub", "create_ui_to_fp", "create_fp_trunc")
    plain_dot, plain_sub, plain_cast, plain_round = (getattr(InterpreterBuilder, name) for name in names)

    def in_fp32(handle: Any) -> Any:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def rounded(data: Any) -> Any:
        bits = torch.from_numpy(data.astype(np.float32)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), bfloat16)

    def dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
        if a.dtype.scalar != bfloat16:
            return plain_dot(self, a, b, d, *settings)
        return TensorHandle(np.matmul(in_fp32(a), in_fp32(b)) + d.data, d.dtype.scalar)

    def sub(self: Any, a: Any, b: Any) -> Any:
        is_bfloat16 = a.dtype.scalar == bfloat16
        return rounded(in_fp32(a) - in_fp32(b)) if is_bfloat16 else plain_sub(self, a, b)

    def to(plain: Any) -> Any:
        return lambda self, x, dtype: rounded(x.data) if dtype.scalar == bfloat16 else plain(self, x, dtype)

    if not hasattr(InterpreterBuilder, "get_bf16"):  # before Triton 3.7
        monkeypatch.setattr(InterpreterBuilder, "get_bf16", lambda self, x: rounded(np.array([x])), raising=False)
    for name, function in zip(names, (dot, sub, to(plain_cast), to(plain_round)), strict=True):
        monkeypatch.setattr(InterpreterBuilder, name, function)


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "length"), [(1, 70, 32), (3, 64, 1056), (16, 33, 320)])
def test_int4_times_few_rows(rows: int, outputs: int, length: int, dtype: torch.dtype) -> None:
    """Padded blocks, one group, and more than the kernel takes at a time; only the result is rounded to 16 bits."""
    x, matrix = random(rows, length).to(dtype), Int4.quantize(random(outputs, length, seed=1).float())
    y = cuda.fast_linear(x.view(1, rows, length), matrix)
    exact = x.double() @ matrix.dequantize(torch.float64).T
    assert (y.shape, y.dtype) == ((1, rows, outputs), dtype)
    assert error(y[0], exact) <= 1.02 * error(exact.to(dtype), exact)


def test_int4_without_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, and columns of a larger matrix, which have gaps; in fp32 torch's products are nearly exact."""
    monkeypatch.setattr(cuda, "linear_few_int4", None)
    matrix = Int4.quantize(random(40, 96, seed=1).float())
    some = Int4(matrix.values[:, 1:], matrix.scales[:, 1:], matrix.row_scales)
    x = random(3, 64)
    expected = x.double() @ some.dequantize(torch.float64).T
    assert error(cuda.fast_linear(x, some), expected) <= 1.5 * error(REFERENCE.linear(x, some), expected)
    assert error(cuda.fast_linear(x.float(), some), expected) <= 1e-6
    x = random(3, 96).requires_grad_()
    cuda.fast_linear(x, matrix).sum().backward()
    assert x.grad is not None
    assert error(x.grad, matrix.dequantize(torch.float64).sum(0).expand(3, -1)) <= 1e-3


def test_int4_is_compiled_as_one_operator() -> None:
    """torch.compile knows the shape and dtype of the result without running the kernel."""
    x, matrix = random(3, 64), Int4.quantize(random(20, 64, seed=1).float())
    torch.library.opcheck(cuda_operators.linear_few_int4, (x, *matrix), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(cuda.fast_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, matrix), cuda.fast_linear(x, matrix))


@pytest.mark.parametrize(
    ("name", "max_bytes", "pieces"),
    [
        *(("int8", 1 << 28, 1), ("int8", 2 * 192 * 2000, 2), ("int8", 1, 3000)),
        *(("int4", 1 << 28, 1), ("int4", 2 * 192 * 2000, 2), ("int4", 1, 188)),
    ],
)
def test_many_rows_times_a_quantized_matrix(
    monkeypatch: pytest.MonkeyPatch, name: str, max_bytes: int, pieces: int
) -> None:
    """The whole matrix in one product, though it has more rows than the CPU dequantizes; or in pieces of max_bytes.

    Blocks of 16 outputs in int4 stay together.
    """
    x, matrix = random(20, 192), random(3000, 192, seed=1) * torch.rand(192).to(ON, DTYPE)
    rounded, dtypes = FORMATS[name].quantize(matrix), []
    exact = x.double() @ rounded.dequantize(torch.float64).T
    reference = error(REFERENCE.linear(x, rounded), exact)
    monkeypatch.setattr(cuda, "DEQUANTIZED_BYTES", max_bytes)
    product = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: dtypes.append(w.dtype) or product(x, w))
    y = cuda.fast_linear(x, rounded)
    assert dtypes == [DTYPE] * pieces
    assert y.dtype == DTYPE
    assert error(y, exact) <= 1.5 * reference


def test_the_bits_of_a_row_do_not_depend_on_the_others() -> None:
    """So that tokens are the same with and without prompt lookup."""
    x, matrix = random(16, 320), random(40, 320, seed=1)
    for weight in (matrix, Int8.quantize(matrix), Int4.quantize(matrix)):
        together = cuda.fast_linear(x, weight)
        alone = torch.cat([cuda.fast_linear(row, weight) for row in x.split(1)])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("rows", [17, 0])
def test_other_products_are_computed_by_torch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "linear_few", None)
    x, matrix = random(rows, 32), random(8, 32, seed=1)
    assert torch.equal(cuda.fast_linear(x, matrix), REFERENCE.linear(x, matrix))
    assert torch.equal(cuda.fast_linear(x[:1].float(), matrix.float()), REFERENCE.linear(x[:1].float(), matrix.float()))
    assert cuda.fast_linear(x, Int8.quantize(matrix)).shape == (rows, 8)


@pytest.mark.parametrize(
    "division", [cuda_operators.Division(16, 64, 3, 2, 4), cuda_operators.Division(32, 128, 1, 3, 8)]
)
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_other_divisions(division: cuda_operators.Division, name: str) -> None:
    """More rows in a program; columns in parts, of which the last is shorter, or empty."""
    for length in (300, 100):
        x, matrix = random(3, length), random(70, length, seed=1)
        rounded = Int8.quantize(matrix) if name == "int8" else matrix
        values, *scales = rounded if isinstance(rounded, Int8) else (rounded, None, None)
        y = cuda_operators.multiply(x, values, scales[0], scales[1], division)
        exact = x.double() @ (rounded if isinstance(rounded, Tensor) else rounded.dequantize(torch.float64)).double().T
        assert error(y, exact) <= 1.5 * error(REFERENCE.linear(x, rounded), exact)


def test_every_division_covers_any_matrix() -> None:
    for divisions in cuda_operators.DIVISIONS.values():
        most = [limit for limit, _ in divisions]
        assert most == sorted(most)
        assert most[-1] > 1 << 20  # more outputs than any vocabulary


@pytest.mark.parametrize("name", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 5])
def test_three_matrices_in_one_launch(name: str, rows: int) -> None:
    """The bits of the single products, with partial blocks between the matrices."""
    x = random(rows, 96)
    matrices = [random(size, 96, seed=size) for size in (70, 16, 40)]
    formed = [tuple(Int8.quantize(m)) if name == "int8" else (m,) for m in matrices]
    single = [cuda_operators.linear_few(x, *(m if len(m) == 3 else (*m, None, None))) for m in formed]
    assert torch.equal(cuda_operators.linear_three(x, *map(list, formed)), torch.cat(single, dim=1))


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_swiglu_in_one_launch(name: str) -> None:
    """As near to torch's as its exponential is, from the same products."""
    x, w1, w3 = random(5, 96), random(70, 96, seed=1), random(70, 96, seed=2)
    formed = [tuple(Int8.quantize(m)) if name == "int8" else (m,) for m in (w1, w3)]
    gate, up = (cuda_operators.linear_few(x, *(m if len(m) == 3 else (*m, None, None))) for m in formed)
    y = cuda_operators.swiglu_few(x, *map(list, formed))
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    assert error(y, exact) <= 1.1 * error(torch.nn.functional.silu(gate) * up, exact)


@pytest.mark.parametrize("shape", [(1, 96), (2, 3, 64)])
def test_rms_norm_in_one_launch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the model's, up to the rounding of a sum in fp32; other inputs are left to the model's."""
    x, weight = random(*shape), random(shape[-1], seed=1)
    expected = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(cuda.fast_rms_norm(x, weight, 1e-5), expected, rtol=2e-3, atol=1e-6)
    assert (cuda.fast_rms_norm(x, weight, 1e-5) == expected).float().mean() > 0.98
    monkeypatch.setattr(cuda, "rms_norm_by_kernel", None)
    assert torch.equal(cuda.fast_rms_norm(x.float(), weight.float(), 1e-5), rms_norm(x.float(), weight.float(), 1e-5))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("per_row", [False, True])
def test_rope_in_one_launch(tiny: Model, batch: tuple[int, ...], per_row: bool) -> None:
    """The model's bits; one start for all rows, or one for each; tokens that lie apart; and a head_dim of no kernel."""
    start = torch.tensor([5, 70][: len(batch) + 1], device=ON).view(*batch, *() if batch else (1,))
    positions = token_positions(start if per_row and batch else 7, 3, ON)
    for head_dim in (64, 48):
        cos, sin = rope_rotation(positions, Params(**{**vars(tiny.params), "head_dim": head_dim}))
        x = random(*batch, 3, 4, head_dim)
        assert torch.equal(cuda.fast_rope(x, cos, sin), rope(x, cos, sin))
    if not batch:
        apart = random(3, 500)[:, 100 : 100 + 4 * 64].unflatten(-1, (4, 64))
        cos, sin = rope_rotation(positions, Params(**{**vars(tiny.params), "head_dim": 64}))
        assert torch.equal(cuda.fast_rope(apart, cos, sin), rope(apart, cos, sin))


def test_rope_into_the_cache(tiny: Model) -> None:
    """The model's bits, at their place; the rest of the cache is left alone."""
    qkv = random(3, (4 + 2 * 2) * 32)
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in qkv.split((128, 64, 64), dim=1))
    cos, sin = rope_rotation(token_positions(6, 3, ON), Params(**{**vars(tiny.params), "head_dim": 32}))
    keys, values = random(20, 2, 32, seed=1), random(20, 2, 32, seed=2)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[6:9], expected_values[6:9] = rope(k, cos, sin), v
    rotated = cuda_operators.rope_into_cache(qkv, cos, sin, torch.tensor(6, device=ON), keys, values)
    assert torch.equal(rotated, rope(q, cos, sin))
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


def test_operators_say_what_they_return(tiny: Model) -> None:
    """Shape and dtype without running the kernel, and what is written; torch.compile relies on both."""
    x, matrix, norm = random(3, 64), random(16, 64, seed=1), random(64)
    cos, sin = rope_rotation(token_positions(0, 3, ON), Params(**{**vars(tiny.params), "head_dim": 16}))
    cache, start = (random(9, 1, 16), random(9, 1, 16)), torch.tensor(2, device=ON)
    for operator, arguments in (
        (cuda_operators.linear_few, (x, matrix, None, None)),
        (cuda_operators.linear_three, (x, [matrix], [matrix], [matrix])),
        (cuda_operators.swiglu_few, (x, [matrix], [matrix])),
        (cuda_operators.rms_norm_by_kernel, (x, norm, 1e-5)),
        (cuda_operators.rope_by_kernel, (x.view(3, 4, 16), cos, sin)),
        (cuda_operators.rope_into_cache, (x, cos, sin, start, *cache)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_tokens", "n_heads", "n_kv_heads", "start"),
    [(1, 8, 2, 0), (1, 8, 2, 1400), (5, 4, 4, 3), (16, 8, 2, 280), (2, 6, 2, 64)],
)
def test_few_tokens_attend(n_tokens: int, n_heads: int, n_kv_heads: int, start: int) -> None:
    """Many keys, few keys, three query heads for each kv head; the cache after the tokens is not read."""
    end = start + n_tokens
    q = random(n_tokens, n_heads, 64)
    keys, values = random(end + 50, n_kv_heads, 64, seed=1), random(end + 50, n_kv_heads, 64, seed=2)
    exact = attend(q.double(), keys[:end].double(), values[:end].double(), start, no_tap)
    reference = attend(q, keys[:end], values[:end], start, no_tap)
    keys[end:] = values[end:] = torch.nan
    fast = cuda.attend(q, keys, values, torch.tensor(start, device=ON), no_tap)
    assert error(fast, exact) <= 1.5 * error(reference, exact)
    assert torch.equal(cuda.attend(q, keys[:end], values[:end], start, no_tap), fast)


def test_each_row_of_a_batch_has_its_own_start() -> None:
    q, keys, values = random(2, 3, 8, 64), random(2, 90, 2, 64, seed=1), random(2, 90, 2, 64, seed=2)
    starts = torch.tensor([4, 77], device=ON)
    exact = attend(q.double(), keys.double(), values.double(), starts, no_tap)
    reference = attend(q, keys, values, starts, no_tap)
    assert error(cuda.attend(q, keys, values, starts, no_tap), exact) <= 1.5 * error(reference, exact)


@pytest.mark.parametrize("n_keys", [40, 100])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("has_flash", [True, False])
def test_a_prompt_attends(
    monkeypatch: pytest.MonkeyPatch, n_keys: int, batch: tuple[int, ...], has_flash: bool
) -> None:
    """A whole prompt, and the second chunk of one. Flash attention is for GPUs; here torch's masked one stands in."""

    def flash_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        assert q.dim() == keys.dim() == values.dim() == 4
        mask = torch.ones(q.shape[-2], keys.shape[-2], dtype=torch.bool).tril(keys.shape[-2] - q.shape[-2])
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    in_blocks: list[int] = []
    monkeypatch.setattr(cuda, "can_use_flash_attention", lambda _: has_flash)
    monkeypatch.setattr(cuda, "_flash_attention", flash_attention)
    monkeypatch.setattr(cuda, "attend_by_torch", lambda *args: in_blocks.append(1) or attend_by_torch(*args))
    q = random(*batch, 40, 8, 64).float()
    keys, values = random(*batch, n_keys, 2, 64, seed=1).float(), random(*batch, n_keys, 2, 64, seed=2).float()
    expected = attend(q, keys, values, n_keys - 40, no_tap)
    torch.testing.assert_close(cuda.attend(q, keys, values, n_keys - 40, no_tap), expected, atol=2e-6, rtol=0)
    assert len(in_blocks) == (0 if has_flash else 1)


@pytest.mark.slow
def test_the_whole_pass(tiny: Model) -> None:
    """A prompt, then few tokens at a time, in two layers, with all kernels: as accurate as fast operations must be.

    In 16 bits, the error of a position is 0.3 to 2.6 times that of the exact operations; over 33 of them it is similar.
    """
    # the interpreter needs ten seconds for a layer, and as long for the whole vocabulary
    two_layers = tiny.weights._replace(layers=tiny.weights.layers[:2], output=dense(tiny.weights.output)[:512])
    model = tiny._replace(weights=converted(two_layers, lambda tensor: tensor.to(ON, DTYPE)))
    exact_model = model._replace(weights=cast(model.weights, torch.float32))
    ids = torch.arange(300, 357, device=ON)

    def logits(of: Model, ops: Ops) -> Tensor:
        cache = KVCache.allocate(of.params, max_seq_len=64, like=of.weights)
        forward(of.weights, of.params, ids[:24], cache=cache, ops=ops)
        at = torch.tensor(24, device=ON)
        few = forward(of.weights, of.params, ids[24:40], cache=cache, start=at, ops=ops)
        more = forward(of.weights, of.params, ids[40:56], cache=cache, start=40, ops=ops)
        one = forward(of.weights, of.params, ids[56:], cache=cache, start=56, ops=ops)
        return torch.cat((few, more, one))

    exact = logits(exact_model, REFERENCE)
    assert error(logits(model, cuda.cuda_ops()), exact) <= 1.5 * error(logits(model, REFERENCE), exact)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama3_raw.backends import cuda_kernels

F32, I32, BF16 = "*fp32", "i32", "*bf16"
CASES = [
    (kernel, [BF16, *[matrix, F32, F32] * matrices, sums, *[I32] * whole, is_int8, 16, 16, 256, *splits], 4)
    for matrix, is_int8 in ((BF16, False), ("*i8", True))
    for kernel, matrices, sums, whole, splits in (
        (cuda_kernels.linear_kernel, 1, BF16, 3, [1]),
        (cuda_kernels.linear_kernel, 1, F32, 3, [4]),
        (cuda_kernels.linear_three_kernel, 3, BF16, 5, []),
        (cuda_kernels.swiglu_kernel, 2, BF16, 3, []),
    )
] + [
    (cuda_kernels.add_kernel, [F32, BF16, I32, 4, 1024], 3),
    (cuda_kernels.rms_norm_kernel, [BF16, BF16, BF16, I32, "fp32", 4096], 3),
    (cuda_kernels.rope_kernel, [BF16, F32, F32, BF16, I32, I32, I32, I32, 64], 3),
    (cuda_kernels.rope_into_cache_kernel, [BF16, F32, F32, "*i64", BF16, BF16, BF16, I32, I32, I32, 64], 3),
] + [
    (cuda_kernels.linear_int4_kernel, [BF16, "*u8", "*u8", F32, BF16] + [I32] * 3 + [128, 0x4300, 16, 32, 3], 3)
] + [
    (cuda_kernels.attend_kernel, [BF16] * 3 + ["*i64"] + [F32] * 3 + [I32] * 4 + ["fp32", 4, rows, 128, 64, 16], 3)
    for rows in (16, 64)
] + [(cuda_kernels.join_kernel, [F32] * 3 + [BF16, I32, I32, 4, 64, 128, 16], 3)]
SMALL = (cuda_kernels.linear_kernel, cuda_kernels.linear_three_kernel)  # several fit on a multiprocessor
ROPES = (cuda_kernels.rope_kernel, cuda_kernels.rope_into_cache_kernel)  # they have the bits of torch
for capability in (80, 90):
    for kernel, arguments, stages in CASES:
        types = {n: a if isinstance(a, str) else "constexpr" for n, a in zip(kernel.arg_names, arguments, strict=True)}
        constants = {(i,): a for i, a in enumerate(arguments) if not isinstance(a, str)}
        whole = [i for i, a in enumerate(arguments) if isinstance(a, str) and a != "fp32"]
        by_16 = {(i,): [["tt.divisibility", 16]] for i in whole}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=by_16)
        options = {"num_stages": stages, "enable_fp_fusion": kernel not in ROPES}
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert binary.metadata.shared <= (64 if kernel in SMALL else 160) * 1024, (kernel, binary.metadata.shared)
        assert kernel not in ROPES or "fma.rn.f32" not in binary.asm["ptx"]
        print(len(binary.asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_kernels_compile_for_gpus() -> None:
    """For the A100 and the H100, to machine code; the interpreter accepts much that no GPU does."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 32
