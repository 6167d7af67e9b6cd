"""The fast CPU operations: as exact as the reference ones, and a token's bits do not depend on what is beside it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from references import cast
from torch import Tensor

from llama3_raw import REFERENCE, KVCache, Model, forward, generate, ops_cpu
from llama3_raw.model import no_tap
from llama3_raw.ops import Ops

ROOT = Path(__file__).parent.parent


def runs_here(instruction_set: str) -> bool:
    """Whether this processor has the instructions, by what /proc/cpuinfo says of it."""
    needed = {"avx512_bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2"}.get(instruction_set)
    cpuinfo = Path("/proc/cpuinfo")
    return needed is None or (cpuinfo.exists() and f" {needed} " in cpuinfo.read_text().replace("\n", " \n"))


@pytest.fixture(scope="module", params=list(ops_cpu.INSTRUCTION_SETS))
def ops(request: pytest.FixtureRequest) -> Ops:
    """The operations built for each kind of processor that this one can be."""
    if not runs_here(request.param):
        pytest.skip(f"this processor has no {request.param}")
    try:
        return ops_cpu.make_ops(ops_cpu.build_kernels(request.param))
    except ops_cpu.CannotBuild as reason:
        pytest.skip(f"cannot be built here: {reason}")


def rms_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).square().mean().sqrt())


@pytest.mark.parametrize(("outputs", "length"), [(256, 96), (130, 4096), (1, 32), (7, 64)])
def test_products_are_as_exact_as_torchs(ops: Ops, outputs: int, length: int) -> None:
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


@pytest.mark.parametrize("case", ["float32", "odd length", "many rows", "not contiguous", "with gradient"])
def test_products_that_torch_does(ops: Ops, case: str) -> None:
    x, w = torch.randn(3, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    if case == "float32":
        x, w = x.float(), w.float()
    elif case == "odd length":
        x, w = x[:, :33], w[:, :33]
    elif case == "many rows":
        x = torch.randn(17, 64).bfloat16()
    elif case == "not contiguous":
        w = torch.randn(64, 64).bfloat16().t()
    else:
        w.requires_grad_()
    assert torch.equal(ops.linear(x, w), torch.nn.functional.linear(x, w))


# n_heads, n_kv_heads, head_dim, tokens before: one chunk of keys, its edges, several
SHAPES = [(32, 8, 128, 700), (9, 3, 64, 241), (6, 6, 32, 0), (8, 1, 64, 255), (10, 2, 32, 256), (4, 2, 96, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_as_exact_as_the_reference(ops: Ops, shape: tuple[int, int, int, int]) -> None:
    n_heads, n_kv_heads, head_dim, start = shape
    generator = torch.Generator().manual_seed(1)
    q = 3 * torch.randn(16, n_heads, head_dim, generator=generator).bfloat16()
    keys, values = (torch.randn(start + 16, n_kv_heads, head_dim, generator=generator).bfloat16() for _ in "kv")
    exact = REFERENCE.attend(q.double(), keys.double(), values.double(), start, no_tap, "")
    reference = REFERENCE.attend(q, keys, values, start, no_tap, "")
    together = ops.attend(q, keys, values, start, no_tap, "")
    assert rms_error(together, exact) <= rms_error(reference, exact)
    for t in range(16):
        end = start + t + 1
        alone = ops.attend(q[t : t + 1], keys[:end], values[:end], start + t, no_tap, "")
        assert torch.equal(alone, together[t : t + 1])
    many = ops_cpu.attend_by_torch(q, keys, values, start)
    assert rms_error(many, exact) <= rms_error(reference, exact)


def test_attention_to_far_away_scores(ops: Ops) -> None:
    """Weights that vanish and one that is all, and a head that sees itself alone."""
    q = torch.zeros(2, 1, 32).bfloat16()
    q[..., 0] = 100.0
    keys, values = torch.zeros(300, 1, 32).bfloat16(), torch.randn(300, 1, 32).bfloat16()
    keys[7, 0, 0], keys[298, 0, 0] = 200.0, -200.0
    assert torch.equal(ops.attend(q, keys, values, 298, no_tap, ""), values[7].expand(2, 1, 32))
    assert torch.equal(ops.attend(q[:1], keys[:1], values[:1], 0, no_tap, "")[0], values[0])


def test_the_threads_do_not_change_the_bits(ops: Ops) -> None:
    x, w = torch.randn(5, 512).bfloat16(), torch.randn(1000, 512).bfloat16()
    q, keys, values = (torch.randn(length, 4, 64).bfloat16() for length in (5, 900, 900))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((ops.linear(x, w), ops.attend(q, keys, values, 895, no_tap, "")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def logits_in_pieces(model: Model, ops: Ops, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = KVCache.allocate(model.params, max_seq_len=len(ids), like=model.weights)
    start, logits = 0, []
    for size in sizes:
        piece = ids[start : start + size]
        logits.append(forward(model.weights, model.params, piece, cache=cache, start=start, ops=ops))
        start += size
    return torch.cat(logits)


def test_a_token_has_the_same_bits_alone_and_among_others(ops: Ops, tiny: Model) -> None:
    """The whole model, 1 to 16 tokens at a time: what prompt lookup stands on."""
    ids = torch.randint(2000, (48,), generator=torch.Generator().manual_seed(2))
    alone = logits_in_pieces(tiny, ops, ids, [1] * 48)
    assert torch.equal(logits_in_pieces(tiny, ops, ids, [16, 16, 16]), alone)
    assert torch.equal(logits_in_pieces(tiny, ops, ids, [3, 13, 1, 15, 2, 14]), alone)


def test_the_model_is_as_exact_as_with_the_reference(ops: Ops, smollm2: Model) -> None:
    """Trained weights in bf16: the error against the fp32 result, by tokens alone and all at once."""
    ids = torch.randint(49152, (40,), generator=torch.Generator().manual_seed(3))
    exact = forward(smollm2.weights, smollm2.params, ids)
    bf16 = smollm2._replace(weights=cast(smollm2.weights, torch.bfloat16))
    reference = rms_error(forward(bf16.weights, bf16.params, ids), exact)
    for sizes in ([1] * 40, [40]):
        assert rms_error(logits_in_pieces(bf16, ops, ids, sizes), exact) <= 1.5 * reference


def test_generate_takes_them(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast = ops_cpu.fast_ops()
    counting = fast._replace(linear=lambda x, w: calls.append(x.shape) or fast.linear(x, w))
    monkeypatch.setattr("llama3_raw.generation.fast_ops", lambda: counting)
    assert list(generate(tiny, [1, 2, 3], max_new_tokens=3, stop_ids=()))
    assert calls
    calls.clear()
    list(generate(tiny, [1, 2, 3], max_new_tokens=3, ops=REFERENCE))
    assert not calls


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_does_it(tmp_path: Path, compiler: str) -> None:
    """One line says so, and the text is the same as far as rounding leaves it."""
    command = [sys.executable, "-m", "llama3_raw", "--weights", "weights/tiny", "Once upon a time"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    lines = []
    texts = []
    for extra in ({}, {"CC": compiler}):
        done = subprocess.run(
            [*command, "--max-new-tokens", "20"],
            cwd=ROOT,
            env={**environment, **extra},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0
        texts.append(done.stdout)
        lines.append([line for line in done.stderr.splitlines() if "torch's own products" in line])
    assert texts[0] == texts[1]
    assert lines[0] == []
    assert len(lines[1]) == 1
    assert compiler in lines[1][0]


def test_the_kernels_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops_cpu.build_kernels()
    (built,) = (tmp_path / "llama3_raw").iterdir()
    time = built.stat().st_mtime_ns
    ops_cpu.build_kernels()
    assert [file.stat().st_mtime_ns for file in (tmp_path / "llama3_raw").iterdir()] == [time]


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/maps")
def test_there_is_one_pool_of_threads() -> None:
    """The kernels take OpenMP from torch: no second library with a pool of its own is loaded."""
    code = "from llama3_raw.ops_cpu import build_kernels\nbuild_kernels()\nprint(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(set(re.findall(r"\S+/lib[gi]?omp[^/\s]*", done.stdout))) == 1
