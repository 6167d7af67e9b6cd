"""The rank of this process and the number of processes, from torchrun's environment variables."""

from __future__ import annotations

import os
import re

from ..errors import UserError


class PeerLost(Exception):
    """Another process ended while this one waited for it. The reason is reported by that process or by torchrun."""


def world_size() -> int:
    """Return the number of processes that torchrun has started together; 1 without it. Raises UserError."""
    return _number("WORLD_SIZE", default=1, least=1)


def rank() -> int:
    """Return the number of this process among them, from 0 on. Raises UserError."""
    if world_size() == 1:
        return 0
    number = _number("RANK")
    if number >= world_size():
        raise UserError(f"RANK is {number}, but WORLD_SIZE is {world_size()}; unset both, or start with torchrun")
    return number


def local_world_size() -> int:
    """Return how many of them are on this machine; 1 without torchrun. Raises UserError."""
    return min(_number("LOCAL_WORLD_SIZE", default=1, least=1), world_size())


def local_rank() -> int:
    """Return the number of this process on its machine. Raises UserError."""
    return _number("LOCAL_RANK")


def _number(name: str, default: int = 0, least: int = 0) -> int:
    """Return the number in an environment variable. Raises UserError for anything else."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"{name} is {text!r} in the environment, but should be a number, {least} or more; unset it, or start with "
            "torchrun"
        )
    return int(text)
