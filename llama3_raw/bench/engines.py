"""The protocol `Engine`, and this engine in three forms: alone, with several texts at a time, and as two processes.

Each is asked for the next token only.
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
from typing import Any, Protocol

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
from ..quantization.matrix import Matrix
from ..system.process_groups import init
from ..weights import Model, Weights
from .roofline import seconds_of, wait_for

TWO_PROCESSES = "two-processes"
_UNTIMED = 2  # tokens; on a GPU the first pass is a prefill, and the second may capture a graph
_PROCESSES = 2


class Engine(Protocol):
    """An implementation that runs a model, to be measured."""

    name: str
    version: str  # what exactly runs, as text
    weights_bytes: int | None  # that it reads for each token; None: not known, or not comparable

    def prefill(self, length: int) -> float:
        """Return the seconds from a prompt of `length` tokens to the next token."""

    def decode(self, context: int, count: int) -> float:
        """Return the seconds for `count` tokens, one at a time, after `context` tokens."""


def random_ids(model: Model, length: int) -> list[int]:
    """Return the prompt that all engines get. Their speed does not depend on its content."""
    return torch.randint(model.params.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def matrices_of(weights: Weights) -> list[Matrix]:
    """Return the matrices that every token is multiplied by."""
    return [matrix for layer in weights.layers for matrix in layer if len(matrix.shape) == 2] + [weights.output]


def bytes_per_token(weights: Weights) -> int:
    """Return the bytes of the matrices that every token is multiplied by."""
    return sum(matrix.nbytes for matrix in matrices_of(weights))


class ThisEngine:
    """This engine. `decode` runs on a cache of random numbers."""

    def __init__(
        self,
        model: Model,
        longest: int,
        ops: Ops | None = None,
        name: str = "llama3_raw",
        version: str = "",
        compiled: bool = False,
    ):
        """compiled: on a GPU, whether the pass over one token is compiled before it is captured."""
        self.name = name
        self.version = version
        self.weights_bytes: int | None = bytes_per_token(model.weights)
        self._model = model
        self._ops = ops
        self._ids = random_ids(model, longest)
        self.cache = KVCache.allocate(model.params, max_seq_len=longest, like=model.weights)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
        self.device = self.cache.keys[0].device
        self._captured = CudaGraphs.where_possible(model, self.cache, ops or ops_for(model.weights), compiled)

    @property
    def failures(self) -> list[str]:
        """What could not be compiled or captured, so that `decode` runs without; known after its first call."""
        return self._captured.failures if self._captured else []

    def prefill(self, length: int) -> float:
        tokens = self._generate(self._ids[:length], 0, 1)
        return seconds_of(lambda: list(tokens), self.device)

    def decode(self, context: int, count: int) -> float:
        before = 0 if self.device.type == "cpu" else min(_UNTIMED, context)
        tokens = self._generate(self._ids[:1], context - before, before + count)
        wait_for(self.device)
        for _ in range(before):
            next(tokens)
        start_time = time.perf_counter()  # the token is available; a GPU may have just begun the next one
        for _ in tokens:
            pass
        wait_for(self.device)
        return time.perf_counter() - start_time

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
    """This engine with `rows` texts at a time. All tokens count: seconds are those of the batch, divided by `rows`.

    `decode` computes the prompts first, which is not timed.
    """

    def __init__(self, model: Model, rows: int, longest: int, ops: Ops | None = None):
        self.name = f"batch of {rows}"
        self.version = f"{rows} texts at a time, counting the tokens of all"
        self.weights_bytes: int | None = None  # the texts share what is read
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
    """This engine as two processes that share the model, as under torchrun; created by `two_processes`.

    Both do the same task at the same time, and the time of the slower one counts.
    """

    name = TWO_PROCESSES

    def __init__(self, pipes: list[Connection], threads: int):
        self.version = f"{_PROCESSES} processes with {threads} thread{'s' if threads > 1 else ''} each"
        self.weights_bytes: int | None = None
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
            raise UserError(f"--vs {TWO_PROCESSES}: a process has ended, see above; leave it out") from error


@contextmanager
def two_processes(folder: Path, layers: int, dtype: torch.dtype | None, longest: int) -> Iterator[Engine]:
    """Start the processes, each with half of the threads, and end them after the block.

    The arguments are those of `load`. Raises UserError if there is only one thread.
    """
    threads = torch.get_num_threads() // _PROCESSES
    if not threads:
        raise UserError(f"--vs {TWO_PROCESSES}: needs a thread for each process, but there is one; give --threads 2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []  # of another type on Windows
    processes = []
    for rank in range(_PROCESSES):
        ours, theirs = context.Pipe()
        environment = {**address, "RANK": str(rank), "WORLD_SIZE": str(_PROCESSES), "LOCAL_WORLD_SIZE": str(_PROCESSES)}
        arguments = (theirs, environment, threads, folder, layers, dtype, longest)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # otherwise the end of the process would go unnoticed
        pipes.append(ours)
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
    """Run one of the two processes: load its shard, and do the tasks from the pipe until it is closed."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    with init(lambda: torch.device("cpu")) as ranks:
        assert ranks is not None
        shard = Shard(ranks.tensor.rank, ranks.tensor.size)
        model = load(folder, layers=layers, dtype=dtype, tokenizer=False, shard=shard)
        engine = ThisEngine(model, longest, parallel_ops(ops_for(model.weights), model.weights, ranks.tensor))
        while True:
            try:
                task, numbers = pipe.recv()
            except EOFError:
                return
            ranks.tensor.barrier()
            pipe.send(getattr(engine, task)(*numbers))
