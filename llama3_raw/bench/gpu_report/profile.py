"""A table of every kernel of a pass: its time, the bytes that it reads, and its share of the card's bandwidth."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from ...backends.cuda import cuda_ops
from ...model import KVCache, forward
from ...weights import Model
from ..engines import random_ids
from ..roofline import copy_speed
from .stage import Emit, Stage

PROFILE = "profile.txt"
_ITEMSIZES = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "signed char": 1, "unsigned char": 1}
_ITEMSIZES |= {"long int": 8, "int": 4, "bool": 1, "c10::complex<float>": 8}
_FEW_ROWS = ("aten::embedding", "aten::index", "aten::index_select")  # they read little of their inputs
_SHOWN = 60  # characters of a kernel's name


class Launch(NamedTuple):
    """A kernel that an operator launched, with the inputs of that operator."""

    kernel: str
    operator: str
    n_bytes: int  # of the operator's inputs: what a product reads, less its result; 0 of one that reads few rows


def profile(stage: Stage, emit: Emit) -> None:
    """Write the table for a token after each context, and for the longest prompt, and report their sums."""
    model = stage.model()
    speed = copy_speed(stage.device, stage.copy_bytes)
    engine = stage.engine(model, cuda_ops())  # its cache holds numbers
    text = []
    passes = [(1, context, f"one token after {context}") for context in stage.contexts]
    passes.append((min(stage.prompts[-1], cuda_ops().prefill_chunk), 0, "a chunk of a prompt"))
    for length, start, title in passes:
        # as long as what is read of it, so that its size says how much that is
        cache = KVCache(*(tuple(tensor[: start + length] for tensor in tensors) for tensors in engine.cache))
        events = _events(stage, model, cache, length, start)
        times = launches_in(events, is_gpu=stage.device.type == "cuda")
        n_launches = sum(map(len, times.values()))
        total = sum(map(sum, times.values()))
        emit(f"{title}, kernels", n_launches)
        emit(f"{title}, their time", total / 1e3, "ms")
        text.append(table(f"{title}: {n_launches} kernels, {total / 1e3:.3f} ms in them", times, speed))
        (stage.folder / PROFILE).write_text("\n\n".join(text) + "\n")


def _events(stage: Stage, model: Model, cache: KVCache, length: int, start: int) -> list[dict[str, Any]]:
    """Return the events of one pass, step by step, as operators and kernels of a trace."""
    tokens = torch.tensor(random_ids(model, length), device=stage.device)
    at: int | torch.Tensor = torch.tensor(start, device=stage.device) if length == 1 else start

    def run() -> None:
        forward(model.weights, model.params, tokens, cache=cache, start=at, logits_at=-1, ops=cuda_ops())

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (stage.device.type == "cuda")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        run()
        run()
        with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
            run()
            if stage.device.type == "cuda":
                torch.cuda.synchronize()
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        return list(json.loads(file.read_text())["traceEvents"])


def launches_in(events: Sequence[Mapping[str, Any]], is_gpu: bool) -> dict[Launch, list[float]]:
    """Return the microseconds of every kernel, by what launched it. Without a GPU the outermost operators stand in.

    A kernel is that of the innermost operator with its external id.
    """
    operators = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            operators[event["args"]["External id"]] = event
    if is_gpu:
        kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    else:
        kernels = _outermost([event for event in events if event.get("cat") == "cpu_op"])
    times: dict[Launch, list[float]] = defaultdict(list)
    for kernel in kernels:
        operator = operators.get(kernel["args"].get("External id"), {})
        name = operator.get("name", "?")
        n_bytes = 0 if name in _FEW_ROWS else _input_bytes(operator.get("args", {}))
        launch = Launch(kernel["name"], name, n_bytes)
        times[launch].append(float(kernel["dur"]))
    return dict(times)


def _outermost(operators: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept: list[Mapping[str, Any]] = []
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        if not kept or event["ts"] >= kept[-1]["ts"] + kept[-1]["dur"]:
            kept.append(event)
    return kept


def _input_bytes(arguments: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors that an operator was given, by its recorded shapes and types."""
    total = 0
    for shape, kind in zip(arguments.get("Input Dims", []), arguments.get("Input type", []), strict=False):
        if shape and all(isinstance(size, int) for size in shape):
            total += math.prod(shape) * _ITEMSIZES.get(kind, 0)
    return total


def table(title: str, times: Mapping[Launch, Sequence[float]], speed: float) -> str:
    """Return a table by total time. speed: bytes per second of a copy, which reads and writes."""
    total = sum(map(sum, times.values())) or 1.0
    lines = [title, f"{'times':>6} {'µs each':>9} {'share':>6} {'MB read':>9} {'of copy':>8}  kernel of operator"]
    for launch, durations in sorted(times.items(), key=lambda item: -sum(item[1])):
        mean = sum(durations) / len(durations)
        share_of_copy = launch.n_bytes / (mean * 1e-6) / speed if mean else 0.0
        lines.append(
            f"{len(durations):>6} {mean:>9.2f} {sum(durations) / total:>6.1%} {launch.n_bytes / 1e6:>9.2f} "
            f"{share_of_copy:>8.1%}  {launch.kernel[:_SHOWN]} of {launch.operator}"
        )
    return "\n".join(lines)
