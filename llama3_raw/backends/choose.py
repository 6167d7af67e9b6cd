"""Choosing the operations for the device of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..model import REFERENCE
from ..ops import UNFUSED, Ops, Tap, no_tap, wants
from ..weights import Weights, devices_of
from .cpu import fast_ops
from .offload import mixed_ops


def suitable_ops(device: torch.device) -> Ops:
    """Return the fast operations of a device, or the exact ones if it has none."""
    if device.type == "cuda":
        from .cuda import cuda_ops  # not above: it imports Triton

        return cuda_ops()
    return fast_ops() if device.type == "cpu" else REFERENCE


def ops_for(weights: Weights, exact: bool = False, tap: Tap = no_tap) -> Ops:
    """Return the operations for the weights, which may be on one device or two, and for a tap, as `showing` does.

    exact: use only REFERENCE's.
    """
    device = weights.norm.device
    ops = REFERENCE if exact else suitable_ops(device)
    others = devices_of(weights) - {device}
    if others:
        ops = mixed_ops(ops, REFERENCE if exact else suitable_ops(others.pop()))
    return showing(ops, tap, range(len(weights.layers)))


def showing(ops: Ops, tap: Tap, layers: Iterable[int]) -> Ops:
    """Return the operations, with exact attention if the tap may want scores or probs of these layers."""
    if ops.has_scores or not any(wants(tap, f"layers.{layer}.{name}") for layer in layers for name in UNFUSED):
        return ops
    chunk = min(ops.prefill_chunk, REFERENCE.prefill_chunk)  # scores of long prompts take much memory
    return ops._replace(attend=REFERENCE.attend, has_scores=True, prefill_chunk=chunk, can_capture=False)
