"""How fast engines run a model: each does a bit of everything in turn, beside what the machine can do at most."""

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
from .engines import Engine, Own
from .roofline import copy_speed, multiply_speed, seconds_of

LONG = 1000  # tokens: half a minute's work on 8B, and done once, on the CPU


class Task(NamedTuple):
    """Something to measure in tokens/s."""

    kind: Literal["prefill", "decode"]
    tokens: int  # of the prompt, or in the cache before

    def is_long(self, device: torch.device) -> bool:
        """Whether computing so many tokens takes too long to do it in every round."""
        return self.tokens > LONG and device.type == "cpu"


Rates = dict[Task, dict[int, float]]  # of each task, by the number of the round; tokens/s


@dataclass(frozen=True)
class EngineFigures:
    """How fast an engine is, in medians over rounds."""

    version: str
    prefill_tokens_per_second: dict[int, float]  # by the length of the prompt
    decode_tokens_per_second: dict[int, float]  # by the number of tokens before


@dataclass(frozen=True)
class PeerFigures(EngineFigures):
    """How fast another engine is, and how many times as fast ours was in the same round: each pair, and the median."""

    prefill_ratios: dict[int, list[float]]
    prefill_ratio: dict[int, float]
    decode_ratios: dict[int, list[float]]
    decode_ratio: dict[int, float]


@dataclass(frozen=True)
class Figures:
    """What `measure` found. Rates are medians over rounds; ratios are medians of the ratios within a round."""

    prefill_tokens_per_second: dict[int, float]  # by the length of the prompt
    decode_tokens_per_second: float  # behind the fewest tokens
    decode_tokens_per_second_by_context: dict[int, float]  # by the number of tokens before
    decode_gb_per_second: float  # of weights read, in units of 1e9 bytes
    read_loop_gb_per_second: float | None  # of the same weights by a plain loop; None without a compiler, on a GPU
    decode_share_of_read_loop: float | None
    copy_gb_per_second: float | None  # read and written by a GPU that copies memory; None on the CPU
    decode_share_of_copy: float | None
    matmul_tflop_per_second: float | None  # 1e12 operations, by a GPU that multiplies large matrices; None on the CPU
    prefill_share_of_matmul: dict[int, float] | None  # by the length of the prompt; its products with weights alone
    weights_bytes_per_token: int
    cache_bytes_per_token: int  # of each token before
    device: str  # "cpu", or what the GPU is called
    threads: int
    vs: dict[str, PeerFigures]


def longest_text(prefill: Sequence[int], contexts: Sequence[int], new_tokens: int) -> int:
    """The most tokens that any engine has in its cache."""
    return max(max(prefill), max(contexts) + new_tokens) + 1


class Probes(NamedTuple):
    """What the machine can do at most, measured anew by each call; None for what is not to be measured."""

    read: Callable[[], float] | None = None  # bytes of the weights in a second, by a loop on the CPU that only reads
    copy: Callable[[], float] | None = None  # bytes in a second, read and written, by a GPU that copies memory
    multiply: Callable[[], float] | None = None  # operations in a second, by a GPU in a large product of matrices


def probes_of(weights: Weights, read_loop: bool) -> Probes:
    """What there is to measure where the weights are. read_loop: as for `measure`."""
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
    """Those that every token is multiplied by."""
    return [matrix for layer in weights.layers for matrix in layer if len(matrix.shape) == 2] + [weights.output]


def products(weights: Weights, length: int) -> int:
    """How many operations a prompt of so many tokens takes, each product and each sum: those with weights.

    Attention comes on top: a twenty-fifth of it in 8B with 2,048 tokens. The last matrix is for the last token alone.
    """
    *of_layers, output = (matrix.shape.numel() for matrix in matrices_of(weights))
    return 2 * (length * sum(of_layers) + output)


def measure(
    model: Model,
    prefill: Sequence[int] = (17, 256),
    contexts: Sequence[int] = (17,),
    new_tokens: int = 4,
    rounds: int = 5,
    peers: Sequence[Engine] = (),
    ops: Ops | None = None,
    read_loop: bool = True,
) -> Figures:
    """Measures the model where it is, each round a bit of everything in turn, so that a disturbance hits all alike.

    prefill: how many tokens at once. contexts: behind how many tokens to decode `new_tokens`. peers: other engines,
    each of which does everything in turn with ours. On the CPU a prompt of more than 1,000 tokens is for the last round
    only, and so are the tokens before a peer's new ones, since some peers compute them. ops: as for `generate`.
    read_loop: not for weights that the memory is not to hold.
    """
    weights, device = model.weights, model.weights.norm.device
    n_bytes = sum(matrix.nbytes for matrix in matrices_of(weights))
    probes = probes_of(weights, read_loop)
    own = Own(model, longest_text(prefill, contexts, new_tokens), ops)
    engines: list[Engine] = [own, *peers]
    tasks = [Task("prefill", length) for length in sorted(prefill, reverse=True)]
    tasks += [Task("decode", context) for context in sorted(contexts)]
    shortest = Task("decode", min(contexts))
    rates, possible = _run_rounds(engines, tasks, shortest, new_tokens, rounds, probes, device)
    ours = medians(rates[own.name], "decode")

    def share(task: Task, cost: float, name: str) -> float:
        """What a task with so high a cost, in bytes or operations for a token, gets of what is possible."""
        limit = {number: speed / cost for number, speed in possible[name].items()}
        return statistics.median(pairs(rates[own.name][task], limit))

    read, copy, multiply = (statistics.median(speeds.values()) if speeds else None for speeds in possible.values())
    return Figures(
        prefill_tokens_per_second=medians(rates[own.name], "prefill"),
        decode_tokens_per_second=ours[shortest.tokens],
        decode_tokens_per_second_by_context=ours,
        decode_gb_per_second=ours[shortest.tokens] * n_bytes / 1e9,
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
        cache_bytes_per_token=sum(t[0].nbytes for t in (*own.cache.keys, *own.cache.values)),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        vs={peer.name: compare(peer, rates[own.name], rates[peer.name]) for peer in peers},
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
    """The rates of each engine, of which ours is the first, and by the number of the round what the probes found."""
    own = engines[0]
    rates: dict[str, Rates] = {engine.name: {task: {} for task in tasks} for engine in engines}
    possible: dict[str, dict[int, float]] = {name: {} for name in Probes._fields}  # by the number of the round
    steps = [
        (number, task, engine)
        for number in range(rounds + 1)
        for task in tasks
        for engine in [*engines[number % len(engines) :], *engines[: number % len(engines)]]  # each comes first in turn
        if number == rounds or not task.is_long(device) or (task.kind == "decode" and engine is own)
    ]
    for number, task, engine in tqdm(steps, desc="measuring", leave=False):
        if engine is own and task == shortest:
            for name, probe in probes._asdict().items():
                speed = probe() if probe else None
                if speed is not None and number > 0:
                    possible[name][number] = speed
        if task.kind == "prefill":
            rate = task.tokens / engine.prefill(task.tokens)
        else:
            rate = new_tokens / engine.decode(task.tokens, new_tokens)
        if number > 0:  # in the first round pages come in and threads start
            rates[engine.name][task][number] = rate
    return rates, possible


def pairs(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours over theirs in every round that has both."""
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def medians(rates: Rates, kind: str) -> dict[int, float]:
    """The median over rounds of every task of a kind, by its tokens, the fewest first."""
    return {task.tokens: statistics.median(rates[task].values()) for task in sorted(rates) if task.kind == kind}


def compare(peer: Engine, ours: Rates, theirs: Rates) -> PeerFigures:
    """The figures of a peer, from its rates and ours."""

    def ratios(kind: str) -> dict[int, list[float]]:
        return {task.tokens: pairs(ours[task], theirs[task]) for task in sorted(theirs) if task.kind == kind}

    prefill, decode = ratios("prefill"), ratios("decode")
    return PeerFigures(
        version=peer.version,
        prefill_tokens_per_second=medians(theirs, "prefill"),
        decode_tokens_per_second=medians(theirs, "decode"),
        prefill_ratios=prefill,
        prefill_ratio={tokens: statistics.median(each) for tokens, each in prefill.items()},
        decode_ratios=decode,
        decode_ratio={tokens: statistics.median(each) for tokens, each in decode.items()},
    )
