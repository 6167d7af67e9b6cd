"""What a GPU can do at most, found by trying: how fast it copies memory and multiplies matrices. And how to time it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

BUFFER = 1 << 28  # bytes: several times what any GPU keeps in a cache
WIDTH = 8192  # of the matrices: a GPU is at its best from here on
_TIMES = 10  # in a row, so that the time to launch a kernel does not count


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given to do; a GPU works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long some work on the device takes until all of it is done, once what was to do before is done."""
    wait_for(device)
    begun = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - begun


def copy_speed(device: torch.device) -> float:
    """The bytes in a second that the device reads and writes when it copies memory, both counted.

    Takes 0.5 GB for the time being.
    """
    source = torch.ones(BUFFER, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_TIMES):
            target.copy_(source)

    return 2 * BUFFER * _TIMES / seconds_of(copy, device)


def multiply_speed(device: torch.device, dtype: torch.dtype) -> float:
    """The operations in a second, each product and each sum, of a large product of matrices laid out as weights are.

    On random numbers, since a GPU is faster on zeros. In bf16 it takes 0.4 GB for the time being.
    """
    x, weight = torch.randn(2, WIDTH, WIDTH, dtype=dtype, device=device)
    F.linear(x, weight)  # a library is loaded, and chooses how

    def multiply() -> None:
        for _ in range(_TIMES):
            F.linear(x, weight)

    return 2 * WIDTH**3 * _TIMES / seconds_of(multiply, device)
