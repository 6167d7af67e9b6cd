"""Checkpoints of full size on the meta device, for memory plans."""

from __future__ import annotations

import torch

from llama3_raw import Params
from llama3_raw.bench.synthetic import SYNTHETIC
from llama3_raw.checkpoint.checkpoint import Checkpoint
from llama3_raw.weights import tensor_specs

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def checkpoint(
    size: str = "8b", *, shards: int = 1, hf: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Checkpoint:
    """Return a checkpoint of full size on the meta device, which needs no memory."""
    content, tied = SYNTHETIC[size]
    params = Params.from_meta(content)
    tensors = {
        spec: [torch.empty(spec.shape, dtype=dtype, device="meta")] * shards for spec in tensor_specs(params, tied)
    }
    return Checkpoint(size, params, tensors, hf)
