"""Operations for weights that are larger than their share of the memory: matrices are read ahead as they are used.

The weights stay memory-mapped, as `load` returned them. A forward pass uses its matrices in a fixed order, so a thread
reads the next ones (madvise with MADV_POPULATE_READ) while one is multiplied, and drops it afterwards (MADV_PAGEOUT).
As many as fit are kept. The products are those of the underlying operations, bit for bit.

Why these two, measured on ext4 under Linux 6.18: MADV_WILLNEED reads 4 KiB pages, and dropping 4 GB of them takes
1.3 s; dropping the large pages of sequential reading takes 0.02 s. MADV_DONTNEED leaves the pages in the page cache,
where a full control group must search for pages to drop: three quarters of the speed. It would also lose what was
written to a weight; MADV_PAGEOUT never does.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError
from ..ops import Ops
from ..quantization.blocks import Blocks
from ..quantization.matrix import Matrix, tensors_of
from ..system.madvise import PAGEOUT, POPULATE_READ, Span, advise
from ..weights import Weights

_FIELDS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")  # of a layer, in the order of the forward pass
_IN_FLIGHT = 2  # matrices: one is multiplied while the next one is read


class Extent(NamedTuple):
    """The memory of a matrix: one span, or one for each tensor of a quantized matrix."""

    spans: tuple[Span, ...]

    @staticmethod
    def of(weight: Matrix) -> Extent:
        """Return the extent of a weight."""
        return Extent(tuple(map(Span.of, tensors_of(weight))))

    @property
    def n_bytes(self) -> int:
        """The bytes of all its pages."""
        return sum(end - begin for begin, end in map(Span.pages_around, self.spans))


def least_memory(weights: Weights) -> int:
    """Return the smallest `max_bytes` that `read_ahead` accepts for these weights."""
    matrices = _in_order(weights)
    return min(sum(matrix.n_bytes for matrix in matrices), *_needed_bytes(_largest_first(matrices)))


def read_ahead(ops: Ops, weights: Weights, max_bytes: int) -> Ops:
    """Return the operations for weights whose matrices may use at most `max_bytes` of memory.

    If they all fit, it is `ops` itself. Only one forward pass may run at a time. The pages of a file that the user
    neither owns nor may write to are dropped only when memory is short.

    Raises UserError if `max_bytes` is less than `least_memory`, if a matrix is not mapped from a file, or if the system
    does not support it: it needs Linux 5.14.
    """
    matrices = _in_order(weights)
    left = max_bytes - sum(matrix.n_bytes for matrix in matrices)
    if left >= 0:
        return ops
    order = _largest_first(matrices)
    n_kept = [n for n, needed in enumerate(_needed_bytes(order)) if needed <= max_bytes]
    if not n_kept:
        raise UserError(f"{max_bytes:,} bytes are too few for the weights; the minimum is {least_memory(weights):,}")
    kept = order[: n_kept[-1]]
    _check_system(matrices)
    reader = _Reader(matrices, kept, max_bytes - sum(matrix.n_bytes for matrix in kept))
    index_of = {matrix.spans[0].begin: index for index, matrix in enumerate(matrices)}
    table = Extent.of(weights.tok_embeddings)
    is_tied = table in matrices

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        index = index_of.get(Extent.of(weight).spans[0].begin)
        if index is None:
            return ops.linear(x, weight)
        reader.wait_for(index)
        y = ops.linear(x, weight)
        reader.release()
        return y

    def embed(tokens: Tensor, embeddings: Tensor | Blocks) -> Tensor:
        x = ops.embed(tokens, embeddings)
        if not is_tied:
            _drop_pages(table)
        return x

    return ops._replace(linear=linear, embed=embed)


def _in_order(weights: Weights) -> list[Extent]:
    """Return the matrices in the order of the forward pass."""
    in_layers = [Extent.of(getattr(layer, field)) for layer in weights.layers for field in _FIELDS]
    return [*in_layers, Extent.of(weights.output)]


def _largest_first(matrices: Sequence[Extent]) -> list[Extent]:
    """Return the matrices in the order in which they are kept.

    The largest come first, because the others then need the least memory while they are used; among equals, the same
    field of all layers, so that the disk is never idle for long.
    """
    indices = sorted(range(len(matrices)), key=lambda index: (-matrices[index].n_bytes, index % len(_FIELDS)))
    return [matrices[index] for index in indices]


def _needed_bytes(order: Sequence[Extent]) -> list[int]:
    """Return the bytes needed to keep the first 0, 1, 2, … matrices and to read and drop the others."""
    sizes = [matrix.n_bytes for matrix in order]
    return [kept + _IN_FLIGHT * size for kept, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]


class _Reader:
    """A thread that reads matrices in a repeating order, and drops those that are not kept.

    buffer_bytes: the limit for the matrices that are not kept, while they are read or used.
    """

    def __init__(self, matrices: Sequence[Extent], kept: Iterable[Extent], buffer_bytes: int):
        self._matrices = matrices
        self._kept = frozenset(kept)
        self._buffer_bytes = buffer_bytes
        self._pending: deque[tuple[int, Future[None]]] = deque()  # index and read; the matrix in use, or next, is first
        self._thread = ThreadPoolExecutor(1, "read-ahead")  # a single one, which keeps the order
        for matrix in matrices:
            if matrix not in self._kept:  # other operations may have read it
                _drop_pages(matrix)

    def wait_for(self, index: int) -> None:
        """Wait until the matrix with this index is in memory, while the reads after it continue."""
        while self._pending and self._pending[0][0] != index:  # a pass was interrupted, and another one begins
            self._drop_first()
        if not self._pending:
            self._read_from(index)
        self._pending[0][1].result()

    def release(self) -> None:
        """Drop the matrix that was waited for, after its use, and read on."""
        following = self._pending[-1][0] + 1
        self._drop_first()
        self._read_from(following)

    def _drop_first(self) -> None:
        matrix = self._matrices[self._pending.popleft()[0]]
        if matrix not in self._kept:
            self._thread.submit(_drop_pages, matrix)

    def _read_from(self, index: int) -> None:
        """Start reading as many matrices as fit, from `index` on; kept ones too, which the system may have dropped."""
        while len(self._pending) < len(self._matrices):
            index %= len(self._matrices)
            in_flight = {self._matrices[index], *(self._matrices[other] for other, _ in self._pending)} - self._kept
            if sum(matrix.n_bytes for matrix in in_flight) > self._buffer_bytes:
                return
            self._pending.append((index, self._thread.submit(read_pages, self._matrices[index])))
            index += 1


def read_pages(matrix: Extent) -> None:
    """Read all pages of a matrix into memory."""
    for span in matrix.spans:
        try:
            advise(span.pages_around(), POPULATE_READ)
        except OSError as error:
            raise UserError(f"weights can no longer be read from their file ({error.strerror})") from error


def _drop_pages(matrix: Extent) -> None:
    """Drop the pages of a matrix from memory, except those that it shares with its neighbours."""
    for span in matrix.spans:
        advise(span.pages_inside(), PAGEOUT)


def _check_system(matrices: Sequence[Extent]) -> None:
    """Raise UserError if the system does not support reading ahead, or if a matrix is not mapped from a file."""
    begins = [matrix.spans[0].begin for matrix in matrices]
    try:
        if sys.platform != "linux":
            raise OSError("this is not Linux")
        for advice in (PAGEOUT, POPULATE_READ):
            advise(Span(begins[0], begins[0] + 1).pages_around(), advice)
    except OSError as error:
        raise UserError(f"reading weights ahead needs Linux 5.14 or newer ({error})") from error
    files = []  # the addresses that files are mapped to (proc_pid_maps.5)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            files.append(Span(*(int(address, 16) for address in addresses.split("-"))))
    for index, begin in enumerate(begins):
        if not any(file.begin <= begin < file.end for file in files):
            layer, field = divmod(index, len(_FIELDS))
            name = "output" if index == len(begins) - 1 else f"layers.{layer}.{_FIELDS[field]}"
            raise UserError(f"{name} is not mapped from a file; weights can only be read ahead if all matrices are")
