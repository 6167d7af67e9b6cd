"""The phases of a report, in the order of their worth. Each runs in a process of its own."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ...backends.cuda import cuda_ops
from ...checkpoint.loading import load
from ...errors import in_short
from ...model import REFERENCE
from ...system.version import VERSION
from ...weights import Model
from ..__main__ import run_to_first_token
from ..baselines import CompiledTransformers, Transformers
from ..engines import Batch, Engine, bytes_per_token
from ..roofline import copy_speed, multiply_speed, seconds_of
from ..synthetic import make_synthetic
from .kernels import divisions, launches
from .profile import profile
from .stage import Emit, Stage, eager, unfused
from .variants import GreedyGraph, fused_layers

ROOT = Path(__file__).parents[3]  # of the checkout
REHEARSAL = "LLAMA3_RAW_REHEARSAL"  # set for the GPU's tests, which then run on the CPU
_EAGER_TOKENS = 16


class Phase(NamedTuple):
    """A part of the report."""

    run: Callable[[Stage, Emit], None]
    limit: float  # seconds
    title: str


def versions(stage: Stage, emit: Emit) -> None:
    """Report what runs on what."""
    emit("llama3_raw", VERSION)
    emit("python", platform.python_version())
    emit("torch", torch.__version__)  # with the version of CUDA, which its metadata may lack
    for package in ("triton", "transformers", "huggingface_hub", "tiktoken", "numpy"):
        try:
            emit(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            emit(package, "missing")
    if stage.device.type != "cuda":
        emit("device", "this CPU, for a rehearsal")
        return
    card = torch.cuda.get_device_properties(stage.device)
    emit("device", card.name)
    emit("kernels", "compiled by Triton" if cuda_ops().can_capture else "NONE: Triton fails, see the log")
    emit("compute capability", f"{card.major}.{card.minor}")
    emit("multiprocessors", card.multi_processor_count)
    emit("memory", card.total_memory / 1e9, "GB")
    emit("L2 cache", card.L2_cache_size / 1e6, "MB")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        emit("driver, clocks, power limit", subprocess.run(query, capture_output=True, text=True).stdout.strip())
    except OSError as error:
        emit("nvidia-smi", in_short(error))


def roofline(stage: Stage, emit: Emit) -> None:
    """Measure what the card can do at most."""

    def median(measured: Callable[[], float]) -> float:
        measured()
        return statistics.median(measured() for _ in range(5))

    emit("copy, read and written", median(lambda: copy_speed(stage.device, stage.copy_bytes)) / 1e9, "GB/s")
    speed = median(lambda: multiply_speed(stage.device, stage.dtype, stage.product_width))
    emit("large product", speed / 1e12, "TFLOP/s")
    host = torch.empty(stage.copy_bytes, dtype=torch.uint8, pin_memory=not stage.is_rehearsal)
    to = torch.empty_like(host, device=stage.device)
    speed = median(lambda: host.nbytes / seconds_of(lambda: to.copy_(host, non_blocking=True), stage.device))
    emit("copy from pinned memory", speed / 1e9, "GB/s")
    number, n_launches = torch.zeros(1, device=stage.device), 1000

    def launch() -> torch.Tensor:
        for _ in range(n_launches):
            number.add_(1)
        return number

    emit("a launch in a graph", stage.microseconds(launch, n_launches), "µs")
    emit("a launch by torch", 1e6 * median(lambda: seconds_of(launch, stage.device)) / n_launches, "µs")


def correctness(stage: Stage, emit: Emit) -> None:
    """Run the GPU's tests, which need only the checkout."""
    tests = ROOT / "tests" / "backends" / "test_gpu.py"
    if not tests.exists():
        emit("tests", f"not in {ROOT}; run this from a checkout")
        return
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({REHEARSAL: "1"} if stage.is_rehearsal else {})
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", str(tests)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
        for line in process.stdout:
            sys.stderr.write(line)
            match = re.match(r"\S+::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
            if match:
                counts[match[2]] += 1
                emit(match[1], match[2].lower(), is_detail=match[2] in ("PASSED", "SKIPPED"))
    emit("tests passed", counts["PASSED"])
    emit("tests failed", counts["FAILED"] + counts["ERROR"])
    emit("tests skipped", counts["SKIPPED"])
    if process.returncode and not counts["FAILED"] + counts["ERROR"]:
        emit("pytest", f"ended with status {process.returncode}; see the log")


def decode(stage: Stage, emit: Emit) -> None:
    """Decode one text without compiling: by a graph, by the fast operations step by step, by the exact ones."""
    model = stage.model()
    try:
        graph = stage.engine(model, cuda_ops())
        for context in stage.contexts:
            rate = stage.decode_rate(graph, context)
            emit(f"graph, context {context}", rate, "tokens/s")
            emit(f"graph, context {context}, weights read", rate * bytes_per_token(model.weights) / 1e9, "GB/s")
        del graph
    finally:  # the others are worth knowing also if no graph can be captured
        for name, ops in (("fast operations", eager(cuda_ops())), ("exact operations", REFERENCE)):
            _decode_at(stage, emit, name, stage.engine(model, ops))


def _decode_at(stage: Stage, emit: Emit, name: str, engine: Engine) -> None:
    for context in stage.contexts:
        rate = stage.decode_rate(engine, context, min(_EAGER_TOKENS, stage.new_tokens))
        emit(f"{name}, context {context}", rate, "tokens/s")


def transformers(stage: Stage, emit: Emit) -> None:
    """Decode and prefill by transformers, step by step."""
    engine = Transformers(stage.model(), stage.longest)
    _decode_at(stage, emit, engine.version, engine)
    _prefill_at(stage, emit, engine.version, engine)


def transformers_compiled(stage: Stage, emit: Emit) -> None:
    """Decode by transformers compiled, with a static cache: its best mode."""
    engine = CompiledTransformers(stage.model(), stage.longest)
    seconds = seconds_of(lambda: engine.decode(stage.contexts[0], stage.new_tokens), stage.device)
    emit("to compile", seconds, "s")
    for context in stage.contexts:
        emit(f"{engine.version}, context {context}", stage.decode_rate(engine, context), "tokens/s")


def prefill(stage: Stage, emit: Emit) -> None:
    """Compute prompts up to the next token."""
    model = stage.model()
    _prefill_at(stage, emit, "fast operations", stage.engine(model, cuda_ops()))
    _prefill_at(stage, emit, "norms and rotations by torch", stage.engine(model, unfused(cuda_ops())))


def _prefill_at(stage: Stage, emit: Emit, name: str, engine: Engine) -> None:
    for length in stage.prompts:
        engine.prefill(length)
        seconds = statistics.median(engine.prefill(length) for _ in range(stage.rounds))
        emit(f"{name}, {length} tokens", 1e3 * seconds, "ms")


def quantized(name: str) -> Callable[[Stage, Emit], None]:
    """Return the phase for a model in this format."""

    def run(stage: Stage, emit: Emit) -> None:
        model = stage.model(quantize=name)
        engine = stage.engine(model, cuda_ops())
        for context in stage.contexts:
            emit(f"graph, context {context}", stage.decode_rate(engine, context), "tokens/s")
        emit("weights", bytes_per_token(model.weights) / 1e9, "GB")
        _prefill_at(stage, emit, "prompt", engine)

    return run


def variants(stage: Stage, emit: Emit) -> None:
    """Decode by variants of the pass, each captured without compiling."""
    model, context, ops = stage.model(), stage.contexts[0], cuda_ops()
    emit("as it is", stage.decode_rate(stage.engine(model, ops), context), "tokens/s")
    emit("norms and rotations by torch", stage.decode_rate(stage.engine(model, unfused(ops)), context), "tokens/s")
    with fused_layers():
        emit("layers of 11 kernels", stage.decode_rate(stage.engine(model, ops), context), "tokens/s")
        _emit_greedy(stage, emit, model, "layers of 11 kernels, the token chosen in the graph")
    _emit_greedy(stage, emit, model, "as it is, the token chosen in the graph")


def _emit_greedy(stage: Stage, emit: Emit, model: Model, name: str) -> None:
    cache = stage.engine(model, cuda_ops()).cache
    graph = GreedyGraph(model, cache, cuda_ops(), stage.capture)
    count = stage.new_tokens
    for context in stage.contexts:
        graph(1, context, count)
        run = functools.partial(graph, 1, context, count)
        seconds = [seconds_of(run, stage.device) for _ in range(stage.rounds)]
        emit(f"{name}, context {context}", count / statistics.median(seconds), "tokens/s")


def decode_compiled(stage: Stage, emit: Emit) -> None:
    """Decode by a graph of the compiled pass."""
    model = stage.model()
    engine = stage.engine(model, cuda_ops(), compiled=True)
    seconds = seconds_of(lambda: engine.decode(stage.contexts[0], stage.new_tokens), stage.device)
    emit("to compile and capture", seconds, "s")
    for context in stage.contexts:
        emit(f"graph, compiled, context {context}", stage.decode_rate(engine, context), "tokens/s")


def batch(stage: Stage, emit: Emit) -> None:
    """Decode several texts at a time, counting the tokens of all."""
    engine = Batch(stage.model(), stage.batch, stage.longest, cuda_ops())
    emit(f"{stage.batch} texts, context {stage.contexts[0]}", stage.decode_rate(engine, stage.contexts[0]), "tokens/s")


def files(stage: Stage, emit: Emit) -> None:
    """Load 8B from a file, and start the command line with it up to its first token."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_synthetic("8b", Path(folder), device=stage.device)
        emit("to write the file", time.perf_counter() - start, "s", is_detail=True)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        for attempt in ("first", "second"):
            seconds = seconds_of(lambda: load(folder, device=stage.device), stage.device)
            emit(f"load, the {attempt} time", seconds, "s")
            emit(f"load, the {attempt} time, read", size / seconds / 1e9, "GB/s")
        torch.cuda.empty_cache()
        command = [sys.executable, "-m", "llama3_raw", "--ids", "--max-new-tokens=1", "--stats=json"]
        command += [f"--weights={folder}", f"--device={stage.device.type}"]
        for attempt in ("first", "second"):
            startup = run_to_first_token(command, range(1, 1 + stage.prompts[0]))
            emit(f"start to first token, the {attempt} time", startup.start_to_first_token_seconds, "s")
            emit("of which loading", startup.load_seconds, "s", is_detail=True)
            emit("of which the first pass", startup.first_pass_seconds, "s", is_detail=True)


def memory(stage: Stage, emit: Emit) -> None:
    """Decode many tokens with 1B, and report how much more memory is used at their end than soon after their start."""
    model = stage.model("1b")
    engine = stage.engine(model, cuda_ops())
    used = []
    for _ in range(0, stage.many_tokens, stage.new_tokens):
        engine.decode(stage.contexts[0], stage.new_tokens)
        used.append(torch.cuda.memory_allocated() if stage.device.type == "cuda" else 0)
    emit(f"growth over {stage.many_tokens} tokens", used[-1] - used[1], "bytes")


PHASES: dict[str, Phase] = {
    "versions": Phase(versions, 30, "what runs on what"),
    "roofline": Phase(roofline, 40, "what the card can do at most"),
    "correctness": Phase(correctness, 240, "tests/backends/test_gpu.py"),
    "decode": Phase(decode, 90, "8B, one text, not compiled"),
    "prefill": Phase(prefill, 60, "8B, a prompt to its next token"),
    "profile": Phase(profile, 60, "8B, the kernels of a token and of a prompt"),
    "transformers": Phase(transformers, 60, "8B by transformers, step by step"),
    "variants": Phase(variants, 60, "8B, variants of the pass over one token"),
    "int8": Phase(quantized("int8"), 60, "8B in int8"),
    "int4": Phase(quantized("int4"), 60, "8B in int4"),
    "launches": Phase(launches, 60, "8B's shapes, single launches with and without fusing"),
    "divisions": Phase(divisions, 90, "8B's matrices, how a product is divided"),
    "files": Phase(files, 120, "8B from a file"),
    "transformers-compiled": Phase(transformers_compiled, 120, "8B by transformers, compiled, static cache"),
    "decode-compiled": Phase(decode_compiled, 180, "8B, one text, compiled"),
    "batch": Phase(batch, 60, "8B, several texts at a time"),
    "memory": Phase(memory, 60, "1B, many tokens"),
}
