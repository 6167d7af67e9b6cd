"""What processes on one machine tell each other through memory that they share, where little is to be said often.

A token asks for two sums in each layer, of some kilobytes. Gloo takes a millisecond for one on a virtual machine, where
to wake a thread is slow: it wakes three of them, and the one that receives asks again and again for the lock of the one
that sends. Here each process writes what it brings into its own part of the memory, counts that up, and looks at the
counts of the others until they are as high.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import time
from pathlib import Path

import torch
from torch import Tensor

from ..system.process_groups import Group, PeerLost
from .cpu import CannotBuild, build_kernels

_FOLDER = Path("/dev/shm")  # files in memory, on Linux; who finds a file there is on the same machine
_MOST = 1 << 20  # bytes that a process brings at a time: what is more is of a prompt, and worth gloo's way
_COUNT = 64  # bytes from one count to the next, so that each has a cache line for itself
_LONGEST_PAUSE = 0.02  # seconds between two looks, where the others take long
_LATE = 1.0  # seconds of waiting, from which on one of them may have ended without an error; if lost, it is told anyway


class Nearby:
    """A group whose processes share memory; `nearby` makes it."""

    def __init__(self, group: Group, kernels: ctypes.CDLL, memory: mmap.mmap):
        self.group = group
        self._are_here = kernels.are_here
        counts, parts = torch.frombuffer(memory, dtype=torch.uint8).split([group.size * _COUNT, 2 * group.size * _MOST])
        self._counts = ctypes.c_void_p(counts.data_ptr())
        self._parts: Tensor = parts.view(2, group.size, _MOST)
        self._times = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of what each has brought, of floats, in the order of the ranks and rounded once; or in place of x."""
        if x.nbytes > _MOST:
            return self.group.all_reduce(x)
        parts = self._gather(x)
        total = parts[0].to(torch.float32, copy=True)
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] of the same shape everywhere -> [size, ...], what each has brought."""
        return self._gather(x).clone() if x.nbytes <= _MOST else self.group.all_gather(x)

    def _gather(self, x: Tensor) -> Tensor:
        """As all_gather, until the next time but one.

        Who writes for that one has seen that all are at the next, and thus have read this: so two places are enough.
        """
        self._times += 1
        place = self._parts[self._times % 2, :, : x.nbytes].view(x.dtype).view(self.group.size, *x.shape)
        place[self.group.rank] = x
        numbers = [ctypes.c_int64(number) for number in (self.group.rank, self.group.size, self._times)]
        begun = time.monotonic()
        while not self._are_here(self._counts, *numbers):
            waited = time.monotonic() - begun
            if waited > _LATE and self.group.has_ended() and not self._are_here(self._counts, *numbers):
                raise PeerLost("another process has ended")
            time.sleep(min(_LONGEST_PAUSE, waited / 4))  # also the moment for Ctrl-C
        return place


def nearby(group: Group) -> Nearby | None:
    """The group with memory that its processes share; None where there is none, on several machines, or no compiler.

    All of them call it, and all get the same answer.
    """
    kernels = _kernels()
    file = _FOLDER / f"llama3_raw-{group.from_first(secrets.token_hex(16))}"
    group.wait()  # with all of them here, the file has a name for a moment only
    try:
        if group.rank == 0:
            _make(file, group.size * (_COUNT + 2 * _MOST))
        group.wait()
        memory = _open(file)
        can = torch.tensor([int(memory is not None and kernels is not None)])
        if group.all_reduce(can).item() < group.size or memory is None or kernels is None:
            return None
        return Nearby(group, kernels, memory)
    finally:  # its memory lasts as long as somebody has it open, even if all are killed
        if group.rank == 0:
            _remove(file)


def _make(file: Path, size: int) -> None:
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except OSError:
        return  # no such folder here
    try:
        os.posix_fallocate(descriptor, 0, size)  # now, where the folder may be full, and not as it is written to
    except OSError:
        _remove(file)
    finally:
        os.close(descriptor)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # it was not made, or nothing can be in that folder
        file.unlink()


def _open(file: Path) -> mmap.mmap | None:
    try:
        with open(file, "r+b") as opened:
            return mmap.mmap(opened.fileno(), 0)
    except OSError:
        return None


def _kernels() -> ctypes.CDLL | None:
    try:
        return build_kernels()
    except CannotBuild:
        return None
