"""The way to a GPU: what is in a pinned buffer stays until its copy is done; with stand-ins, and where there is one."""

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
from llama3_raw.checkpoint.staging import Move, Route, mover, staged_mover
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.quantization.int8 import Int8
from tests.paths import TINY
from tests.references import converted, flat, hf_model, random_weights

CPU = torch.device("cpu")
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "multiple_of": 32}


class PretendDevice:
    """Stands in for a GPU: its copies are carried out at once, or as late as is allowed, when they are waited for."""

    def __init__(self, late: bool):
        self.late = late
        self.pinned: Tensor | None = None
        self.under_way = 0
        self.most_under_way = 0
        self.copies = 0

    def route(self) -> Route:
        return Route(self.pin, self.start_copy)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        assert self.pinned is None
        self.pinned = memory

        def unpin() -> None:
            assert not self.under_way  # a GPU would read from memory that is another's
            self.pinned = None

        return unpin

    def start_copy(self, target: Tensor, staged: Tensor) -> Callable[[], None]:
        assert self.pinned is not None
        begin, end = self.pinned.data_ptr(), self.pinned.data_ptr() + self.pinned.nbytes
        assert begin <= staged.data_ptr() <= staged.data_ptr() + staged.nbytes <= end
        self.copies += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        is_done = False
        if not self.late:
            target.copy_(staged)

        def wait() -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                self.under_way -= 1
                if self.late:
                    target.copy_(staged)

        return wait


@pytest.fixture(params=["at once", "late"])
def device(request: pytest.FixtureRequest) -> PretendDevice:
    return PretendDevice(late=request.param == "late")


def assert_same(ours: llama3_raw.Weights, theirs: llama3_raw.Weights) -> None:
    pairs = list(zip(map(parts_of, flat(ours)), map(parts_of, flat(theirs)), strict=True))
    assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def parts_of(matrix: Tensor | Int8) -> tuple[Tensor, ...]:
    return tuple(matrix) if isinstance(matrix, Int8) else (matrix,)


def to_cpu(matrix: Tensor | Int8) -> Tensor | Int8:
    return Int8(*(part.cpu() for part in matrix)) if isinstance(matrix, Int8) else matrix.cpu()


def test_every_size_arrives_whole(device: PretendDevice) -> None:
    """Buffers of 8 KiB: less than one, exactly one, one and a value, many times round the ring, and again small."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 7, 4096, 4097, 300_001, 4095, 5, 64 * 4096]
    sources = [torch.randint(-(2**15), 2**15, (size,), generator=generator).to(torch.int16) for size in sizes]
    with staged_mover(CPU, 10**9, device.route(), most=8192) as move:
        moved = [move(source, None) for source in sources]
    assert all(torch.equal(a, b) for a, b in zip(moved, sources, strict=True))
    assert device.copies == sum(-(-size // 4096) for size in sizes)
    assert device.most_under_way > 1  # the next buffer is filled while one is on its way


def test_pieces_of_one_buffer_are_all_there(device: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3_raw.checkpoint.staging.PIECE_BYTES", 1000)
    source = torch.randn(50_001)
    with staged_mover(CPU, source.nbytes, device.route()) as move:
        moved = move(source, None)
    assert torch.equal(moved, source)


def test_dtype_and_strides(device: PretendDevice) -> None:
    """The values cross as they are stored, and are converted behind it."""
    seen = []
    start_copy = device.start_copy

    def spy(target: Tensor, staged: Tensor) -> Callable[[], None]:
        seen.append((target.dtype, staged.dtype))
        return start_copy(target, staged)

    matrix = torch.randn(70, 90).t()
    with staged_mover(CPU, 4096, Route(device.pin, spy)) as move:
        moved = move(matrix, torch.bfloat16)
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert torch.equal(moved, matrix.bfloat16())


def test_nothing_stays_pinned_where_the_device_is_full(device: PretendDevice) -> None:
    source = torch.zeros(10_000)
    with pytest.raises(RuntimeError, match="full"), staged_mover(CPU, source.nbytes, device.route()) as move:  # noqa: PT012
        move(source, None)
        raise RuntimeError("the device is full")
    assert device.copies == 1
    assert (device.pinned, device.under_way) == (None, 0)


def test_a_small_model_pins_little(device: PretendDevice) -> None:
    with staged_mover(CPU, 5000, device.route()):
        assert device.pinned is not None
        assert device.pinned.nbytes == 4 * 8192


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(3)
    with mover(CPU, 12) as move:
        assert move(tensor, None) is tensor
        assert move(tensor, torch.bfloat16).dtype == torch.bfloat16


def test_what_is_on_a_gpu_already_does_not_go_through_the_ring(device: PretendDevice) -> None:
    """Its bytes are not for the CPU to read; "meta" stands for a GPU here."""
    there = torch.empty(5000, device="meta")
    with staged_mover(torch.device("meta"), 4096, device.route()) as move:
        assert move(there, None) is there
        assert move(there, torch.bfloat16).dtype == torch.bfloat16
    assert device.copies == 0


def test_what_the_driver_does_not_pin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so, and it goes on; what it pins is let go, by the same address. All of it on the GPU meant."""
    did: list[tuple[object, ...]] = []
    error = 2  # cudaErrorMemoryAllocation

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        did.append(("on", device))
        yield
        did.append(("off",))

    def register(address: int, n_bytes: int, flags: int) -> int:
        did.append(("pin", address, n_bytes))
        return error

    def kernel(*shape: int, device: torch.device) -> None:
        did.append(("kernel", device))
        raise torch.AcceleratorError("CUDA error: out of memory")  # that of before

    library = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: did.append(("go", address)))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch, "ones", kernel)
    gpu = torch.device("cuda", 1)
    with mover(gpu, 10**9):
        pass
    on, pin, off = ("on", gpu), ("pin", did[1][1], 4 * 2**25), ("off",)
    assert did == [on, pin, ("kernel", gpu), off]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llama3_raw: cuda:1: 134 MB of memory cannot be pinned for it (CUDA's error 2); the weights")
    error = 0
    did.clear()
    with mover(gpu, 10**9):
        pass
    assert did == [on, ("pin", did[1][1], 4 * 2**25), off, on, ("go", did[1][1]), off]
    assert not capsys.readouterr().err


def model_folder(tmp_path: Path, case: str) -> Path:
    """A model of each kind that loading has something to do with."""
    if case in ("hf", "tied"):
        params = Params.from_meta(SMALL)
        hf_model(params, random_weights(params, torch.bfloat16, seed=0, tied=case == "tied")).save_pretrained(tmp_path)
        return tmp_path
    if case == "shards":
        assert convert.main([str(TINY), str(tmp_path / "shards"), "--shards", "2"]) == 0
        return tmp_path / "shards"
    if case == "int8":
        save_quantized(TINY, open_checkpoint(TINY), tmp_path / "int8")
        return tmp_path / "int8"
    return Path(shutil.copytree(TINY, tmp_path / "model"))


CASES = ["meta", "hf", "tied", "shards", "int8"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as stored", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_a_load_by_way_of_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: PretendDevice, case: str, dtype: torch.dtype | None
) -> None:
    """build_weights, which takes a pretended GPU for one; the ring is small, so that all of it is used."""
    checkpoint = open_checkpoint(model_folder(tmp_path, case))
    expected = build_weights(checkpoint, CPU, dtype)

    def pretended(to: torch.device, largest: int) -> AbstractContextManager[Move]:
        return staged_mover(to, largest, device.route(), most=4096)

    monkeypatch.setattr(loading, "mover", pretended)
    ours = build_weights(checkpoint, CPU, dtype, progress=True)
    assert_same(ours, expected)
    assert device.copies > len(list(flat(ours)))
    assert device.pinned is None
    assert (ours.output is ours.tok_embeddings) == checkpoint.tied
    in_file = {part.data_ptr() for parts in checkpoint.parts.values() for part in parts}
    assert in_file.isdisjoint(part.data_ptr() for matrix in flat(ours) for part in parts_of(matrix))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as stored", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_loading_to_a_gpu(tmp_path: Path, case: str, dtype: torch.dtype | None) -> None:
    """Every tensor has the bits that it has on the CPU."""
    folder = model_folder(tmp_path, case)
    on_gpu = llama3_raw.load(folder, device="cuda", dtype=dtype, tokenizer=False)
    assert all(part.is_cuda for matrix in flat(on_gpu.weights) for part in parts_of(matrix))
    back = converted(on_gpu.weights, to_cpu)
    assert_same(back, llama3_raw.load(folder, dtype=dtype, tokenizer=False).weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_a_large_tensor_to_a_gpu() -> None:
    """More than the whole ring, several times; and again, with what was pinned let go."""
    source = torch.randn(150_000_001)
    for _ in range(2):
        with mover(torch.device("cuda"), source.nbytes) as move:
            moved, converted_there = move(source, None), move(source, torch.bfloat16)
        assert torch.equal(moved.cpu(), source)
        assert torch.equal(converted_there.cpu(), source.bfloat16())
