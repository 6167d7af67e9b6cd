"""Which of several processes this one is, as torchrun tells each in the environment."""

from __future__ import annotations

import os


class PeerLost(Exception):
    """Another process has ended while this one was to hear from it. That one, or torchrun, says why."""


def world_size() -> int:
    """How many processes torchrun has started to work together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """The number of this process among them, from 0 on."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of them are on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)
