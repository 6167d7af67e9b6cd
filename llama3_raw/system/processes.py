"""The rank of this process and the number of processes, from torchrun's environment variables."""

from __future__ import annotations

import os


class PeerLost(Exception):
    """Another process ended while this one waited for it. The reason is reported by that process or by torchrun."""


def world_size() -> int:
    """Return the number of processes that torchrun has started together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this process among them, from 0 on."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return how many of them are on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)
