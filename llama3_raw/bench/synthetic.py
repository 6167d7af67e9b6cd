"""Models of true size with random weights, for measuring: checkpoints in Meta's format, or tensors on a device."""

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
from ..quantization.matrix import tensors_of
from ..system.files import atomic_write, check_disk
from ..tokenizer import Tokenizer
from ..weights import TensorSpec, Weights, format_of, quantized, tensor_specs

_LLAMA_3: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0}
_70B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096, **_LLAMA_3}
# params.json of each model (llama_models.sku_list), and whether its embeddings are tied
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
    "405b": (  # as listed for 8 shards; the list for 16 shards has 16 kv heads
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, **_LLAMA_3}
        | {"use_scaled_rope": True},
        False,
    ),
}
CPU = torch.device("cpu")
_STD = 0.02  # standard deviation of the values of a matrix
CHUNK = 1 << 26  # values generated at once


def synthetic_checkpoint(size: str) -> Checkpoint:
    """Return the checkpoint of a model of true size: its params, and its tensors in bf16 on the meta device."""
    content, tied = SYNTHETIC[size]
    params = Params.from_meta(content)
    tensors = {
        spec: [torch.empty(spec.shape, dtype=torch.bfloat16, device="meta")] for spec in tensor_specs(params, tied)
    }
    return Checkpoint(size, params, tensors, hf=False)


def random_weights(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    random_seed: int = 0,
    quantize: str | None = None,
) -> Weights:
    """Create the tensors of `synthetic_checkpoint` on the device, one by one, without any other memory.

    Matrices are normal with a standard deviation of 0.02, norms are one. The same seed gives the same values on the
    same kind of device; `make_synthetic` gives different ones.

    Args:
        checkpoint: what `synthetic_checkpoint` returned.
        device: where to create the tensors.
        dtype: None keeps bf16.
        random_seed: seed of the values.
        quantize: round each matrix to this format before creating the next one.
    """
    generator = torch.Generator(device).manual_seed(random_seed)
    tensors: dict[TensorSpec, list[Tensor]] = {}
    formats: dict[TensorSpec, str] = {}

    def keep(spec: TensorSpec, tensor: Tensor) -> None:
        name = format_of(spec.field, quantize)
        tensors[spec] = list(tensors_of(quantized(tensor, spec.field, quantize)))
        if name is not None:
            formats[spec] = name

    for spec in tqdm(checkpoint.shards, desc=f"creating {checkpoint.source}", unit="tensor", leave=False):
        tensor = torch.ones(spec.shape, dtype=dtype or checkpoint.dtype, device=device)
        if tensor.dim() > 1:
            tensor.normal_(0, _STD, generator=generator)
        keep(spec, tensor)
        del tensor  # before the next is created
    if quantize and checkpoint.tied:
        *_, output = tensor_specs(checkpoint.params)
        keep(output, next(iter(tensors.values()))[0])
    return build_weights(checkpoint._replace(shards=tensors, formats=formats), device)  # copies nothing


def make_synthetic(
    size: str, folder: Path, tokenizer: Path | None = None, random_seed: int = 0, device: torch.device = CPU
) -> None:
    """Write a model of true size in Meta's format, with random weights in bf16. Needs little memory.

    Matrices are normal with a standard deviation of 0.02, norms are one. A GPU as the device makes them faster. Raises
    UserError if the folder already holds a model, or if the disk is too small.
    """
    content, _ = SYNTHETIC[size]
    params = Params.from_meta(content)
    if tokenizer is not None and Tokenizer(tokenizer).n_words != params.vocab_size:
        raise UserError(f"{tokenizer}: does not have the {params.vocab_size} tokens of Llama 3", argument="tokenizer")
    tensors = {spec.meta_name: shards[0] for spec, shards in synthetic_checkpoint(size).shards.items()}
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    checkpoint = folder / "consolidated.00.pth"
    for file in (checkpoint, folder / "params.json", folder / "tokenizer.model"):
        if file.exists() and not (tokenizer is not None and file.samefile(tokenizer)):
            raise UserError(f"{file}: already exists; name another folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created: {error.strerror}; name a folder that you can write to"
        ) from error
    check_disk(folder, folder, n_bytes)
    with (
        tqdm(total=n_bytes, unit="B", unit_scale=True, desc=f"writing {folder}") as bar,
        atomic_write(checkpoint) as part,
    ):
        _write_random(part, tensors, random_seed, bar, device)
        if tokenizer is not None and tokenizer.resolve() != (folder / "tokenizer.model").resolve():
            with atomic_write(folder / "tokenizer.model") as copy:
                shutil.copyfile(tokenizer, copy)
        with atomic_write(folder / "params.json") as params_file:
            params_file.write_text(json.dumps(content) + "\n")


def _write_random(
    file: Path, tensors: Mapping[str, Tensor], random_seed: int, bar: tqdm[Any], device: torch.device
) -> None:
    """Write a checkpoint with random values for each of the tensors, which are on the meta device."""
    offsets = write_empty_checkpoint(file, tensors)
    generator = torch.Generator(device).manual_seed(random_seed)
    with open(file, "r+b") as opened:
        for name, tensor in tensors.items():
            for begin in range(0, tensor.numel(), CHUNK):
                count = min(CHUNK, tensor.numel() - begin)
                if tensor.dim() == 1:
                    values = torch.ones(count, dtype=tensor.dtype)
                else:
                    values = torch.empty(count, device=device).normal_(0, _STD, generator=generator)
                    values = values.to(tensor.dtype).cpu()
                write_at(opened, offsets[name] + begin * tensor.itemsize, values)
                bar.update(values.nbytes)
