"""Memory by its pages, as the system gives and takes it: advice on those that a file is mapped to. (madvise.2)"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from typing import NamedTuple

from torch import Tensor

# advice, by the numbers of linux/mman.h
RANDOM, WILLNEED, DONTNEED, PAGEOUT, POPULATE_READ = 1, 3, 4, 21, 22

_READ_AT_ONCE = 1 << 20  # bytes; of more, the system may read only the beginning


class Span(NamedTuple):
    """A piece of memory: from one address up to another."""

    begin: int
    end: int

    @staticmethod
    def of(tensor: Tensor) -> Span:
        """From the first value of a tensor to its last one, with what lies between where it is not contiguous."""
        steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return Span(tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize)

    def pages_around(self) -> Span:
        """All pages that have something of it."""
        return Span(self.begin & -mmap.PAGESIZE, self.end + mmap.PAGESIZE - 1 & -mmap.PAGESIZE)

    def pages_inside(self) -> Span:
        """All pages that have nothing else."""
        return Span(self.begin + mmap.PAGESIZE - 1 & -mmap.PAGESIZE, self.end & -mmap.PAGESIZE)


def advise(span: Span, advice: int) -> None:
    """Tells the system what to do with whole pages. Raises OSError."""
    if span.begin < span.end and _libc().madvise(span.begin, span.end - span.begin, advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def read_exactly(mapped: Tensor) -> None:
    """Has the system read a window into a file, a matrix or some columns of one, and nothing around it, soon."""
    if sys.platform != "linux":
        return
    for row in (mapped,) if mapped.is_contiguous() else mapped:
        begin, end = Span.of(row).pages_around()
        for piece in range(begin, end, _READ_AT_ONCE):
            advise(Span(piece, min(piece + _READ_AT_ONCE, end)), WILLNEED)


def let_go(mapped: Tensor) -> None:
    """Takes a window into a file, which nobody has written to, out of this process's memory until it is read again."""
    if sys.platform == "linux":
        advise(Span.of(mapped).pages_inside(), DONTNEED)
