"""A small model of random weights and two prompts, for tests of patching, gradients, attribution and circuits."""

from __future__ import annotations

import torch
from torch import Tensor

from llama3_raw import Model, Params
from tests.references import random_weights

LAYERS, HEADS, KV_HEADS = range(3), range(4), range(2)
ANSWER, OTHER = 3, 5


def small_model(dtype: torch.dtype = torch.float32) -> Model:
    """Return a model with grouped-query attention."""
    params = Params(
        dim=64,
        n_layers=len(LAYERS),
        n_heads=len(HEADS),
        n_kv_heads=len(KV_HEADS),
        vocab_size=100,
        head_dim=16,
        hidden_dim=96,
        norm_eps=0.01,
        rope_theta=10000.0,
        rope_scaling=None,
        max_seq_len=64,
    )
    return Model(random_weights(params, dtype, seed=0), params, None)


CLEAN, IDS = torch.randint(100, (2, 6), generator=torch.Generator().manual_seed(1)).tolist()


def metric(logits: Tensor) -> Tensor:
    """[rows, T, vocab_size] -> [rows]: the difference of two logits at the last position."""
    return logits[:, -1, ANSWER] - logits[:, -1, OTHER]


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that two tensors are equal up to the rounding of fp32."""
    assert second.std() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance * float(second.abs().max()))
