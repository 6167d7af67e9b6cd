"""Several processes that work together, as torchrun starts them: their groups, who speaks, what is said of a lost one.

torchrun tells each process its number (rank) in the environment; torch.distributed carries what they tell each other,
by NCCL between GPUs and by gloo between CPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from .errors import UserError, error_line, is_for_the_user

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
        with _hearing():
            dist.barrier(group=self.handle)

    def from_first(self, value: Any) -> Any:
        """What the first of them has brought, anything that can be pickled."""
        values = [value]
        with _hearing():
            dist.broadcast_object_list(values, group=self.handle, group_src=0)
        return values[0]


class Ranks(NamedTuple):
    """All processes, as a grid: those of a row share a model, those of a column share the work."""

    rank: int  # of this process among all
    size: int
    tensor: Group  # tensor parallel: each has a part of every layer
    data: Group  # data parallel: each has a part of the prompts
    store: Any  # torch.distributed.Store: names with values, which all of them see


def number_of_processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


@contextlib.contextmanager
def started(device: torch.device, tensor_parallel: int | None = None) -> Iterator[Ranks | None]:
    """The processes that torchrun has started, ready to talk, while the block runs; None for a process alone.

    tensor_parallel: how many of them share a model; None: all. When one ends by an error, it says so itself; when one
    is killed, another says which, and all end. Raises UserError where the number does not divide that of all.
    """
    size = number_of_processes()
    if size == 1:
        yield None
        return
    width = tensor_parallel or size
    if size % width:
        raise UserError(f"--tp {width}: torchrun has started {size} processes, which make no groups of {width}")
    store, rank, size = next(dist.rendezvous("env://"))
    store.set(f"process/{rank}", f"{os.getpid()} on {socket.gethostname()}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size)
    mesh = init_device_mesh(device.type, (size // width, width), mesh_dim_names=("data", "tensor"))
    groups = {
        name: Group(mesh.get_local_rank(name), mesh.size(i), mesh.get_group(name))
        for i, name in enumerate(("data", "tensor"))
    }
    last_words = ""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield Ranks(rank, size, groups["tensor"], groups["data"], store)
    except PeerLost as lost:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all when one has ended; first this is to be said
        _tell_who_is_lost(store, rank, size, lost)
    except Exception as error:
        if not is_for_the_user(error):
            raise
        last_words = error_line(error)
        if rank > 0 and not _says(store, 0, last_words):
            _say(f"rank {rank}: {last_words}")
        raise
    finally:
        with contextlib.suppress(RuntimeError):  # where the store is gone, nobody listens
            store.set(f"ended/{rank}", last_words)
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()


def _terminate(number: int, frame: object) -> NoReturn:
    raise PeerLost("stopped by SIGTERM")


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
    """Whether another process ends with the same words; it is given a second for that."""
    deadline = time.monotonic() + 1
    while not store.check([f"ended/{rank}"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return bool(store.get(f"ended/{rank}").decode() == words)


def _tell_who_is_lost(store: Any, rank: int, size: int, lost: PeerLost) -> NoReturn:
    """Finds out which process is gone, and has one of the others say so; ends this one."""
    dist.destroy_process_group()  # those that wait for this one are to notice as well
    try:
        store.set(f"survived/{rank}", "")
        deadline = time.monotonic() + _PATIENCE
        while True:
            silent = [other for other in range(size) if not store.check([f"survived/{other}"])]
            gone = [other for other in silent if not store.check([f"ended/{other}"])]
            if all(_has_died(store, other) for other in gone) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        had_words = any(store.get(f"ended/{other}") for other in silent if other not in gone)
        if gone:
            which = ", ".join(f"rank {other} (process {store.get(f'process/{other}').decode()})" for other in gone)
            line = f"{which} is gone: {_KILLED}"
        else:
            line = str(lost)
        if not had_words and (gone or not silent) and store.add("told", 1) == 1:
            _say(line)
    except RuntimeError:
        _say("the processes have lost touch, torchrun with them; run it again")
    sys.exit(1)


def _has_died(store: Any, rank: int) -> bool:
    """Whether a process of this machine is no more; of another machine's it cannot be told."""
    process, machine = store.get(f"process/{rank}").decode().split(" on ")
    if machine != socket.gethostname():
        return False
    try:
        return psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
