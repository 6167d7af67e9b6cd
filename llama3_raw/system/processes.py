"""Which of several processes this one is, as torchrun tells each in the environment."""

from __future__ import annotations

import os


def number_of_processes() -> int:
    """How many processes torchrun has started to work together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def processes_here() -> int:
    """How many processes torchrun has started on this machine to work together; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)
