"""The devices that this process can use."""

from __future__ import annotations

import torch

from ..errors import UserError

KINDS = ("cpu", "cuda", "mps")


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of this name. Raises UserError if there is none, or torch cannot use it here."""
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = torch.device("meta")
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise _refused(device, f"torch sees {count} CUDA GPUs here; use {{argument}} cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise _refused(device, "torch sees no Apple GPU here; use {argument} cpu")
    if chosen.type not in KINDS:
        raise _refused(device, "there is no such device; use cpu, cuda, cuda:N or mps")
    return chosen


def _refused(device: str | torch.device, reason: str) -> UserError:
    return UserError(f"{{argument}} {device}: {reason}", argument="device")
