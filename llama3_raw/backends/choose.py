"""Which set of operations suits where the weights lie."""

from __future__ import annotations

import torch

from ..model import REFERENCE
from ..ops import Ops
from ..weights import Weights, devices_of
from .cpu import fast_ops
from .cuda import cuda_ops
from .offload import mixed_ops


def suitable_ops(device: torch.device) -> Ops:
    """The set of operations that suits the device."""
    return {"cpu": fast_ops, "cuda": cuda_ops}.get(device.type, lambda: REFERENCE)()


def ops_for(weights: Weights, exact: bool = False) -> Ops:
    """The set of operations that suits where the weights lie, on one device or two. exact: only of REFERENCE's."""
    device = weights.norm.device
    own = REFERENCE if exact else suitable_ops(device)
    elsewhere = devices_of(weights) - {device}
    return mixed_ops(own, REFERENCE if exact else suitable_ops(elsewhere.pop())) if elsewhere else own
