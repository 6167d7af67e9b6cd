"""The processes that torchrun starts, and their groups.

They communicate through torch.distributed, with NCCL between GPUs and gloo between CPUs. When one of them ends,
torchrun ends the others and reports which it was.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # not in its __all__

from ..errors import UserError
from .processes import PeerLost, world_size

_TIMEOUT = datetime.timedelta(days=30)  # an idle process may wait long


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
    that share a model; None: all. Raises UserError if it does not divide the number of processes.
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
    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is {size}, but {error}; start the processes with torchrun") from error
    yield _ranks(device, store, rank, size, width)
    dist.destroy_process_group()  # not after an error: the others may be waiting in the middle of a pass


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
