"""Weights that are read ahead from their file: the same bits in less memory, also within a control group's limit."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, UserError, forward, generate
from llama3_raw.__main__ import main
from llama3_raw.backends import streaming
from llama3_raw.backends.cpu import fast_ops
from llama3_raw.backends.streaming import least_memory
from llama3_raw.bench.synthetic import SYNTHETIC, make_synthetic
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, check_memory
from llama3_raw.cli.options import byte_size
from llama3_raw.ops import Ops
from llama3_raw.quantization.matrix import Matrix
from llama3_raw.weights import MATRICES
from tests.plans import CPU, GPU, checkpoint
from tests.references import dense

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reading ahead is built on Linux's madvise"),
]

IDS = torch.tensor([1, 200, 30, 4, 999, 5, 77, 8])
EDGES = 2_000_000  # bytes that stay in addition to the matrices: pages of norms, and pages that two tensors share


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 70 MB on a disk: 3 layers of 23 MB, an output of 2 MB."""
    root = tmp_path_factory.mktemp("read_ahead")
    mounts = [mount for mount in psutil.disk_partitions(all=True) if root.is_relative_to(mount.mountpoint)]
    if max(mounts, key=lambda mount: len(mount.mountpoint)).fstype in ("tmpfs", "ramfs"):
        pytest.skip("the folder for temporary files is in memory; give another with --basetemp")
    content = {"dim": 1024, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 1000, "norm_eps": 1e-5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYNTHETIC, "70 MB", (content, False))
        make_synthetic("70 MB", root / "model")
    with open(root / "model" / "consolidated.00.pth", "rb+") as file:
        os.fsync(file)  # pages that are not yet on the disk cannot be dropped
    return root / "model"


@pytest.fixture
def model(folder: Path) -> Model:
    return llama3_raw.load(folder)


def logits_of(model: Model, ops: Ops) -> torch.Tensor:
    """Return the logits of a prompt, computed at once, and of two tokens after it: [T, vocab_size]."""
    cache = KVCache.allocate(model.params, max_seq_len=len(IDS), like=model.weights)
    pieces = [IDS[:-2], *IDS[-2:].split(1)]
    starts = [0, *range(len(IDS) - 2, len(IDS))]
    with torch.no_grad():
        return torch.cat(
            [
                forward(model.weights, model.params, piece, cache=cache, start=start, ops=ops)
                for piece, start in zip(pieces, starts, strict=True)
            ]
        )


def resident(folder: Path) -> int:
    """Return how many bytes of the weights in a folder are in this process's memory. (proc_pid_smaps.5)"""
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            counting = f" {folder}/" in line
        elif counting and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def watched(ops: Ops, callback: Callable[[], None]) -> Ops:
    """Return the operations, with a callback at every product."""

    def linear(x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        callback()
        return ops.linear(x, weight)

    return ops._replace(linear=linear)


@pytest.mark.parametrize("ops", ["fast", "reference"])
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["the minimum", "half of it kept"])
def test_the_same_bits_in_less_memory(folder: Path, model: Model, ops: str, share: float) -> None:
    plain = REFERENCE if ops == "reference" else fast_ops()
    exact = logits_of(llama3_raw.load(folder), plain)
    sizes: list[int] = []
    max_bytes = int((1 - share) * least_memory(model.weights) + share * 70e6)
    limited = streaming.read_ahead(watched(plain, lambda: sizes.append(resident(folder))), model.weights, max_bytes)
    assert torch.equal(logits_of(model, limited), exact)
    assert 0.8 * max_bytes < max(sizes) <= max_bytes + EDGES


def test_int4(folder: Path, tmp_path: Path) -> None:
    """All tensors of a matrix are counted, read ahead and dropped."""
    save_quantized(folder, open_checkpoint(folder), tmp_path / "int4", quantize="int4")
    for file in (tmp_path / "int4").iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened)
    model = llama3_raw.load(tmp_path / "int4")
    matrices = [getattr(layer, field) for layer in model.weights.layers for field in MATRICES if field != "output"]
    assert {matrix.format for matrix in matrices} == {"int4"}
    n_bytes = sum(matrix.nbytes for matrix in [*matrices, model.weights.output])
    assert streaming.read_ahead(REFERENCE, model.weights, n_bytes + EDGES) is REFERENCE
    max_bytes = int(0.7 * n_bytes)
    sizes: list[int] = []
    ops = watched(REFERENCE, lambda: sizes.append(resident(tmp_path / "int4")))
    limited = streaming.read_ahead(ops, model.weights, max_bytes)
    assert torch.equal(logits_of(model, limited), logits_of(llama3_raw.load(tmp_path / "int4"), REFERENCE))
    assert 0.9 * max_bytes < max(sizes) <= max_bytes + EDGES // 4


def test_nothing_is_read_twice_in_a_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader follows the order of the forward pass, and after the last matrix begins with the first."""
    read = []
    monkeypatch.setattr(streaming, "read_pages", lambda matrix: read.append(matrix))
    logits_of(model, streaming.read_ahead(REFERENCE, model.weights, 40_000_000))
    n_matrices = 3 * 7 + 1
    assert len(set(read)) == n_matrices
    assert read == (4 * read[:n_matrices])[: len(read)]
    assert 3 * n_matrices < len(read) < 4 * n_matrices  # three passes, and the first matrices of the next


def test_written_weights_are_kept(folder: Path, model: Model) -> None:
    for weights in (model.weights, (other := llama3_raw.load(folder)).weights):
        weights.layers[0].w1.mul_(2)
        dense(weights.layers[2].wq)[7] = 1.0
        dense(weights.tok_embeddings)[200] = 0.5
    limited = streaming.read_ahead(REFERENCE, model.weights, least_memory(model.weights))
    logits = logits_of(model, limited)
    assert torch.equal(logits, logits_of(other, REFERENCE))
    assert not torch.equal(logits, logits_of(llama3_raw.load(folder), REFERENCE))


def test_after_an_interrupted_pass(folder: Path, model: Model) -> None:
    max_bytes = least_memory(model.weights)
    sizes: list[int] = []
    limited = streaming.read_ahead(watched(REFERENCE, lambda: sizes.append(resident(folder))), model.weights, max_bytes)

    def stop(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "layers.1.feed_forward.gate":
            raise KeyboardInterrupt
        return tensor

    with pytest.raises(KeyboardInterrupt):
        forward(model.weights, model.params, IDS, ops=limited, tap=stop)
    logits = logits_of(model, limited)
    assert max(sizes) <= max_bytes + EDGES
    assert torch.equal(logits, logits_of(llama3_raw.load(folder), REFERENCE))


def test_nothing_changes_if_all_weights_fit(model: Model) -> None:
    ops = fast_ops()
    assert streaming.read_ahead(ops, model.weights, 80_000_000) is ops


def test_what_cannot_be_read_ahead(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    least = least_memory(model.weights)
    with pytest.raises(UserError, match=f"the minimum is {least:,}"):
        streaming.read_ahead(REFERENCE, model.weights, least - 1)
    layers = list(model.weights.layers)
    layers[2] = layers[2]._replace(w3=layers[2].w3.clone())
    with pytest.raises(UserError, match=r"layers\.2\.w3 is not mapped from a file"):
        streaming.read_ahead(REFERENCE, model.weights._replace(layers=tuple(layers)), least)
    monkeypatch.setattr(streaming, "POPULATE_READ", 9999)  # like a system that does not support it
    with pytest.raises(UserError, match=r"needs Linux 5\.14 or newer .*Invalid argument"):
        streaming.read_ahead(REFERENCE, model.weights, least)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (MemoryPlan(checkpoint(), CPU, torch.float32, RunShape(1, 9, 2), 10**10), ["leave --dtype out"]),
        (MemoryPlan(checkpoint(), GPU, None, RunShape(1, 9, 2), 10**10), ["--device cpu"]),
        (
            MemoryPlan(checkpoint(hf=True), CPU, None, RunShape(1, 9, 2), 10**10),
            ["model.layers.0.self_attn.q_proj.weight would be copied", "Meta's format", "python -m llama3_raw.convert"],
        ),
        (
            MemoryPlan(checkpoint(shards=2), CPU, None, RunShape(1, 9, 2), 10**10),
            ["tok_embeddings.weight would be copied, joined from shards"],
        ),
    ],
    ids=["another dtype", "a GPU", "Hugging Face's order", "shards"],
)
def test_weights_that_would_be_copied_are_refused(plan: MemoryPlan, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_memory(plan, lambda device: 10**12)
    assert all(word in str(caught.value) for word in ["--max-ram", *words])


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4GB", 4_000_000_000), ("4000MB", 4_000_000_000), ("3.5GiB", 3_758_096_384), ("512 mib", 536_870_912)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert byte_size(text) == n_bytes


@pytest.mark.parametrize("text", ["4", "4G", "GB", "-4GB", "4,5GB", "1e3MB", "٤GB"])
def test_invalid_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x", f"--max-ram={text}"]) == 2
    assert "should be a size such as 4GB, 3500MB or 3.5GiB" in capsys.readouterr().err


class Group(NamedTuple):
    """A memory control group of Linux, with the names of its files."""

    folder: Path
    limit: str
    peak: str

    def run(self, max_bytes: int, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the group, with a limit of `max_bytes`."""
        (self.folder / self.limit).write_text(str(max_bytes))
        join = f"echo $$ > {shlex.quote(str(self.folder / 'cgroup.procs'))} && exec {shlex.join(command)}"
        return subprocess.run(["sh", "-c", join], capture_output=True, text=True)


@pytest.fixture
def group() -> Iterator[Group]:
    """A new control group, of version 2 or 1; skips the test if none may be created."""
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    folder = (root if unified else root / "memory") / f"llama3_raw_test_{os.getpid()}"
    group = Group(
        folder, *(("memory.max", "memory.peak") if unified else ("memory.limit_in_bytes", "memory.max_usage_in_bytes"))
    )
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group may be created here: {error}")
    try:
        if not os.access(folder / group.limit, os.W_OK):
            pytest.skip("the memory controller is not enabled for new control groups here")
        yield group
    finally:
        folder.rmdir()


def run_in(group: Group, max_ram: str, model: list[str], ids: list[int]) -> tuple[list[int], int]:
    """Run the command line in a group with this limit. Return the tokens and the peak memory of the process."""
    command = [sys.executable, "-m", "llama3_raw", *model, "--max-ram", max_ram, "--max-new-tokens", "3", "--stats"]
    done = group.run(byte_size(max_ram), [*command, "json", "--ids", " ".join(map(str, ids))])
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stderr.splitlines()[-1])
    return [int(token) for token in done.stdout.split()], stats["peak_ram_bytes"]


def test_the_reported_minimum_suffices(folder: Path, model: Model, group: Group) -> None:
    """In a separate process, without the memory of other tests."""
    arguments = ["--weights", str(folder), "--device", "cpu"]
    command = [sys.executable, "-m", "llama3_raw", *arguments, "--max-ram", "1MB", "--ids", "1 2 3"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    least = re.search(r"it needs --max-ram (\S+GB),", refused.stderr.strip())
    assert least is not None
    tokens, peak = run_in(group, least[1], arguments, [1, 2, 3])
    assert tokens == list(generate(model, [1, 2, 3], max_new_tokens=3))
    assert peak <= byte_size(least[1])


@pytest.mark.full_size
def test_8b_in_4_gb(tmp_path_factory: pytest.TempPathFactory, group: Group) -> None:
    """The tokens are the same as in 24 GB, where all weights stay in memory."""
    folder = Path(os.environ.get("LLAMA3_RAW_FULL_SIZE_FOLDER", tmp_path_factory.mktemp("full"))) / "8b"
    if not folder.exists():
        make_synthetic("8b", folder)
    ids = torch.randint(128_000, (17,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens, peak = run_in(group, "4GB", ["--weights", str(folder), "--device", "cpu"], ids)
    assert peak <= 4e9
    assert tokens == list(generate(llama3_raw.load(folder), ids, max_new_tokens=3))
