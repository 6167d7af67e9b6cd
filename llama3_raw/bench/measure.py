"""Measure how fast engines run a model, interleaved with each other and with probes of the machine's roofline."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from ..backends import cpu
from ..ops import Ops
from ..quantization.matrix import tensors_of
from ..weights import Model, Weights
from .engines import Engine, ThisEngine, bytes_per_token, matrices_of
from .roofline import copy_speed, multiply_speed, seconds_of

LONG = 1000  # tokens; on a CPU 8B takes half a minute for them, so longer tasks run only once there


class Task(NamedTuple):
    """A task to measure in tokens/s."""

    kind: Literal["prefill", "decode"]
    tokens: int  # length of the prompt, or of the context in the cache

    def is_long(self, device: torch.device) -> bool:
        """Whether the task takes too long to run in every round."""
        return self.tokens > LONG and device.type == "cpu"


Turn = tuple[int, int]  # the round, and the group of engines in it: up to two baselines, this engine between them
Rates = dict[Task, dict[Turn, float]]  # tokens/s of each task


@dataclass(frozen=True)
class EngineFigures:
    """The speed of an engine: medians over rounds."""

    version: str
    prefill_tokens_per_second: dict[int, float]  # by the length of the prompt
    decode_tokens_per_second: dict[int, float]  # by context


@dataclass(frozen=True)
class BaselineFigures(EngineFigures):
    """The speed of a baseline, and the ratios of this engine's speed to it within each round, with their medians.

    In a ratio this engine's turn is the one right before or after the baseline's.
    """

    weights_bytes_per_token: int | None  # that decode reads; None: not known, or not comparable
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
    rounds: int  # those that were completed
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

    This engine's turn is next to each baseline's: it runs again for every second one. On the CPU, prompts of more than
    1,000 tokens run in the last round only. So does decoding by a baseline at such a context, because some baselines
    compute the context first. Ctrl-C ends it with the figures of the rounds that are complete, if there is one.

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
    n_bytes = bytes_per_token(weights)
    probes = probes_of(weights, read_loop)
    this_engine = ThisEngine(model, longest_text(prefill, contexts, new_tokens), ops)
    tasks = [Task("prefill", length) for length in sorted(prefill, reverse=True)]
    tasks += [Task("decode", context) for context in sorted(contexts)]
    shortest = Task("decode", min(contexts))
    plan = _Plan(this_engine, baselines, tasks, shortest, new_tokens, probes, device)
    rates, roofline, complete = _run_rounds(plan, rounds)
    ours = rates[this_engine.name]
    decode = medians(ours, "decode")

    def share(task: Task, cost: float, name: str) -> float:
        """Return the share of the roofline that a task reaches. cost: bytes or operations per token."""
        limit = {turn: speed / cost for turn, speed in roofline[name].items()}
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
        rounds=complete,
        vs={baseline.name: compare(baseline, ours, rates[baseline.name]) for baseline in baselines},
    )


class _Plan(NamedTuple):
    """What a round measures."""

    this_engine: Engine
    baselines: Sequence[Engine]
    tasks: Sequence[Task]
    shortest: Task  # the probes run right before it
    new_tokens: int
    probes: Probes
    device: torch.device


class _Measured(NamedTuple):
    """The rates of each engine, by its name, the results of each probe, and the number of complete rounds."""

    rates: dict[str, Rates]
    roofline: dict[str, dict[Turn, float]]
    rounds: int


def _run_rounds(plan: _Plan, rounds: int) -> _Measured:
    """Run a round to warm up, which loads pages and starts threads, and then those that count.

    Ctrl-C ends it early; then the round that it interrupts is left out. Before the first complete round it is raised.
    """
    names = [engine.name for engine in (plan.this_engine, *plan.baselines)]
    measured = _Measured(
        {name: {task: {} for task in plan.tasks} for name in names}, {n: {} for n in Probes._fields}, 0
    )
    complete = 0
    bar_format = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=rounds + 1, bar_format=bar_format, leave=False, disable=None) as bar:
        try:
            for number in range(rounds + 1):
                name = f"round {number} of {rounds}" if number else "warm-up"
                bar.set_description_str(name)
                start_time = time.perf_counter()
                steps = _steps(plan, number, is_last=number == rounds)
                for turn, task, engine in steps:
                    _run_step(plan, turn, task, engine, measured)
                    bar.update(1 / len(steps))
                complete = number
                if bar.disable:  # stderr is a file: a line for each round
                    print(f"llama3_raw: {name} took {time.perf_counter() - start_time:.1f} s", file=sys.stderr)
        except KeyboardInterrupt:
            if complete == 0:
                raise

    def counts(by_turn: Mapping[Turn, float]) -> dict[Turn, float]:
        return {turn: value for turn, value in by_turn.items() if 0 < turn[0] <= complete}

    return _Measured(
        {name: {task: counts(by_turn) for task, by_turn in rates.items()} for name, rates in measured.rates.items()},
        {name: counts(by_turn) for name, by_turn in measured.roofline.items()},
        complete,
    )


def _steps(plan: _Plan, number: int, is_last: bool) -> list[tuple[Turn, Task, Engine]]:
    """Return what a round runs, in order: for each task all groups, every second round backwards."""
    baselines = plan.baselines
    pairs = [baselines[begin : begin + 2] for begin in range(0, len(baselines), 2)] or [[]]
    groups = [(group, [*pair[:1], plan.this_engine, *pair[1:]]) for group, pair in enumerate(pairs)]
    if number % 2:
        groups = [(group, engines[::-1]) for group, engines in reversed(groups)]
    return [
        ((number, group), task, engine)
        for task in plan.tasks
        for group, engines in groups
        for engine in engines
        if is_last or not task.is_long(plan.device) or (task.kind == "decode" and engine is plan.this_engine)
    ]


def _run_step(plan: _Plan, turn: Turn, task: Task, engine: Engine, measured: _Measured) -> None:
    """Measure an engine's turn, and the probes if they belong to it."""
    if engine is plan.this_engine and task == plan.shortest:
        for name, probe in plan.probes._asdict().items():
            if probe:
                measured.roofline[name][turn] = probe()
    if task.kind == "prefill":
        rate = task.tokens / engine.prefill(task.tokens)
    else:
        rate = plan.new_tokens / engine.decode(task.tokens, plan.new_tokens)
    measured.rates[engine.name][task][turn] = rate


def ratios_by_round(ours: Mapping[Turn, float], theirs: Mapping[Turn, float]) -> list[float]:
    """Return ours / theirs for every turn that has both: of a baseline, one in each round."""
    return [ours[turn] / theirs[turn] for turn in sorted(ours.keys() & theirs.keys())]


def medians(rates: Rates, kind: str) -> dict[int, float]:
    """Return the median over rounds of every task of a kind that was measured, by its tokens in ascending order."""
    measured = (task for task in sorted(rates) if task.kind == kind and rates[task])
    return {task.tokens: statistics.median(rates[task].values()) for task in measured}


def compare(baseline: Engine, ours: Rates, theirs: Rates) -> BaselineFigures:
    """Return the figures of a baseline, from its rates and this engine's."""

    def ratios(kind: str) -> dict[int, list[float]]:
        measured = (task for task in sorted(theirs) if task.kind == kind and theirs[task])
        return {task.tokens: ratios_by_round(ours[task], theirs[task]) for task in measured}

    prefill, decode = ratios("prefill"), ratios("decode")
    return BaselineFigures(
        version=baseline.version,
        prefill_tokens_per_second=medians(theirs, "prefill"),
        decode_tokens_per_second=medians(theirs, "decode"),
        weights_bytes_per_token=baseline.weights_bytes,
        prefill_ratios=prefill,
        prefill_ratio={tokens: statistics.median(each) for tokens, each in prefill.items()},
        decode_ratios=decode,
        decode_ratio={tokens: statistics.median(each) for tokens, each in decode.items()},
    )
