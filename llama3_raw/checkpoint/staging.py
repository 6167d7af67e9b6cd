"""Staging: copying weights from a mapped file to a GPU through a small ring of pinned buffers, while reading ahead.

A CUDA GPU reads at the full speed of its bus only from pinned memory, which the system may not move. From other memory
the driver first copies to pinned memory, with one thread. Here several threads do that, into a ring of buffers that all
tensors share, so that only the ring (and a tensor that must be reordered) is ever in memory twice.

Why the threads read from the mapping: measured on the CPU side (one thread of an EPYC, Linux 6.18, warm page cache), a
copy runs at 7 to 8 GB/s through fresh page faults, as fast as preadv (7) and as from ordinary memory (7); requesting
the pages first (MADV_POPULATE_READ) makes it 5. PCIe 5 carries about 55 GB/s. The GPU side has not been measured.
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

_BUFFERS = 4  # in the ring; after a tensor that fills little of its buffer, other copies are still in flight
_BUFFER_BYTES = 1 << 25
PIECE_BYTES = 1 << 22  # what a thread copies at a time
_MAX_THREADS = 16  # twice the speed of PCIe 5, by the figures above
_PORTABLE = 1  # cudaHostRegisterPortable in CUDA's driver_types.h: pinned for all GPUs

Move = Callable[[Tensor, torch.dtype | None], Tensor]
"""move(tensor, dtype) -> the tensor on a device, in `dtype`; None keeps its dtype."""


class StagingRoute(NamedTuple):
    """The two steps of staging that only the device's library can do."""

    pin: Callable[[Tensor], Callable[[], None]]  # pins memory for copies; returns a function that unpins it
    # start_copy(target, staged): start a copy from pinned memory to a slice of a tensor on the device, converting the
    # dtype there; returns a function that waits until the pinned memory may be overwritten
    start_copy: Callable[[Tensor, Tensor], Callable[[], None]]


@contextlib.contextmanager
def staging(device: torch.device, largest: int) -> Iterator[Move]:
    """Return a function that moves tensors to `device`; all copies are complete when the context ends.

    largest: the approximate bytes of the largest tensor; a small one pins less memory. On the CPU a tensor that
    already has the dtype is returned itself. If a GPU's driver pins no memory, a line on stderr says that it is slower.
    """
    if device.type == "cuda":
        with staged_by(device, largest, cuda_staging_route(device)) as move:
            yield move
    else:  # an Apple GPU shares the memory of the CPU
        yield lambda tensor, dtype: tensor.to(device=device, dtype=dtype)


@contextlib.contextmanager
def staged_by(
    device: torch.device, largest: int, route: StagingRoute, max_bytes: int = _BUFFER_BYTES
) -> Iterator[Move]:
    """Like `staging`, with a given route and buffers of at most `max_bytes`."""
    buffer_bytes = -(-min(largest, max_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE  # only whole pages can be pinned
    ring = torch.frombuffer(mmap.mmap(-1, _BUFFERS * buffer_bytes), dtype=torch.uint8).view(_BUFFERS, buffer_bytes)
    turns = itertools.cycle(range(_BUFFERS))
    waits: dict[int, Callable[[], None]] = {}  # for the last copy from each buffer

    def move(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if tensor.device.type != "cpu":  # created there, as random weights are
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
        with ThreadPoolExecutor(min(_MAX_THREADS, default_threads())) as pool:
            yield move
    finally:
        for wait in waits.values():
            wait()
        unpin()


def _fill(target: Tensor, source: Tensor, pool: ThreadPoolExecutor) -> None:
    """Copy source to target, both contiguous and on the CPU, with all threads of the pool."""

    def copy(begin: int) -> None:
        # not torch's copy, which starts a team of OpenMP threads for each calling thread
        count = min(PIECE_BYTES, source.nbytes - begin)
        ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, count)

    for _ in pool.map(copy, range(0, source.nbytes, PIECE_BYTES)):
        pass


def cuda_staging_route(device: torch.device) -> StagingRoute:
    """Return the route to a CUDA GPU, on its current stream."""

    def pin(memory: Tensor) -> Callable[[], None]:
        # registered here, because torch keeps its own pinned memory for reuse until the process ends
        library = torch.cuda.cudart()
        address = memory.data_ptr()
        with torch.cuda.device(device):  # CUDA uses the current one
            error = int(library.cudaHostRegister(address, memory.nbytes, _PORTABLE))
            if error:  # CUDA reports it once more, at the next kernel: let it be this one
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device=device)
        if error:
            reason = f"{memory.nbytes / 1e6:.0f} MB of memory cannot be pinned for it (CUDA's error {error})"
            print(f"llama3_raw: {device}: {reason}; loading is slower", file=sys.stderr)
            return lambda: None

        def unpin() -> None:
            with torch.cuda.device(device):
                library.cudaHostUnregister(address)

        return unpin

    def start_copy(target: Tensor, staged: Tensor) -> Callable[[], None]:
        if target.dtype == staged.dtype:
            target.copy_(staged, non_blocking=True)
        else:  # between two dtypes, torch would convert on the CPU
            target.copy_(staged.to(device, non_blocking=True))
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        return done.synchronize

    return StagingRoute(pin, start_copy)
