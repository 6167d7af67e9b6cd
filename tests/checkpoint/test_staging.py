"""Staging: a pinned buffer is kept until its copy is done. With a fake device, and on a GPU if there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import Params, convert
from llama3_raw.checkpoint import loading
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import build_weights
from llama3_raw.checkpoint.staging import Move, StagingRoute, staged_by, staging
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.quantization.int4 import Int4
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import FORMATS, tensors_of
from tests.paths import TINY
from tests.references import converted, flat, hf_model, random_weights

CPU = torch.device("cpu")
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "multiple_of": 32}


class FakeDevice:
    """A fake GPU whose copies happen at once, or as late as possible: when they are waited for."""

    def __init__(self, late: bool):
        self.late = late
        self.pinned: Tensor | None = None
        self.in_flight = 0
        self.max_in_flight = 0
        self.copies = 0

    def route(self) -> StagingRoute:
        return StagingRoute(self.pin, self.start_copy)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        assert self.pinned is None
        self.pinned = memory

        def unpin() -> None:
            assert not self.in_flight  # a GPU would read memory that is no longer its own
            self.pinned = None

        return unpin

    def start_copy(self, target: Tensor, staged: Tensor) -> Callable[[], None]:
        assert self.pinned is not None
        begin, end = self.pinned.data_ptr(), self.pinned.data_ptr() + self.pinned.nbytes
        assert begin <= staged.data_ptr() <= staged.data_ptr() + staged.nbytes <= end
        self.copies += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        is_done = False
        if not self.late:
            target.copy_(staged)

        def wait() -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                self.in_flight -= 1
                if self.late:
                    target.copy_(staged)

        return wait


@pytest.fixture(params=["at once", "late"])
def device(request: pytest.FixtureRequest) -> FakeDevice:
    return FakeDevice(late=request.param == "late")


def assert_same(ours: llama3_raw.Weights, theirs: llama3_raw.Weights) -> None:
    pairs = list(zip(map(tensors_of, flat(ours)), map(tensors_of, flat(theirs)), strict=True))
    assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def to_cpu(matrix: Tensor | Int8 | Int4) -> Tensor | Int8 | Int4:
    return type(matrix)(*(tensor.cpu() for tensor in matrix)) if isinstance(matrix, Int8 | Int4) else matrix.cpu()


def test_every_size_is_copied_completely(device: FakeDevice) -> None:
    """Buffers of 8 KiB: less than one, exactly one, one and a value, many times round the ring, and again small."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 7, 4096, 4097, 300_001, 4095, 5, 64 * 4096]
    sources = [torch.randint(-(2**15), 2**15, (size,), generator=generator).to(torch.int16) for size in sizes]
    with staged_by(CPU, 10**9, device.route(), max_bytes=8192) as move:
        moved = [move(source, None) for source in sources]
    assert all(torch.equal(a, b) for a, b in zip(moved, sources, strict=True))
    assert device.copies == sum(-(-size // 4096) for size in sizes)
    assert device.max_in_flight > 1  # the next buffer is filled while one is copied


def test_a_buffer_of_several_pieces(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3_raw.checkpoint.staging.PIECE_BYTES", 1000)
    source = torch.randn(50_001)
    with staged_by(CPU, source.nbytes, device.route()) as move:
        moved = move(source, None)
    assert torch.equal(moved, source)


def test_dtype_and_strides(device: FakeDevice) -> None:
    """The values are copied in the stored dtype, and converted on the device."""
    seen = []
    start_copy = device.start_copy

    def spy(target: Tensor, staged: Tensor) -> Callable[[], None]:
        seen.append((target.dtype, staged.dtype))
        return start_copy(target, staged)

    matrix = torch.randn(70, 90).t()
    with staged_by(CPU, 4096, StagingRoute(device.pin, spy)) as move:
        moved = move(matrix, torch.bfloat16)
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert torch.equal(moved, matrix.bfloat16())


def test_nothing_stays_pinned_if_the_device_is_full(device: FakeDevice) -> None:
    source = torch.zeros(10_000)
    with pytest.raises(RuntimeError, match="full"), staged_by(CPU, source.nbytes, device.route()) as move:  # noqa: PT012
        move(source, None)
        raise RuntimeError("the device is full")
    assert device.copies == 1
    assert (device.pinned, device.in_flight) == (None, 0)


def test_a_small_model_pins_little(device: FakeDevice) -> None:
    with staged_by(CPU, 5000, device.route()):
        assert device.pinned is not None
        assert device.pinned.nbytes == 4 * 8192


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(3)
    with staging(CPU, 12) as move:
        assert move(tensor, None) is tensor
        assert move(tensor, torch.bfloat16).dtype == torch.bfloat16


def test_tensors_on_a_gpu_bypass_the_ring(device: FakeDevice) -> None:
    """The CPU cannot read them; "meta" stands for a GPU here."""
    there = torch.empty(5000, device="meta")
    with staged_by(torch.device("meta"), 4096, device.route()) as move:
        assert move(there, None) is there
        assert move(there, torch.bfloat16).dtype == torch.bfloat16
    assert device.copies == 0


def test_a_driver_that_cannot_pin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line says so, and staging continues. Pinned memory is unpinned, by its address. All calls are for that GPU."""
    calls: list[tuple[object, ...]] = []
    error = 2  # cudaErrorMemoryAllocation

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        calls.append(("on", device))
        yield
        calls.append(("off",))

    def register(address: int, n_bytes: int, flags: int) -> int:
        calls.append(("pin", address, n_bytes))
        return error

    def kernel(*shape: int, device: torch.device) -> None:
        calls.append(("kernel", device))
        raise torch.AcceleratorError("CUDA error: out of memory")  # of the call before

    def unregister(address: int) -> None:
        calls.append(("unpin", address))

    library = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch, "ones", kernel)
    gpu = torch.device("cuda", 1)
    with staging(gpu, 10**9):
        pass
    on, pin, off = ("on", gpu), ("pin", calls[1][1], 4 * 2**25), ("off",)
    assert calls == [on, pin, ("kernel", gpu), off]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llama3_raw: cuda:1: 134 MB of memory cannot be pinned for it (CUDA's error 2); loading")
    error = 0
    calls.clear()
    with staging(gpu, 10**9):
        pass
    assert calls == [on, ("pin", calls[1][1], 4 * 2**25), off, on, ("unpin", calls[1][1]), off]
    assert not capsys.readouterr().err


def model_folder(tmp_path: Path, case: str) -> Path:
    """Return a model of each kind that loading treats differently."""
    if case in ("hf", "tied"):
        params = Params.from_meta(SMALL)
        hf_model(params, random_weights(params, torch.bfloat16, seed=0, tied=case == "tied")).save_pretrained(tmp_path)
        return tmp_path
    if case == "shards":
        assert convert.main([str(TINY), str(tmp_path / "shards"), "--shards", "2"]) == 0
        return tmp_path / "shards"
    if case in FORMATS:
        save_quantized(TINY, open_checkpoint(TINY), tmp_path / "saved", quantize=case)
        return tmp_path / "saved"
    return Path(shutil.copytree(TINY, tmp_path / "model"))


CASES = ["meta", "hf", "tied", "shards", *FORMATS]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as stored", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_loading_through_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: FakeDevice, case: str, dtype: torch.dtype | None
) -> None:
    """build_weights with a fake GPU; the ring is small, so that all of it is used."""
    checkpoint = open_checkpoint(model_folder(tmp_path, case))
    expected = build_weights(checkpoint, CPU, dtype)

    def fake_staging(to: torch.device, largest: int) -> AbstractContextManager[Move]:
        return staged_by(to, largest, device.route(), max_bytes=4096)

    monkeypatch.setattr(loading, "staging", fake_staging)
    ours = build_weights(checkpoint, CPU, dtype, progress=True)
    assert_same(ours, expected)
    assert device.copies > len(list(flat(ours)))
    assert device.pinned is None
    assert (ours.output is ours.tok_embeddings) == checkpoint.tied
    in_file = {shard.data_ptr() for shards in checkpoint.shards.values() for shard in shards}
    assert in_file.isdisjoint(tensor.data_ptr() for matrix in flat(ours) for tensor in tensors_of(matrix))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as stored", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_loading_to_a_gpu(tmp_path: Path, case: str, dtype: torch.dtype | None) -> None:
    """Every tensor has the same bits as on the CPU."""
    folder = model_folder(tmp_path, case)
    on_gpu = llama3_raw.load(folder, device="cuda", dtype=dtype, tokenizer=False)
    assert all(tensor.is_cuda for matrix in flat(on_gpu.weights) for tensor in tensors_of(matrix))
    back = converted(on_gpu.weights, to_cpu)
    assert_same(back, llama3_raw.load(folder, dtype=dtype, tokenizer=False).weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_a_large_tensor_to_a_gpu() -> None:
    """Several times the whole ring; twice, so that memory is unpinned in between."""
    source = torch.randn(150_000_001)
    for _ in range(2):
        with staging(torch.device("cuda"), source.nbytes) as move:
            moved, converted_there = move(source, None), move(source, torch.bfloat16)
        assert torch.equal(moved.cpu(), source)
        assert torch.equal(converted_there.cpu(), source.bfloat16())
