"""Advice to the system about the pages of mapped files: read them ahead, or drop them. (madvise.2)"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from typing import NamedTuple

from torch import Tensor

# the values in linux/mman.h
RANDOM, WILLNEED, DONTNEED, PAGEOUT, POPULATE_READ = 1, 3, 4, 21, 22

_READ_AT_ONCE = 1 << 20  # bytes; of a larger piece the system may read only the beginning


class Span(NamedTuple):
    """A range of memory, from one address up to another."""

    begin: int
    end: int

    @staticmethod
    def of(tensor: Tensor) -> Span:
        """Return the span from the first value of a tensor to its last; gaps are included if it is not contiguous."""
        steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return Span(tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize)

    def pages_around(self) -> Span:
        """Return all pages that overlap the span."""
        return Span(self.begin & -mmap.PAGESIZE, self.end + mmap.PAGESIZE - 1 & -mmap.PAGESIZE)

    def pages_inside(self) -> Span:
        """Return all pages that are completely within the span."""
        return Span(self.begin + mmap.PAGESIZE - 1 & -mmap.PAGESIZE, self.end & -mmap.PAGESIZE)


def advise(span: Span, advice: int) -> None:
    """Call madvise for whole pages. Raises OSError."""
    if span.begin < span.end and _libc().madvise(span.begin, span.end - span.begin, advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def prefetch_pages(mapped: Tensor) -> None:
    """Start to read the pages of a mapped tensor, a matrix or some of its columns, and nothing around them."""
    if sys.platform != "linux":
        return
    for row in (mapped,) if mapped.is_contiguous() else mapped:
        begin, end = Span.of(row).pages_around()
        for piece in range(begin, end, _READ_AT_ONCE):
            advise(Span(piece, min(piece + _READ_AT_ONCE, end)), WILLNEED)


def read_single_pages(mapped: Tensor) -> None:
    """Let a page of a mapped tensor be read alone when it is used, without the megabytes around it."""
    if sys.platform == "linux":
        advise(Span.of(mapped).pages_inside(), RANDOM)


def drop_pages(mapped: Tensor) -> None:
    """Drop the pages of a mapped tensor, which must be unmodified, from this process until they are read again."""
    if sys.platform == "linux":
        advise(Span.of(mapped).pages_inside(), DONTNEED)
