"""Operations for weights that take more memory than they may: each matrix is read while those before it compute.

The weights stay what `load` made them, windows into their file. A forward pass asks for its matrices in an order that
never changes, so a thread reads the next ones (madvise with MADV_POPULATE_READ) while one is multiplied, and lets go of
it afterwards (MADV_PAGEOUT). As many as fit are kept. The products are those of the operations underneath, bit for bit.

Why these two, measured on ext4 under Linux 6.18: MADV_WILLNEED reads 4 KiB pages, and to let go of 4 GB of them takes
1.3 s; of the large pages of sequential reading it takes 0.02 s. MADV_DONTNEED leaves the pages in the file cache, where
a full control group has to search for some to drop: three quarters of the speed. It would also lose what was written
into a weight; MADV_PAGEOUT never does.
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
from ..quantization.matrix import Matrix, tensors_of
from ..system.madvise import PAGEOUT, POPULATE_READ, RANDOM, Span, advise
from ..weights import Weights

_FIELDS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")  # of a layer, in the order in which the forward pass asks for them
_IN_FLIGHT = 2  # matrices: one is multiplied while the next one is read


class Extent(NamedTuple):
    """Where a matrix lies; the tensors of a quantised one lie apart."""

    spans: tuple[Span, ...]

    @staticmethod
    def of(weight: Matrix) -> Extent:
        """The place of a weight."""
        return Extent(tuple(map(Span.of, tensors_of(weight))))

    @property
    def n_bytes(self) -> int:
        """How much memory it takes: whole pages."""
        return sum(end - begin for begin, end in map(Span.pages_around, self.spans))


def least_memory(weights: Weights) -> int:
    """The fewest bytes of memory in which `read_ahead` has the matrices multiplied."""
    matrices = _in_order(weights)
    return min(sum(matrix.n_bytes for matrix in matrices), *_needs(_largest_first(matrices)))


def read_ahead(ops: Ops, weights: Weights, max_bytes: int) -> Ops:
    """The same operations, for weights whose matrices have at most `max_bytes` of memory.

    `ops` itself where they all fit. For one forward pass at a time. Of a file that the user neither owns nor may write
    to the system lets go only where memory gets short.

    Raises UserError where `max_bytes` is less than `least_memory`, where a matrix is not mapped from a file, and where
    the system cannot do it: it takes Linux 5.14.
    """
    matrices = _in_order(weights)
    left = max_bytes - sum(matrix.n_bytes for matrix in matrices)
    if left >= 0:
        return ops
    order = _largest_first(matrices)
    numbers = [number for number, need in enumerate(_needs(order)) if need <= max_bytes]
    if not numbers:
        raise UserError(f"{max_bytes:,} bytes are too few for the weights; {least_memory(weights):,} are the least")
    kept = order[: numbers[-1]]
    _check_system(matrices)
    reader = _Reader(matrices, kept, max_bytes - sum(matrix.n_bytes for matrix in kept))
    known = {matrix.spans[0].begin: place for place, matrix in enumerate(matrices)}
    table = Extent.of(weights.tok_embeddings)
    is_tied = table in matrices
    if not is_tied:  # it is read row by row, each of which would bring megabytes around it
        advise(table.spans[0].pages_inside(), RANDOM)

    def linear(x: Tensor, weight: Matrix) -> Tensor:
        place = known.get(Extent.of(weight).spans[0].begin)
        if place is None:
            return ops.linear(x, weight)
        reader.wait_for(place)
        y = ops.linear(x, weight)
        reader.release()
        return y

    def embed(tokens: Tensor, embeddings: Tensor) -> Tensor:
        x = ops.embed(tokens, embeddings)
        if not is_tied:
            _let_go(table)
        return x

    return ops._replace(linear=linear, embed=embed)


def _in_order(weights: Weights) -> list[Extent]:
    """The matrices in the order in which the forward pass asks for them."""
    in_layers = [Extent.of(getattr(layer, field)) for layer in weights.layers for field in _FIELDS]
    return [*in_layers, Extent.of(weights.output)]


def _largest_first(matrices: Sequence[Extent]) -> list[Extent]:
    """The matrices in the order in which they are kept.

    The largest first, since the others then need the least room to come and go; among equals the same field of all
    layers, so that the disk is never idle for long.
    """
    places = sorted(range(len(matrices)), key=lambda place: (-matrices[place].n_bytes, place % len(_FIELDS)))
    return [matrices[place] for place in places]


def _needs(order: Sequence[Extent]) -> list[int]:
    """The bytes that it takes to keep the first 0, 1, 2, … matrices, and to have the others come and go."""
    sizes = [matrix.n_bytes for matrix in order]
    return [kept + _IN_FLIGHT * size for kept, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]


class _Reader:
    """Reads matrices that are used in turn, in a thread, and lets go of those that are not kept.

    room: how many bytes of others than those may be on their way or in use.
    """

    def __init__(self, matrices: Sequence[Extent], kept: Iterable[Extent], room: int):
        self._matrices = matrices
        self._kept = frozenset(kept)
        self._room = room
        self._coming: deque[tuple[int, Future[None]]] = deque()  # the matrix that is used next, or now, comes first
        self._thread = ThreadPoolExecutor(1, "read-ahead")  # does one thing after the other
        for matrix in matrices:
            if matrix not in self._kept:  # other operations may have brought it in
                _let_go(matrix)

    def wait_for(self, place: int) -> None:
        """Returns once the matrix at this place is in memory; those behind it are on their way."""
        while self._coming and self._coming[0][0] != place:  # a pass was broken off, and another one begins
            self._give_back()
        if not self._coming:
            self._read_on(place)
        self._coming[0][1].result()

    def release(self) -> None:
        """The matrix that was waited for has been used."""
        behind = self._coming[-1][0] + 1
        self._give_back()
        self._read_on(behind)

    def _give_back(self) -> None:
        matrix = self._matrices[self._coming.popleft()[0]]
        if matrix not in self._kept:
            self._thread.submit(_let_go, matrix)

    def _read_on(self, place: int) -> None:
        """Reads what there is room for, from this place on; also what is kept, since the system may have dropped it."""
        while len(self._coming) < len(self._matrices):
            place %= len(self._matrices)
            passing = {self._matrices[place], *(self._matrices[other] for other, _ in self._coming)} - self._kept
            if sum(matrix.n_bytes for matrix in passing) > self._room:
                return
            self._coming.append((place, self._thread.submit(read_pages, self._matrices[place])))
            place += 1


def read_pages(matrix: Extent) -> None:
    """Returns once all pages of a matrix are in memory."""
    for span in matrix.spans:
        try:
            advise(span.pages_around(), POPULATE_READ)
        except OSError as error:
            raise UserError(f"weights cannot be read from their file any more ({error.strerror})") from error


def _let_go(matrix: Extent) -> None:
    """Takes the pages of a matrix from memory, but for those it shares with its neighbours."""
    for span in matrix.spans:
        advise(span.pages_inside(), PAGEOUT)


def _check_system(matrices: Sequence[Extent]) -> None:
    """Raises UserError where the system cannot do it, or where a matrix is not mapped from a file."""
    begins = [matrix.spans[0].begin for matrix in matrices]
    try:
        if sys.platform != "linux":
            raise OSError("this is another system")
        for advice in (PAGEOUT, POPULATE_READ):
            advise(Span(begins[0], begins[0] + 1).pages_around(), advice)
    except OSError as error:
        raise UserError(f"to read weights while others are used takes Linux 5.14 or newer ({error})") from error
    files = []  # the addresses that files are mapped to (proc_pid_maps.5)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            files.append(Span(*(int(address, 16) for address in addresses.split("-"))))
    for place, begin in enumerate(begins):
        if not any(file.begin <= begin < file.end for file in files):
            layer, field = divmod(place, len(_FIELDS))
            name = "output" if place == len(begins) - 1 else f"layers.{layer}.{_FIELDS[field]}"
            raise UserError(f"{name} is no window into a file, which the weights need to be to be read ahead")
