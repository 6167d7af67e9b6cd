"""The way of the weights to a GPU: from the mapped file through a little pinned memory, the next piece read meanwhile.

A CUDA GPU fetches by itself, at the full speed of its bus, only from memory that is pinned: that the system may not
move. What lies elsewhere its driver copies there first, with one thread. Here several threads do that, into a ring of
buffers that all tensors go through, so that no more than the ring (and a tensor that has to be put in another order)
is ever in memory twice.

Why the threads read from the mapping: measured on the CPU side (one thread of an EPYC, Linux 6.18, page cache warm) it
copies 7 to 8 GB/s through fresh page faults, as fast as preadv (7) and as from ordinary memory (7); asking for the
pages first (MADV_POPULATE_READ) makes it 5. PCIe 5 takes about 55 GB/s. The GPU side has not been measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..system.machine import default_threads

_BUFFERS = 4  # in the ring; behind a tensor that fills its buffer but a little, others are still on their way
_BUFFER_BYTES = 1 << 25
PIECE_BYTES = 1 << 22  # that a thread copies at a time
_MOST_THREADS = 16  # twice what PCIe 5 takes, by the figures above
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all GPUs, by the number of CUDA's driver_types.h

Move = Callable[[Tensor, torch.dtype | None], Tensor]
"""move(tensor, dtype) -> the tensor on a device, in dtype; None: its own."""


class Route(NamedTuple):
    """What the way to a device takes that only the device's library can do."""

    pin: Callable[[Tensor], Callable[[], None]]  # memory that copies will start from -> what lets go of it again
    # (part of a tensor on the device, the same number of values in pinned memory), begins to copy from the second to
    # the first, converting there -> what waits until the pinned memory may be written again
    start_copy: Callable[[Tensor, Tensor], Callable[[], None]]


@contextlib.contextmanager
def mover(device: torch.device, largest: int) -> Iterator[Move]:
    """Gives a function that moves tensors to `device`; they are all there when the context ends.

    largest: the bytes of the largest tensor, about; smaller ones take less pinned memory. On the CPU a tensor that is
    already in the dtype is given back itself. Where a GPU's driver pins no memory, a line says so: it is slower then.
    """
    if device.type == "cuda":
        with staged_mover(device, largest, cuda_route(device)) as move:
            yield move
    else:  # an Apple GPU shares the memory of the CPU
        yield lambda tensor, dtype: tensor.to(device=device, dtype=dtype)


@contextlib.contextmanager
def staged_mover(device: torch.device, largest: int, route: Route, most: int = _BUFFER_BYTES) -> Iterator[Move]:
    """As `mover`, by a route, through buffers of at most so many bytes."""
    buffer_bytes = -(-min(largest, most) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, as they are pinned
    ring = torch.frombuffer(mmap.mmap(-1, _BUFFERS * buffer_bytes), dtype=torch.uint8).view(_BUFFERS, buffer_bytes)
    turns = itertools.cycle(range(_BUFFERS))
    waits: dict[int, Callable[[], None]] = {}  # for the copy from each buffer that was used

    def move(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if tensor.device.type != "cpu":  # it was made there, as random weights are: no memory for threads to read
            return tensor.to(device=device, dtype=dtype)
        source = tensor.contiguous().view(-1)
        moved = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
        values = buffer_bytes // source.dtype.itemsize
        for part, target in zip(source.split(values), moved.view(-1).split(values), strict=True):
            turn = next(turns)
            if turn in waits:
                waits[turn]()
            staged = ring[turn, : part.nbytes].view(part.dtype)
            _fill(staged, part, pool)
            waits[turn] = route.start_copy(target, staged)
        return moved

    unpin = route.pin(ring)
    try:
        with ThreadPoolExecutor(min(_MOST_THREADS, default_threads())) as pool:
            yield move
    finally:
        for wait in waits.values():
            wait()
        unpin()


def _fill(target: Tensor, source: Tensor, pool: ThreadPoolExecutor) -> None:
    """Copies source to target, both contiguous and on the CPU, by all threads of the pool."""

    def copy(begin: int) -> None:
        # not torch's copy: each thread that calls it gets a whole team of OpenMP's threads
        count = min(PIECE_BYTES, source.nbytes - begin)
        ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, count)

    for _ in pool.map(copy, range(0, source.nbytes, PIECE_BYTES)):
        pass


def cuda_route(device: torch.device) -> Route:
    """The way to a CUDA GPU, on its current stream."""

    def pin(memory: Tensor) -> Callable[[], None]:
        # registered, since torch would keep pinned memory of its own for the next who asks, as long as the process runs
        library = torch.cuda.cudart()
        address = memory.data_ptr()
        with torch.cuda.device(device):  # CUDA asks for the current one
            error = int(library.cudaHostRegister(address, memory.nbytes, _PORTABLE))
            if error:  # which CUDA would tell of once more, at the next kernel: let it be this one
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device=device)
        if error:
            reason = f"{memory.nbytes / 1e6:.0f} MB of memory cannot be pinned for it (CUDA's error {error})"
            print(f"llama3_raw: {device}: {reason}; the weights go there more slowly", file=sys.stderr)
            return lambda: None

        def unpin() -> None:
            with torch.cuda.device(device):
                library.cudaHostUnregister(address)

        return unpin

    def start_copy(target: Tensor, staged: Tensor) -> Callable[[], None]:
        if target.dtype == staged.dtype:
            target.copy_(staged, non_blocking=True)
        else:  # of two dtypes torch would convert on the CPU
            target.copy_(staged.to(device, non_blocking=True))
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        return done.synchronize

    return Route(pin, start_copy)
