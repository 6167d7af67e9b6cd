"""Several processes that work together, as torchrun starts them: their groups, who speaks, what is said of a lost one.

torchrun tells each process its number (rank) in the environment; torch.distributed carries what they tell each other,
by NCCL between GPUs and by gloo between CPUs. (What they add up often and in little, on one machine: nearby.py.)
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # not in its __all__

from ..errors import FIRST_ONE_SPEAKS, ToldError, UserError, error_line, is_for_the_user
from .processes import number_of_processes

_LONGEST_WAIT = datetime.timedelta(days=30)  # who has nothing to do may wait long; who is gone is noticed otherwise

_LOOK_EVERY = 0.5  # seconds

_PATIENCE = 10.0  # seconds to wait for the others' word, when one is lost

_KILLED = (
    "it was killed, perhaps by the system for lack of memory; free some, or start fewer processes, and run it again"
)


class PeerLost(Exception):
    """Another process has gone while this one was to hear from it."""


class Group(NamedTuple):
    """Some of the processes, which work on the same thing. What they all call, they call in the same order."""

    rank: int  # of this process, from 0 on
    size: int
    handle: Any  # torch's ProcessGroup
    has_ended: Callable[[], bool]  # whether one of them has, with or without an error

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of what each has brought, in place of x."""
        x = x.contiguous()
        with _hearing():
            dist.all_reduce(x, group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] of the same shape everywhere -> [size, ...], what each has brought."""
        gathered = x.new_empty((self.size, *x.shape))
        with _hearing():
            dist.all_gather(list(gathered), x.contiguous(), group=self.handle)
        return gathered

    def wait(self) -> None:
        """Waits until all of them are here."""
        self.all_reduce(torch.zeros(1))  # on the CPU, wherever the model is

    def from_first(self, value: Any) -> Any:
        """What the first of them has brought, anything that can be pickled."""
        values = [value]
        with _hearing():
            dist.broadcast_object_list(values, group=self.handle, group_src=0)
        return values[0]


class Ranks(NamedTuple):
    """All processes, as a grid: those of a row share a model, and each row has some of the work."""

    rank: int  # of this process among all
    size: int
    tensor: Group  # tensor parallel: each has a part of every layer
    data: Group  # data parallel: each has a part of the prompts
    everyone: Group
    store: Any  # torch.distributed.Store: names with values, which all of them see

    def add(self, name: str, number: int) -> int:
        """Adds to a number that all of them see, 0 at first -> what it is then."""
        with _hearing():
            return int(self.store.add(name, number))


@contextlib.contextmanager
def started(choose_device: Callable[[], torch.device], tensor_parallel: int | None = None) -> Iterator[Ranks | None]:
    """The processes that torchrun has started, ready to talk, while the block runs; None for a process alone.

    choose_device: names the one that this process computes on; may raise UserError. tensor_parallel: how many of them
    share a model; None: all. When one ends by an error, it says so itself; when one is killed, another says which, and
    all end. Raises UserError where the number does not divide that of all.
    """
    size = number_of_processes()
    width = tensor_parallel or size
    if size % width:
        count = f"torchrun has started {size} processes" if size > 1 else "there is one process"
        raise UserError(f"--tp {width}: {count}, which make no groups of {width} (see torchrun --nproc-per-node)")
    if size == 1:
        yield None
        return
    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is {size}, but {error}; start the processes by torchrun") from error
    watch = _Watch(rank, size, store.clone())  # a connection of its own: this one may be waiting for an answer
    watch.start()
    last_words = ""
    before = signal.signal(signal.SIGTERM, _terminate)  # torchrun's, when one has ended: first it is to be told which
    try:
        yield _ranks(choose_device(), store, rank, size, width)
    except PeerLost as lost:
        watch.tell(str(lost))
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is to be said; torchrun waits half a minute
        last_words = error_line(error) or type(error).__name__
        if not is_for_the_user(error):
            raise
        if rank == 0 or not _says(store, 0, last_words):
            _say(last_words if rank == 0 else f"rank {rank}: {last_words}")
        raise ToldError(last_words) from error
    finally:
        watch.stop()
        with contextlib.suppress(RuntimeError):  # where the store is gone, nobody listens
            store.set(f"ended/{rank}", last_words)
        if not last_words:  # with an error, the others may be waiting in the middle of a pass
            signal.signal(signal.SIGTERM, before)
            if dist.is_initialized():  # else Ctrl-C came before
                dist.destroy_process_group()


def _ranks(device: torch.device, store: Any, rank: int, size: int, width: int) -> Ranks:
    """Joins the groups of the process."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=PrefixStore("groups", store), rank=rank, world_size=size, timeout=_LONGEST_WAIT
    )
    rows = [list(range(first, first + width)) for first in range(0, size, width)]
    columns = [list(range(first, size, width)) for first in range(width)]
    row, column = (dist.new_subgroups_by_enumeration(ranks, _LONGEST_WAIT)[0] for ranks in (rows, columns))

    def group(ranks: Sequence[int], handle: Any) -> Group:
        def has_ended() -> bool:
            return any(store.check([f"ended/{other}"]) for other in ranks)

        return Group(ranks.index(rank), len(ranks), handle, has_ended)

    return Ranks(
        rank=rank,
        size=size,
        tensor=group(rows[rank // width], row),
        data=group(columns[rank % width], column),
        everyone=group(range(size), dist.group.WORLD),
        store=store,
    )


def _terminate(number: int, frame: object) -> NoReturn:
    raise PeerLost(f"rank {os.environ['RANK']} was stopped by SIGTERM")


@contextlib.contextmanager
def _hearing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's only word for it
        raise PeerLost(str(error)) from error


def _say(line: str) -> None:
    """A line of an error, by a process that otherwise keeps still."""
    print(f"llama3_raw: error: {line}", file=sys.__stderr__, flush=True)


def _says(store: Any, rank: int, words: str) -> bool:
    """Whether another process ends with the same words; it is given some seconds for that."""
    deadline = time.monotonic() + FIRST_ONE_SPEAKS
    while not store.check([f"ended/{rank}"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    said: str = store.get(f"ended/{rank}").decode()
    return said == words


class _Watch(threading.Thread):
    """Looks after the other processes, and ends this one when one of them is gone, once it is told which.

    A thread, since the process itself may be waiting for the lost one in the middle of a pass, for ever.
    """

    def __init__(self, rank: int, size: int, store: Any):
        super().__init__(daemon=True)
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._store = store
        self._done = threading.Event()
        store.set(f"process/{rank}", f"{os.getpid()} on {socket.gethostname()}")
        self._processes = {other: store.get(f"process/{other}").decode() for other in self._others}

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun ends first: then it has ended all
            while not self._done.wait(_LOOK_EVERY):
                if self._store.check(["lost"]) or any(
                    self._is_gone(other) or self._has_failed(other) for other in self._others
                ):
                    self._end()

    def stop(self) -> None:
        """Ends the watch."""
        self._done.set()
        self.join()

    def tell(self, why: str) -> NoReturn:
        """Ends all processes, because this one has lost another, or is to stop."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):
            self._store.set("why", why)
            self._store.set("lost", "")
            self.join()
        _say(f"{why}; torchrun is gone")
        os._exit(1)

    def _end(self) -> NoReturn:
        try:
            line = self._line_to_say()
            if line:
                _say(line)
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
        finally:
            os._exit(1)

    def _line_to_say(self) -> str | None:
        """Why all end, unless another one says it."""
        self._store.set("lost", "")
        self._store.set(f"survived/{self._rank}", "")
        deadline = time.monotonic() + _PATIENCE
        while True:
            silent = [other for other in self._others if not self._store.check([f"survived/{other}"])]
            gone = [other for other in silent if not self._store.check([f"ended/{other}"])]
            if all(map(self._has_died, gone)) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        has_ended = len(gone) < len(silent)  # which has said why, or had nothing to say
        if (has_ended and not gone) or self._store.add("told", 1) > 1:
            return None
        if not gone:
            return str(self._store.get("why").decode()) if self._store.check(["why"]) else None
        which = " and ".join(f"rank {other} (process {self._processes[other]})" for other in gone)
        return f"{which} {'are' if gone[1:] else 'is'} gone: {_KILLED}"

    def _has_failed(self, other: int) -> bool:
        return bool(self._store.check([f"ended/{other}"]) and self._store.get(f"ended/{other}"))

    def _is_gone(self, other: int) -> bool:
        return self._has_died(other) and not self._store.check([f"ended/{other}"])

    def _has_died(self, other: int) -> bool:
        """Whether a process of this machine is no more; of another machine's it cannot be told."""
        process, machine = self._processes[other].split(" on ")
        if machine != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
