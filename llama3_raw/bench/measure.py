"""Measure how fast engines run a model, interleaved with each other and with probes of the machine's roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from ..backends import cpu
from ..ops import Ops
from ..quantization.matrix import Matrix, tensors_of
from ..weights import Model, Weights
from .engines import Engine, ThisEngine
from .roofline import copy_speed, multiply_speed, seconds_of

LONG = 1000  # tokens; on a CPU 8B takes half a minute for them, so longer tasks run only once there


class Task(NamedTuple):
    """A task to measure in tokens/s."""

    kind: Literal["prefill", "decode"]
    tokens: int  # length of the prompt, or of the context in the cache

    def is_long(self, device: torch.device) -> bool:
        """Whether the task takes too long to run in every round."""
        return self.tokens > LONG and device.type == "cpu"


Rates = dict[Task, dict[int, float]]  # tokens/s of each task, by the number of the round


@dataclass(frozen=True)
class EngineFigures:
    """The speed of an engine: medians over rounds."""

    version: str
    prefill_tokens_per_second: dict[int, float]  # by the length of the prompt
    decode_tokens_per_second: dict[int, float]  # by context


@dataclass(frozen=True)
class BaselineFigures(EngineFigures):
    """The speed of a baseline, and the ratios of this engine's speed to it within each round, with their medians."""

    prefill_ratios: dict[int, list[float]]
    prefill_ratio: dict[int, float]
    decode_ratios: dict[int, list[float]]
    decode_ratio: dict[int, float]


@dataclass(frozen=True)
class Figures:
    """The result of `measure`. Rates are medians over rounds; shares are medians of the shares within a round."""

    prefill_tokens_per_second: dict[int, float]  # by the length of the prompt
    decode_tokens_per_second: float  # at the shortest context
    decode_tokens_per_second_by_context: dict[int, float]
    decode_gb_per_second: float  # weights read, in units of 1e9 bytes
    read_loop_gb_per_second: float | None  # the same weights, read by a plain loop; None on a GPU or without a compiler
    decode_share_of_read_loop: float | None
    copy_gb_per_second: float | None  # read and written when a GPU copies memory; None on the CPU
    decode_share_of_copy: float | None
    matmul_tflop_per_second: float | None  # 1e12 operations/s of a GPU in a large matrix product; None on the CPU
    prefill_share_of_matmul: dict[int, float] | None  # by the length of the prompt; counts products with weights only
    weights_bytes_per_token: int
    cache_bytes_per_token: int  # for each token of the context
    device: str  # "cpu", or the name of the GPU
    threads: int
    vs: dict[str, BaselineFigures]  # by the name of the baseline


def longest_text(prefill: Sequence[int], contexts: Sequence[int], new_tokens: int) -> int:
    """Return the largest number of tokens that any engine has in its cache."""
    return max(max(prefill), max(contexts) + new_tokens) + 1


class Probes(NamedTuple):
    """Measurements of the machine's roofline, repeated by each call; None for those that do not apply."""

    read: Callable[[], float] | None = None  # bytes/s of a CPU loop that only reads the weights
    copy: Callable[[], float] | None = None  # bytes/s, read and written, of a GPU that copies memory
    multiply: Callable[[], float] | None = None  # operations/s of a GPU in a large matrix product


def probes_of(weights: Weights, read_loop: bool) -> Probes:
    """Return the probes for the device of the weights. read_loop: as for `measure`."""
    device, dtype = weights.norm.device, weights.norm.dtype
    if device.type == "cuda":
        return Probes(copy=lambda: copy_speed(device), multiply=lambda: multiply_speed(device, dtype))
    if device.type != "cpu" or not read_loop:
        return Probes()
    try:
        kernels = cpu.build_kernels()
    except cpu.CannotBuild:
        return Probes()
    tensors = [tensor for matrix in matrices_of(weights) for tensor in tensors_of(matrix)]

    def read_all() -> None:
        for tensor in tensors:
            cpu.read_loop(kernels, tensor)

    return Probes(read=lambda: sum(tensor.nbytes for tensor in tensors) / seconds_of(read_all, device))


def matrices_of(weights: Weights) -> list[Matrix]:
    """Return the matrices that every token is multiplied by."""
    return [matrix for layer in weights.layers for matrix in layer if len(matrix.shape) == 2] + [weights.output]


def products(weights: Weights, length: int) -> int:
    """Return the number of multiplications and additions with weights for a prompt of `length` tokens.

    Attention adds to that, 1/25 of it in 8B with 2,048 tokens. The output matrix is applied to the last token only.
    """
    *in_layers, output = (matrix.shape.numel() for matrix in matrices_of(weights))
    return 2 * (length * sum(in_layers) + output)


def measure(
    model: Model,
    prefill: Sequence[int] = (17, 256),
    contexts: Sequence[int] = (17,),
    new_tokens: int = 4,
    rounds: int = 5,
    baselines: Sequence[Engine] = (),
    ops: Ops | None = None,
    read_loop: bool = True,
) -> Figures:
    """Measure the model on its device. Each round runs every task once, so that a disturbance affects all alike.

    On the CPU, prompts of more than 1,000 tokens run in the last round only. So does decoding by a baseline at such a
    context, because some baselines compute the context first.

    Args:
        model: what `load` returned.
        prefill: lengths of the prompts.
        contexts: numbers of tokens in the cache before `new_tokens` are decoded.
        new_tokens: tokens decoded in a round.
        rounds: rounds that count, after one to warm up.
        baselines: other engines, interleaved with this one.
        ops: as for `generate`.
        read_loop: whether to measure a loop that reads all weights; False if the memory must not hold them all.
    """
    weights, device = model.weights, model.weights.norm.device
    n_bytes = sum(matrix.nbytes for matrix in matrices_of(weights))
    probes = probes_of(weights, read_loop)
    this_engine = ThisEngine(model, longest_text(prefill, contexts, new_tokens), ops)
    engines: list[Engine] = [this_engine, *baselines]
    tasks = [Task("prefill", length) for length in sorted(prefill, reverse=True)]
    tasks += [Task("decode", context) for context in sorted(contexts)]
    shortest = Task("decode", min(contexts))
    rates, roofline = _run_rounds(engines, tasks, shortest, new_tokens, rounds, probes, device)
    ours = rates[this_engine.name]
    decode = medians(ours, "decode")

    def share(task: Task, cost: float, name: str) -> float:
        """Return the share of the roofline that a task reaches. cost: bytes or operations per token."""
        limit = {number: speed / cost for number, speed in roofline[name].items()}
        return statistics.median(ratios_by_round(ours[task], limit))

    read, copy, multiply = (statistics.median(speeds.values()) if speeds else None for speeds in roofline.values())
    return Figures(
        prefill_tokens_per_second=medians(ours, "prefill"),
        decode_tokens_per_second=decode[shortest.tokens],
        decode_tokens_per_second_by_context=decode,
        decode_gb_per_second=decode[shortest.tokens] * n_bytes / 1e9,
        read_loop_gb_per_second=read and read / 1e9,
        decode_share_of_read_loop=read and share(shortest, n_bytes, "read"),
        copy_gb_per_second=copy and copy / 1e9,
        decode_share_of_copy=copy and share(shortest, n_bytes, "copy"),
        matmul_tflop_per_second=multiply and multiply / 1e12,
        prefill_share_of_matmul={
            task.tokens: share(task, products(weights, task.tokens) / task.tokens, "multiply")
            for task in sorted(tasks)
            if task.kind == "prefill"
        }
        if multiply
        else None,
        weights_bytes_per_token=n_bytes,
        cache_bytes_per_token=sum(t[0].nbytes for t in (*this_engine.cache.keys, *this_engine.cache.values)),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        vs={baseline.name: compare(baseline, ours, rates[baseline.name]) for baseline in baselines},
    )


def _run_rounds(
    engines: Sequence[Engine],
    tasks: Sequence[Task],
    shortest: Task,
    new_tokens: int,
    rounds: int,
    probes: Probes,
    device: torch.device,
) -> tuple[dict[str, Rates], dict[str, dict[int, float]]]:
    """Return the rates of each engine, of which this one is the first, and the results of each probe by round."""
    this_engine = engines[0]
    rates: dict[str, Rates] = {engine.name: {task: {} for task in tasks} for engine in engines}
    roofline: dict[str, dict[int, float]] = {name: {} for name in Probes._fields}
    steps = [
        (number, task, engine)
        for number in range(rounds + 1)
        for task in tasks
        for engine in [*engines[number % len(engines) :], *engines[: number % len(engines)]]  # each comes first once
        if number == rounds or not task.is_long(device) or (task.kind == "decode" and engine is this_engine)
    ]
    for number, task, engine in tqdm(steps, desc="measuring", leave=False):
        if engine is this_engine and task == shortest:
            for name, probe in probes._asdict().items():
                speed = probe() if probe else None
                if speed is not None and number > 0:
                    roofline[name][number] = speed
        if task.kind == "prefill":
            rate = task.tokens / engine.prefill(task.tokens)
        else:
            rate = new_tokens / engine.decode(task.tokens, new_tokens)
        if number > 0:  # the first round is a warm-up: it loads pages and starts threads
            rates[engine.name][task][number] = rate
    return rates, roofline


def ratios_by_round(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return ours / theirs for every round that has both."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def medians(rates: Rates, kind: str) -> dict[int, float]:
    """Return the median over rounds of every task of a kind, by its tokens in ascending order."""
    return {task.tokens: statistics.median(rates[task].values()) for task in sorted(rates) if task.kind == kind}


def compare(baseline: Engine, ours: Rates, theirs: Rates) -> BaselineFigures:
    """Return the figures of a baseline, from its rates and this engine's."""

    def ratios(kind: str) -> dict[int, list[float]]:
        return {task.tokens: ratios_by_round(ours[task], theirs[task]) for task in sorted(theirs) if task.kind == kind}

    prefill, decode = ratios("prefill"), ratios("decode")
    return BaselineFigures(
        version=baseline.version,
        prefill_tokens_per_second=medians(theirs, "prefill"),
        decode_tokens_per_second=medians(theirs, "decode"),
        prefill_ratios=prefill,
        prefill_ratio={tokens: statistics.median(each) for tokens, each in prefill.items()},
        decode_ratios=decode,
        decode_ratio={tokens: statistics.median(each) for tokens, each in decode.items()},
    )
