"""The report on a GPU, rehearsed on a CPU: every phase runs, a cut or a crash costs one phase, and the table."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama3_raw.backends.cuda import cuda_ops
from llama3_raw.backends.cuda_graphs import CudaGraphs
from llama3_raw.bench.gpu_report import __main__ as gpu_report
from llama3_raw.bench.gpu_report.__main__ import Report, main
from llama3_raw.bench.gpu_report.phases import PHASES
from llama3_raw.bench.gpu_report.profile import PROFILE, Launch, launches_in
from llama3_raw.bench.gpu_report.stage import rehearsal_stage, unfused
from llama3_raw.bench.gpu_report.table import render, shown
from llama3_raw.bench.gpu_report.variants import GreedyGraph, fused_layers
from llama3_raw.bench.synthetic import SYNTHETIC
from llama3_raw.model import KVCache, forward
from llama3_raw.ops import Ops

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for a CPU")

WITHOUT_PROCESSES = [name for name in PHASES if name not in ("correctness", "transformers-compiled")]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WITHOUT_PROCESSES)
def test_a_phase(name: str, tmp_path: Path) -> None:
    """It reports numbers, each under a name of its own."""
    rows: dict[str, Any] = {}

    def emit(name: str, value: float | str, unit: str = "", is_detail: bool = False) -> None:
        assert name not in rows or is_detail
        rows[name] = value

    with rehearsal_stage(tmp_path) as stage:
        PHASES[name].run(stage, emit)
    assert rows
    assert all(math.isfinite(value) and value >= 0 for value in rows.values() if not isinstance(value, str))
    assert (tmp_path / PROFILE).exists() == (name == "profile")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_tests_of_the_gpu(tmp_path: Path) -> None:
    """They pass on a fake GPU, whose tensors cannot be mixed with those of the CPU."""
    rows: dict[str, Any] = {}

    def emit(name: str, value: float | str, unit: str = "", is_detail: bool = False) -> None:
        rows[name] = value

    with rehearsal_stage(tmp_path) as stage:
        PHASES["correctness"].run(stage, emit)
    assert rows["tests failed"] == 0, rows
    assert rows["tests passed"] >= 14


@pytest.mark.slow
def test_without_a_graph_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run under the name of a graph is not reported; what needs none is."""
    rows: dict[str, Any] = {}

    def emit(name: str, value: float | str, unit: str = "", is_detail: bool = False) -> None:
        rows[name] = value

    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with rehearsal_stage(tmp_path) as stage:
        possible = CudaGraphs.where_possible

        def where_possible(*arguments: Any) -> CudaGraphs | None:
            graphs = possible(*arguments)
            if graphs is not None:
                graphs._capture = fail
            return graphs

        monkeypatch.setattr(CudaGraphs, "where_possible", where_possible)
        with pytest.raises(RuntimeError, match="no graph is captured"):
            PHASES["decode"].run(stage, emit)
    assert {name.split(",")[0] for name in rows} == {"fast operations", "exact operations"}


@pytest.mark.slow
def test_variants_compute_the_same(tmp_path: Path) -> None:
    """Layers of 11 kernels give the logits of the model's, and a graph with argmax its tokens."""
    with rehearsal_stage(tmp_path) as stage, torch.no_grad():
        model = stage.model()
        weights, params = model[:2]
        ids = torch.tensor([5, 6, 7])

        def logits() -> torch.Tensor:
            cache = KVCache.allocate(params, max_seq_len=8, like=weights)
            start = torch.tensor(2)
            return forward(weights, params, ids, cache=cache, start=start, ops=cuda_ops())

        expected = logits()
        with fused_layers():
            torch.testing.assert_close(logits(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
        cache = KVCache.allocate(params, max_seq_len=8, like=weights)
        graph = GreedyGraph(model, cache, cuda_ops(), stage.capture)
        tokens = [9]
        for start in range(3):
            at = torch.tensor(start)
            new = forward(weights, params, torch.tensor(tokens[-1:]), cache=cache, start=at, ops=cuda_ops())
            tokens.append(int(new.argmax()))
        assert graph(9, 0, 3).tolist() == tokens[1:]


class Kernels(TorchDispatchMode):
    """Counts the operations that are no views: a kernel each, and two for attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        memory = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        is_view = all(leaf.untyped_storage().data_ptr() in memory for leaf in made)
        if func._schema.is_mutable or not is_view:
            self.count += 2 if func._schema.name == "llama3_raw::attend_few" else 1
        return out


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kernels"), [(unfused, 55), (lambda ops: ops, 25), (None, 11)])
def test_kernels_of_a_layer(variant: Callable[[Ops], Ops] | None, kernels: int, tmp_path: Path) -> None:
    """As docs/gpu.md counts them."""
    counts = []
    with rehearsal_stage(tmp_path) as stage, torch.no_grad():
        ops = variant(cuda_ops()) if variant else cuda_ops()
        for n_layers in (1, 2):
            content, tied = SYNTHETIC["8b"]
            SYNTHETIC["8b"] = ({**content, "n_layers": n_layers}, tied)  # until the rehearsal ends
            model = stage.model()
            cache = KVCache.allocate(model.params, max_seq_len=8, like=model.weights)
            token, start = torch.tensor([5]), torch.tensor(3)
            with contextlib.nullcontext() if variant else fused_layers(), Kernels() as seen:
                forward(model.weights, model.params, token, cache=cache, start=start, ops=ops)
            counts.append(seen.count)
    assert counts[1] - counts[0] == kernels


@pytest.mark.slow
def test_each_phase_is_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are in the file, and in the table that is printed."""
    assert main(["--out", str(tmp_path), "--rehearse", "--phases", "versions", "roofline"]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "table.txt").read_text()
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"versions", "roofline"}
    assert [row["status"].split()[0] for row in rows if "status" in row] == ["done", "done"]
    assert f"torch {torch.__version__}" in " ".join(out.split())


@pytest.mark.slow
def test_a_cut_and_a_crash_cost_one_phase(tmp_path: Path) -> None:
    report = Report(tmp_path, {})
    with open(tmp_path / "log.txt", "w") as log:
        gpu_report._run_phase("decode", 0.5, report, log, [f"--out={tmp_path}", "--rehearse"])
        gpu_report._run_phase("missing", 60.0, report, log, [f"--out={tmp_path}", "--rehearse"])
    assert [row["status"].split(" after")[0] for row in report.rows if "status" in row] == ["cut", "failed"]
    assert "KeyError: 'missing'" in (tmp_path / "log.txt").read_text()
    assert [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()] == report.rows


def test_when_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--rehearse", "--minutes", "0.01"]) == 0
    assert capsys.readouterr().out.count("not run: the 0.01 minutes are over") == len(PHASES)


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "torch sees no NVIDIA GPU here; --rehearse" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--rehearse", "--phases", "nothing"]) == 2
    assert "--phases nothing: there is no such phase; choose from versions" in capsys.readouterr().err


def row(phase: str, name: str, value: float | str, unit: str = "", **more: Any) -> dict[str, Any]:
    return {"phase": phase, "name": name, "value": value, "unit": unit, **more}


def test_table() -> None:
    """A target is scaled by the card's memory; a result that should be a multiple of another is next to it."""
    rows = [
        row("roofline", "copy, read and written", 2150.0, "GB/s"),
        {"phase": "roofline", "status": "done in 3 s"},
        row("decode", "graph, context 17", 126.0, "tokens/s"),
        row("decode", "graph, context 4096", 119.0, "tokens/s"),
        row("transformers-compiled", "transformers 5, compiled, context 17", 63.0, "tokens/s"),
        row("correctness", "test_a", "passed", is_detail=True),
        row("correctness", "test_b", "passed", is_detail=True),
        row("correctness", "test_c", "failed"),
    ]
    table = render(rows, {"roofline": "what it can do"})
    assert "roofline: what it can do (done in 3 s)\n" in table
    lines = {line.split("  ")[1]: line for line in table.splitlines() if line.startswith("  ")}
    assert lines["graph, context 17"].endswith("≥ 125: met")
    assert lines["graph, context 4096"].endswith("≥ 120: NOT MET")
    assert "test_a" not in table
    assert "  and 2 results: passed\n" in table
    assert table.endswith("decode, graph, context 17: 2.00 x transformers-compiled, ≥ 3.0: NOT MET\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [(4300.4, "4,300"), (251.26, "251.3"), (3.14159, "3.142"), (12, "12"), (math.nan, "nan"), (math.inf, "inf")],
)
def test_numbers(value: float, text: str) -> None:
    assert shown(value) == text


def test_kernels_of_a_trace() -> None:
    """A kernel belongs to the operator with its external id, whose inputs are what it reads."""

    def operator(number: int, name: str, shapes: list[Any], kinds: list[str]) -> dict[str, Any]:
        args = {"External id": number, "Input Dims": shapes, "Input type": kinds}
        return {"cat": "cpu_op", "name": name, "ts": number, "dur": 0.5, "args": args}

    events = [
        operator(1, "llama3_raw::linear_few", [[1, 8], [16, 8], [], []], ["c10::BFloat16", "c10::BFloat16", "", ""]),
        operator(2, "aten::argmax", [[1, 50]], ["float"]),
        {"cat": "kernel", "name": "linear_kernel", "dur": 3.0, "args": {"External id": 1}},
        {"cat": "kernel", "name": "linear_kernel", "dur": 5.0, "args": {"External id": 1}},
        {"cat": "kernel", "name": "reduce", "dur": 1.0, "args": {"External id": 2}},
        {"cat": "kernel", "name": "unknown", "dur": 1.0, "args": {}},
    ]
    assert launches_in(events, is_gpu=True) == {
        Launch("linear_kernel", "llama3_raw::linear_few", 2 * (8 + 128)): [3.0, 5.0],
        Launch("reduce", "aten::argmax", 200): [1.0],
        Launch("unknown", "?", 0): [1.0],
    }
    assert len(launches_in(events, is_gpu=False)) == 2
