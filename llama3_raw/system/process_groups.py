"""The processes that torchrun starts, and their groups.

They communicate through torch.distributed, with NCCL between GPUs and gloo between CPUs. When one of them ends,
torchrun ends the others and reports which it was.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]  # not in its __all__

from ..errors import UserError, in_short
from .processes import PeerLost, rank, world_size

_TIMEOUT = datetime.timedelta(days=30)  # an idle process may wait long
MEETING_SECONDS = 20  # to wait for processes that torchrun did not start: they may not exist


class Group(NamedTuple):
    """A group of processes that work together. All of them must call its methods in the same order.

    Its methods raise PeerLost if another process has ended.
    """

    rank: int  # of this process, from 0 on
    size: int
    handle: Any  # torch's ProcessGroup

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all processes, possibly in place; on the CPU in fp32, rounded once."""
        total = (x.float() if x.device.type == "cpu" else x).contiguous()
        with _raising_peer_lost():
            dist.all_reduce(total, group=self.handle)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """x [...], of the same shape in every process -> [size, ...]: the x of each process."""
        gathered = x.new_empty((self.size, *x.shape))
        with _raising_peer_lost():
            dist.all_gather(list(gathered), x.contiguous(), group=self.handle)
        return gathered

    def barrier(self) -> None:
        """Wait until all processes of the group have called it."""
        self.all_reduce(torch.zeros(1))  # on the CPU, wherever the model is

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0, which may be anything that can be pickled."""
        values = [value]
        with _raising_peer_lost():
            dist.broadcast_object_list(values, group=self.handle, group_src=0)
        return values[0]


class Ranks(NamedTuple):
    """All processes as a grid: those of a row share a model, and each row has a share of the work."""

    rank: int  # of this process among all
    size: int
    tensor: Group  # tensor parallel: each has a shard of every layer
    data: Group  # data parallel: each has a share of the prompts
    everyone: Group
    store: Any  # torch.distributed.Store: named values that all processes see

    def add(self, name: str, number: int) -> int:
        """Add to a named number that all processes see, initially 0, and return the sum."""
        with _raising_peer_lost():
            return int(self.store.add(name, number))


@contextlib.contextmanager
def init(choose_device: Callable[[], torch.device], tensor_parallel: int | None = None) -> Iterator[Ranks | None]:
    """Connect the processes that torchrun has started while the block runs. Return None for a single process.

    choose_device: returns the device of this process; may raise UserError. tensor_parallel: the number of processes
    that share a model; None: all. Raises UserError if it does not divide the number of processes, or if these do not
    meet.
    """
    size = world_size()
    width = tensor_parallel or size
    if size % width:
        count = f"torchrun has started {size} processes" if size > 1 else "there is one process"
        raise UserError(
            f"{width}: {count}, which cannot form groups of {width} (see torchrun --nproc-per-node)",
            argument="tensor_parallel",
        )
    if size == 1:
        yield None
        return
    device = choose_device()
    yield _ranks(device, _meet(size), rank(), size, width)
    # not after an error: the others may be waiting in the middle of a pass
    dist.barrier()  # a process that is still connecting to one that has ended aborts
    dist.destroy_process_group()


def _meet(size: int) -> Any:
    """Wait for the other processes; return the store that all share. Raises UserError if they do not come."""
    way_out = "unset WORLD_SIZE to run one process, or start all of them with torchrun"
    unset = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if unset:
        raise UserError(f"WORLD_SIZE is {size} in the environment, but {', '.join(unset)} not set; {way_out}")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has the store
            store, _, _ = next(rendezvous("env://"))
        else:
            store = _meet_without_torchrun(host, int(port), size)
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        raise UserError(
            f"WORLD_SIZE is {size} in the environment, but the {size} processes did not meet at {host}:{port} "
            f"({in_short(error)}); {way_out}"
        ) from error
    store.set_timeout(_TIMEOUT)  # loading the weights takes minutes
    return store


def _meet_without_torchrun(host: str, port: int, size: int) -> TCPStore:
    """Create the store as rank 0, or else connect to it."""
    is_first = rank() == 0
    last = time.monotonic() + MEETING_SECONDS
    while not is_first:  # torch's own wait takes twice as long, and prints stack traces
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError:
            if time.monotonic() > last:
                raise
            time.sleep(0.2)
    # rank 0 listens on all its addresses; host may be stale, and of another machine
    timeout = datetime.timedelta(seconds=MEETING_SECONDS)
    return TCPStore("localhost" if is_first else host, port, size, is_first, timeout=timeout)


def _ranks(device: torch.device, store: Any, rank: int, size: int, width: int) -> Ranks:
    """Join this process's groups."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    groups = PrefixStore("groups", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=_TIMEOUT)
    rows = [list(range(first, first + width)) for first in range(0, size, width)]
    columns = [list(range(first, size, width)) for first in range(width)]
    row, column = (dist.new_subgroups_by_enumeration(ranks, _TIMEOUT)[0] for ranks in (rows, columns))

    def group(ranks: Sequence[int], handle: Any) -> Group:
        return Group(ranks.index(rank), len(ranks), handle)

    return Ranks(
        rank=rank,
        size=size,
        tensor=group(rows[rank // width], row),
        data=group(columns[rank % width], column),
        everyone=group(range(size), dist.group.WORLD),
        store=store,
    )


@contextlib.contextmanager
def _raising_peer_lost() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch raises nothing more specific
        raise PeerLost(str(error)) from error
