"""Measure the roofline of a GPU: how fast it copies memory and multiplies matrices. And `seconds_of`, a timer."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

BUFFER = 1 << 28  # bytes; several times the cache of any GPU
WIDTH = 8192  # of the matrices; a GPU reaches its full speed from here on
_REPEATS = 10  # in a row, so that the time to launch a kernel does not matter


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all its work, which a GPU does asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that the work takes on the device. Earlier work is waited for first, and is not timed."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def copy_speed(device: torch.device, n_bytes: int = BUFFER) -> float:
    """Return the bytes per second that the device reads and writes, both counted, when it copies n_bytes.

    Needs 0.5 GB meanwhile.
    """
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_REPEATS):
            target.copy_(source)

    return 2 * n_bytes * _REPEATS / seconds_of(copy, device)


def multiply_speed(device: torch.device, dtype: torch.dtype, width: int = WIDTH) -> float:
    """Return the operations per second, multiplications and additions, of a large matrix product.

    The matrices are laid out like weights. Their numbers are random, since a GPU is faster on zeros. Needs 0.4 GB in
    bf16 meanwhile.
    """
    x, weight = torch.randn(2, width, width, dtype=dtype, device=device)
    F.linear(x, weight)  # the library is loaded and selects its kernel

    def multiply() -> None:
        for _ in range(_REPEATS):
            F.linear(x, weight)

    return 2 * width**3 * _REPEATS / seconds_of(multiply, device)
