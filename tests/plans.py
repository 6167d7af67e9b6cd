"""Models of true size without a byte of them, to plan with."""

from __future__ import annotations

import torch

from llama3_raw import Params
from llama3_raw.bench.synthetic import SYNTHETIC
from llama3_raw.checkpoint.checkpoint import Checkpoint
from llama3_raw.weights import tensor_places

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def checkpoint(
    size: str = "8b", *, shards: int = 1, hf: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Checkpoint:
    """A model of true size, without a byte of it."""
    content, tied = SYNTHETIC[size]
    params = Params.from_meta(content)
    parts = {
        place: [torch.empty(place.shape, dtype=dtype, device="meta")] * shards for place in tensor_places(params, tied)
    }
    return Checkpoint(size, params, parts, hf, {})
