"""Models to measure on, of true size with random weights: checkpoints of Meta's format, or tensors on a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.loading import build_weights
from ..checkpoint.writing import write_at, write_empty_checkpoint
from ..errors import UserError
from ..params import Params
from ..quantization.int8 import quantize
from ..system.files import atomic_write, check_disk
from ..tokenizer import Tokenizer
from ..weights import MATRICES, TensorPlace, Weights, tensor_places

_LLAMA_3: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0}
_70B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096, **_LLAMA_3}
# params.json of the models (llama_models.sku_list), and whether their embeddings are tied
SYNTHETIC: dict[str, tuple[dict[str, Any], bool]] = {
    "8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, **_LLAMA_3},
        False,
    ),
    "1b": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256, **_LLAMA_3}
        | {"use_scaled_rope": True},
        True,
    ),
    "3b": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256, **_LLAMA_3}
        | {"use_scaled_rope": True},
        True,
    ),
    "70b-1layer": ({**_70B, "n_layers": 1}, False),
    "70b": (_70B, False),
    "405b": (  # as listed for 8 shards; for 16 the list has 16 kv heads
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, **_LLAMA_3}
        | {"use_scaled_rope": True},
        False,
    ),
}
_DEVIATION = 0.02  # of the values of a matrix
CHUNK = 1 << 26  # values made at once


def synthetic_checkpoint(size: str) -> Checkpoint:
    """A model of true size before it is made: its params, and its tensors in bf16 without content (on meta)."""
    content, tied = SYNTHETIC[size]
    params = Params.from_meta(content)
    parts = {
        place: [torch.empty(place.shape, dtype=torch.bfloat16, device="meta")] for place in tensor_places(params, tied)
    }
    return Checkpoint(size, params, parts, hf=False, scales={})


def random_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    random_seed: int = 0,
    quantized: bool = False,
) -> Weights:
    """The tensors of `synthetic_checkpoint`, made on the device one by one; beside them it takes no memory.

    Matrices are normal with a standard deviation of 0.02, norms are one. dtype: None keeps bf16. The same seed gives
    the same values on the same kind of device; those of `make_synthetic` are others. quantized: each matrix is rounded
    to int8 before the next one is made.
    """
    generator = torch.Generator(device).manual_seed(random_seed)
    made: dict[TensorPlace, list[Tensor]] = {}
    scales: dict[TensorPlace, tuple[Tensor, ...]] = {}
    for place in tqdm(checkpoint.parts, desc=f"making {checkpoint.source}", unit="tensor", leave=False):
        tensor = torch.ones(place.shape, dtype=dtype or checkpoint.dtype, device=device)
        if tensor.dim() > 1:
            tensor.normal_(0, _DEVIATION, generator=generator)
        if quantized and place.field in MATRICES:
            rounded = quantize(tensor)
            tensor, scales[place] = rounded.values, rounded[1:]
        made[place] = [tensor]
    # which takes them as they are, but for an output in int8 where the embeddings are tied
    return build_weights(checkpoint._replace(parts=made, scales=scales), device, quantized=quantized)


def make_synthetic(size: str, folder: Path, tokenizer: Path | None = None, random_seed: int = 0) -> None:
    """Writes a model of Meta's format and true size with random weights in bf16, in little memory.

    Matrices are normal with a standard deviation of 0.02, norms are one. Raises UserError where the folder already
    holds a model or the disk is too small.
    """
    content, _ = SYNTHETIC[size]
    params = Params.from_meta(content)
    if tokenizer is not None and Tokenizer(tokenizer).n_words != params.vocab_size:
        raise UserError(f"{tokenizer}: does not have the {params.vocab_size} tokens of Llama 3", argument="tokenizer")
    tensors = {place.meta_name: parts[0] for place, parts in synthetic_checkpoint(size).parts.items()}
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    checkpoint = folder / "consolidated.00.pth"
    for file in (checkpoint, folder / "params.json", folder / "tokenizer.model"):
        if file.exists() and not (tokenizer is not None and file.samefile(tokenizer)):
            raise UserError(f"{file}: is there already; name another folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; name a folder you may write to") from error
    check_disk(folder, folder, n_bytes)
    with (
        tqdm(total=n_bytes, unit="B", unit_scale=True, desc=f"writing {folder}") as bar,
        atomic_write(checkpoint) as part,
    ):
        _write_random(part, tensors, random_seed, bar)
        if tokenizer is not None and tokenizer.resolve() != (folder / "tokenizer.model").resolve():
            shutil.copyfile(tokenizer, folder / "tokenizer.model")
        (folder / "params.json").write_text(json.dumps(content) + "\n")


def _write_random(file: Path, tensors: Mapping[str, Tensor], random_seed: int, bar: tqdm[Any]) -> None:
    """Writes a checkpoint with random values in the place of each of the tensors, which are without content."""
    offsets = write_empty_checkpoint(file, tensors)
    generator = torch.Generator().manual_seed(random_seed)
    with open(file, "r+b") as opened:
        for name, tensor in tensors.items():
            for begin in range(0, tensor.numel(), CHUNK):
                count = min(CHUNK, tensor.numel() - begin)
                if tensor.dim() == 1:
                    values = torch.ones(count, dtype=tensor.dtype)
                else:
                    values = torch.empty(count).normal_(0, _DEVIATION, generator=generator).to(tensor.dtype)
                write_at(opened, offsets[name] + begin * tensor.itemsize, values)
                bar.update(values.nbytes)
