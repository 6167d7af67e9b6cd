"""What is measured: this engine alone, with several texts at a time, and as two processes, all of one shape.

Each is asked for no more than the one token that comes next.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch

from ..backends.choose import ops_for
from ..backends.cuda_graphs import CudaGraphs
from ..backends.tensor_parallel import parallel_ops
from ..checkpoint.loading import load
from ..checkpoint.sharding import Shard
from ..decoding.batch import Row, generate_batch
from ..decoding.loop import StopReason, generate
from ..errors import UserError
from ..model import KVCache
from ..ops import Ops
from ..system.process_groups import init
from ..weights import Model
from .roofline import seconds_of, wait_for

TWO_PROCESSES = "two-processes"
_UNTIMED = 2  # tokens: on a GPU the pass over a prompt is another than that over a token, whose first may be captured
_SIZE = 2


class Engine(Protocol):
    """Something that runs a model, and is measured."""

    name: str
    version: str  # in words: what exactly is run

    def prefill(self, length: int) -> float:
        """-> the seconds from a prompt of so many tokens to the token that comes next."""

    def decode(self, context: int, count: int) -> float:
        """-> the seconds for so many tokens, one at a time, behind `context` tokens."""


def random_ids(model: Model, length: int) -> list[int]:
    """The prompt that all engines get: the speed does not depend on what it says."""
    return torch.randint(model.params.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


class Own:
    """This engine, in the shape of the others. For `decode` the cache is full of random numbers."""

    def __init__(self, model: Model, longest: int, ops: Ops | None = None, name: str = "llama3_raw", version: str = ""):
        self.name = name
        self.version = version
        self._model = model
        self._ops = ops
        self._ids = random_ids(model, longest)
        self.cache = KVCache.allocate(model.params, max_seq_len=longest, like=model.weights)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
        self.device = self.cache.keys[0].device
        self._captured = CudaGraphs.where_possible(model, self.cache, ops or ops_for(model.weights))

    def prefill(self, length: int) -> float:
        tokens = self._generate(self._ids[:length], 0, 1)
        return seconds_of(lambda: list(tokens), self.device)

    def decode(self, context: int, count: int) -> float:
        before = 0 if self.device.type == "cpu" else min(_UNTIMED, context)
        tokens = self._generate(self._ids[:1], context - before, before + count)
        wait_for(self.device)
        for _ in range(before):
            next(tokens)
        begun = time.perf_counter()  # the token is here; a GPU that is at the next one already has only just begun it
        for _ in tokens:
            pass
        wait_for(self.device)
        return time.perf_counter() - begun

    def _generate(self, ids: Sequence[int], start: int, count: int) -> Iterator[int]:
        return generate(
            self._model,
            ids,
            max_new_tokens=count,
            stop_ids=(),
            cache=self.cache,
            start=start,
            ops=self._ops,
            captured=self._captured,
        )


class Batch:
    """This engine with several texts at a time, whose tokens all count: seconds are those of a token, by their number.

    For `decode` the prompts are computed first, which does not count.
    """

    def __init__(self, model: Model, rows: int, longest: int, ops: Ops | None = None):
        self.name = f"batch of {rows}"
        self.version = f"{rows} texts at a time, the tokens of all of them"
        self._model = model
        self._rows = rows
        self._ids = random_ids(model, longest)
        self._ops = ops

    def prefill(self, length: int) -> float:
        events = self._generate(length, 1)
        return seconds_of(lambda: list(events), self._model.weights.norm.device) / self._rows

    def decode(self, context: int, count: int) -> float:
        events = self._generate(context, 1 + count)
        for _ in range(self._rows):  # the first tokens
            next(events)
        return seconds_of(lambda: list(events), self._model.weights.norm.device) / self._rows

    def _generate(self, length: int, count: int) -> Iterator[tuple[int, int | StopReason]]:
        rows = [Row(self._ids[:length], count)] * self._rows
        return generate_batch(self._model, rows, stop_ids=(), ops=self._ops)


class TwoProcesses:
    """This engine as two processes that share the model, as torchrun starts them; `two_processes` makes it.

    Both do what they are told at the same time, and the later one counts.
    """

    name = TWO_PROCESSES

    def __init__(self, pipes: list[Connection], threads: int):
        self.version = f"{_SIZE} processes with {threads} thread{'s' if threads > 1 else ''} each"
        self._pipes = pipes

    def prefill(self, length: int) -> float:
        return self._ask("prefill", length)

    def decode(self, context: int, count: int) -> float:
        return self._ask("decode", context, count)

    def _ask(self, task: str, *numbers: int) -> float:
        try:
            for pipe in self._pipes:
                pipe.send((task, numbers))
            return max(float(pipe.recv()) for pipe in self._pipes)
        except (EOFError, OSError) as error:
            raise UserError(f"--vs {TWO_PROCESSES}: one of them has ended, see above; leave it out") from error


@contextmanager
def two_processes(folder: Path, layers: int, dtype: torch.dtype | None, longest: int) -> Iterator[Engine]:
    """Starts them, with half of the threads each, and ends them behind the block; the arguments are those of `load`."""
    threads = torch.get_num_threads() // _SIZE
    if not threads:
        raise UserError(f"--vs {TWO_PROCESSES}: shares the threads between two, and there is one; give --threads 2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(_SIZE):
        own, theirs = context.Pipe()
        environment = {**address, "RANK": str(rank), "WORLD_SIZE": str(_SIZE), "LOCAL_WORLD_SIZE": str(_SIZE)}
        arguments = (theirs, environment, threads, folder, layers, dtype, longest)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # or its end would not be noticed here
        pipes.append(own)
        processes.append(process)
    try:
        yield TwoProcesses(pipes, threads)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _serve(
    pipe: Connection,
    environment: dict[str, str],
    threads: int,
    folder: Path,
    layers: int,
    dtype: torch.dtype | None,
    longest: int,
) -> None:
    """One of the two: loads its part, and does what comes by the pipe until that is closed."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with init(lambda: torch.device("cpu")) as ranks:
        assert ranks is not None
        shard = Shard(ranks.tensor.rank, ranks.tensor.size)
        model = load(folder, layers=layers, dtype=dtype, tokenizer=False, shard=shard)
        engine = Own(model, longest, parallel_ops(ops_for(model.weights), model.weights, ranks.tensor))
        while True:
            try:
                task, numbers = pipe.recv()
            except EOFError:
                return
            ranks.tensor.barrier()
            pipe.send(getattr(engine, task)(*numbers))
