"""How fast engines run a model: each does a bit of everything in turn, beside a loop that only reads the weights."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from . import ops_cpu
from .int8 import tensors_of
from .ops import Ops
from .peers import Engine, Own
from .weights import Model

_LONG = 1000  # tokens: half a minute's work on 8B, and done once


class Task(NamedTuple):
    """Something to measure in tokens/s."""

    kind: Literal["prefill", "decode"]
    tokens: int  # of the prompt, or in the cache before

    @property
    def is_long(self) -> bool:
        """Whether computing so many tokens takes too long to do it in every round."""
        return self.tokens > _LONG


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
    read_loop_gb_per_second: float | None  # of the same weights by a plain loop; None without a compiler
    decode_share_of_read_loop: float | None
    weights_bytes_per_token: int
    cache_bytes_per_token: int  # of each token before
    threads: int
    vs: dict[str, PeerFigures]


def longest_text(prefill: Sequence[int], contexts: Sequence[int], new_tokens: int) -> int:
    """The most tokens that any engine has in its cache."""
    return max(max(prefill), max(contexts) + new_tokens) + 1


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
    each of which does everything in turn with ours. A prompt of more than 1,000 tokens is for the last round only, and
    so are the tokens before a peer's new ones, since some peers compute them. ops: as for `generate`. read_loop: not
    for weights that the memory is not to hold.
    """
    weights = model.weights
    matrices = [matrix for layer in weights.layers for matrix in layer if len(matrix.shape) == 2] + [weights.output]
    tensors = [tensor for matrix in matrices for tensor in tensors_of(matrix)]
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    kernels = None
    if weights.norm.device.type == "cpu" and read_loop:
        with contextlib.suppress(ops_cpu.CannotBuild):
            kernels = ops_cpu.build_kernels()
    own = Own(model, longest_text(prefill, contexts, new_tokens), ops)
    engines: list[Engine] = [own, *peers]
    tasks = [Task("prefill", length) for length in sorted(prefill, reverse=True)]
    tasks += [Task("decode", context) for context in sorted(contexts)]
    shortest = Task("decode", min(contexts))
    rates: dict[str, Rates] = {engine.name: {task: {} for task in tasks} for engine in engines}
    read: dict[int, float] = {}
    steps = [
        (number, task, engine)
        for number in range(rounds + 1)
        for task in tasks
        for engine in engines[number % len(engines) :] + engines[: number % len(engines)]  # each comes first in turn
        if number == rounds or not task.is_long or (task.kind == "decode" and engine is own)
    ]
    for number, task, engine in tqdm(steps, desc="measuring", leave=False):
        if kernels is not None and engine is own and task == shortest:
            start = time.perf_counter()
            for tensor in tensors:
                ops_cpu.read_loop(kernels, tensor)
            read[number] = n_bytes / (time.perf_counter() - start) / 1e9
        if task.kind == "prefill":
            rate = task.tokens / engine.prefill(task.tokens)
        else:
            rate = new_tokens / engine.decode(task.tokens, new_tokens)
        if number > 0:  # in the first round pages come in and threads start
            rates[engine.name][task][number] = rate
    read.pop(0, None)
    ours = medians(rates[own.name], "decode")
    possible = {number: speed * 1e9 / n_bytes for number, speed in read.items()}
    return Figures(
        prefill_tokens_per_second=medians(rates[own.name], "prefill"),
        decode_tokens_per_second=ours[shortest.tokens],
        decode_tokens_per_second_by_context=ours,
        decode_gb_per_second=ours[shortest.tokens] * n_bytes / 1e9,
        read_loop_gb_per_second=statistics.median(read.values()) if read else None,
        decode_share_of_read_loop=statistics.median(pairs(rates[own.name][shortest], possible)) if read else None,
        weights_bytes_per_token=n_bytes,
        cache_bytes_per_token=sum(t[0].nbytes for t in (*own.cache.keys, *own.cache.values)),
        threads=torch.get_num_threads(),
        vs={peer.name: compare(peer, rates[own.name], rates[peer.name]) for peer in peers},
    )


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
