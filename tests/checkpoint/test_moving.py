"""A model in another dtype, or on another device, and the refusals of dtypes and devices."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import llama3_raw
from llama3_raw import Model, UserError, forward
from llama3_raw.checkpoint import moving
from llama3_raw.quantization.blocks import BLOCK_TYPES, Blocks
from llama3_raw.system.devices import usable_device
from tests.blocks import random_blocks
from tests.references import cast, dense, flat, quantized_weights

IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize("dtype", ["float32", "float64", torch.float16, torch.float32])
def test_another_dtype(tiny: Model, dtype: Any) -> None:
    moved = llama3_raw.to(tiny, dtype)
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert {tensor.dtype for tensor in flat(moved.weights)} == {expected}
    assert moved.weights.output is moved.weights.tok_embeddings
    assert torch.equal(
        forward(moved.weights, moved.params, IDS), forward(cast(tiny.weights, expected), tiny.params, IDS)
    )
    assert moved[1:] == tiny[1:]
    assert tiny.weights.norm.dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["bfloat16", torch.bfloat16, "cpu", torch.device("cpu")])
def test_nothing_to_do_copies_nothing(tiny: Model, target: Any) -> None:
    moved = llama3_raw.to(tiny, target)
    assert all(a is b for a, b in zip(flat(moved.weights), flat(tiny.weights), strict=True))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_matrices_keep_their_format(tiny: Model, format: str) -> None:
    weights = quantized_weights(tiny.weights, format)
    moved = llama3_raw.to(tiny._replace(weights=weights), "float32").weights
    assert moved.layers[0].wq.format == format
    assert moved.norm.dtype == moved.tok_embeddings.dtype == torch.float32
    logits = forward(moved, tiny.params, IDS)
    expected = forward(weights, tiny.params, IDS)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()  # but for bf16's rounding


def with_blocks(model: Model) -> Model:
    """The model with random blocks for a matrix and for the tied embeddings."""
    kind = BLOCK_TYPES["Q8_0"]
    rows, dim = dense(model.weights.output).shape
    table = Blocks(random_blocks(kind, rows, dim // 32, seed=0, largest=1e-3), kind, torch.bfloat16)
    wq = Blocks(random_blocks(kind, dim, dim // 32, seed=1, largest=1e-3), kind, torch.bfloat16)
    layers = (model.weights.layers[0]._replace(wq=wq), *model.weights.layers[1:])
    return model._replace(weights=model.weights._replace(tok_embeddings=table, layers=layers, output=table))


def test_blocks_stay_and_compute_in_the_dtype(tiny: Model) -> None:
    model = with_blocks(tiny)
    moved = llama3_raw.to(model, "float32").weights
    assert moved.layers[0].wq.data is model.weights.layers[0].wq.data
    assert moved.output is moved.tok_embeddings
    assert forward(moved, model.params, IDS).isfinite().all()
    assert moved.tok_embeddings.dtype == torch.float32  # that of the rows which `embed` returns


def test_what_cannot_be_moved(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "usable_device", torch.device)
    monkeypatch.setattr(moving, "KINDS", ("meta",))  # a device that is always there
    model = with_blocks(tiny)
    assert llama3_raw.to(model, "meta").weights.layers[0].wq.data.is_meta
    assert llama3_raw.to(model, "meta").weights.norm.is_meta
    wq = model.weights.layers[0].wq._replace(is_interleaved=True)
    layers = (model.weights.layers[0]._replace(wq=wq), *model.weights.layers[1:])
    with pytest.raises(UserError, match="interleaved for the CPU's kernels; load the model on meta instead"):
        llama3_raw.to(model._replace(weights=model.weights._replace(layers=layers)), "meta")


@pytest.mark.parametrize("target", ["fp32", "int8", "gpu", None, 3, "", ["float32"], {}])
def test_neither_a_dtype_nor_a_device(tiny: Model, target: Any) -> None:
    with pytest.raises(
        UserError, match=f"^dtype_or_device {re.escape(str(target))}: should be one of bfloat16, .*, cpu, cuda, mps"
    ):
        llama3_raw.to(tiny, target)


def test_a_dtype_that_weights_cannot_have(tiny: Model) -> None:
    with pytest.raises(UserError, match=r"^dtype torch.int8: should be one of bfloat16, float16, float32, float64$"):
        llama3_raw.to(tiny, torch.int8)


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("device", "message"),
    {
        "cuda": "device cuda: torch sees 0 CUDA GPUs here; use device cpu",
        "cuda:1": "device cuda:1: torch sees 0 CUDA GPUs here; use device cpu",
        "mps": "device mps: torch sees no Apple GPU here; use device cpu",
        "cuda:x": "device cuda:x: there is no such device; use cpu, cuda, cuda:N or mps",
    }.items(),
)
def test_devices_that_are_not_there(tiny: Model, device: str, message: str) -> None:
    for use in (usable_device, lambda it: llama3_raw.to(tiny, it), lambda it: llama3_raw.load("tiny", device=it)):
        with pytest.raises(UserError, match=f"^{message}$"):
            use(device)


@pytest.mark.parametrize("device", ["gpu", "meta", "", None])
def test_devices_that_do_not_exist(device: Any) -> None:
    with pytest.raises(UserError, match=f"^device {device}: there is no such device; use cpu, cuda, cuda:N or mps$"):
        llama3_raw.load("tiny", device=device)


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for device in ("cpu", "cuda", "cuda:1", "mps"):
        assert usable_device(device) == usable_device(torch.device(device)) == torch.device(device)
    with pytest.raises(UserError, match="cuda:2"):
        usable_device("cuda:2")
