"""Writing checkpoints that are larger than the memory, in a folder that gets its name when it is complete.

The structure of a file is written first and then the bytes of each tensor in place. A quantized model is one file for
each layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, in_short
from ..quantization.matrix import Quantized, nbytes_of
from ..system.files import atomic_folder
from ..weights import DTYPES, INTEGER_DTYPES, TensorSpec, format_of, quantized, tensor_specs
from .checkpoint import Checkpoint, check_quantize, whole_tensor
from .files import SMALL_FILES
from .gguf_reading import is_gguf
from .loading import by_stored_name

_DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | INTEGER_DTYPES).items()}

_ALIGNMENT = 64  # bytes: the widest vectors of a processor, and a line of its cache


def write_empty_checkpoint(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write what torch.save would, except the bytes of the tensors. Return the offset of each tensor's bytes.

    tensors: by name, on the meta device. The checksums of the tensors stay zero. Raises OSError.
    """
    try:
        # memory that is never accessed costs nothing, but a limit on address space can still refuse it
        empty = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
        with torch.serialization.skip_data():
            torch.save(empty, file)
    except RuntimeError as error:  # torch raises it for errors of the system
        raise OSError(in_short(error)) from error
    del empty
    structure = torch.load(file, map_location="meta", weights_only=True)
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in structure.items()}


def write_empty_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write what safetensors' save_file would, except the bytes of the tensors. Return the offset of each tensor.

    tensors: by name; only their shapes and dtypes are used. Those of a multiple of 64 bytes are aligned to that. Raises
    OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    offsets = {}

    def order(name: str) -> tuple[bool, int]:  # the format has no gaps, but wider dtypes first are aligned too
        return tensors[name].nbytes % _ALIGNMENT > 0, -tensors[name].itemsize

    for name in sorted(tensors, key=order):
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of CPU tensors. Raises OSError."""
    offsets = write_empty_safetensors(file, tensors)
    with open(file, "r+b") as opened:
        for name, tensor in tensors.items():
            write_at(opened, offsets[name], tensor)


def write_at(opened: BinaryIO, offset: int, values: Tensor) -> None:
    """Write the bytes of a CPU tensor, in row-major order, into a file from an offset on."""
    opened.seek(offset)
    opened.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def save_quantized(
    source: Path,
    checkpoint: Checkpoint,
    folder: Path,
    tokenizer_file: Path | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    quantize: str = "int8",
    layers: Iterator[Mapping[str, Quantized]] = iter(()),
) -> None:
    """Write the checkpoint of the model folder `source` to another `folder`, its matrices in the format `quantize`.

    `load` maps the result. Each layer is one safetensors file, and only one layer is in memory at a time. Names are
    Meta's; a matrix has its scales next to it. The other tensors are in `dtype`; None keeps the stored dtype. progress:
    show a bar on stderr. layers: the matrices of each layer by their fields, as `calibrated_layers` gives them; those
    that are not given are rounded to the nearest. Raises UserError if the matrices cannot be quantized, and what
    `atomic_folder` raises.
    """
    params_file = checkpoint.params_file
    check_quantize(checkpoint, quantize)
    if is_gguf(params_file):
        raise UserError(f"{source}: convert it to Meta's format first, with python -m llama3_raw.convert")
    embeddings = next(spec for spec in checkpoint.shards if spec.field == "tok_embeddings")

    def nbytes(spec: TensorSpec) -> int:
        name = format_of(spec.field, quantize)
        if name:
            return nbytes_of(name, spec.shape)
        return torch.Size(spec.shape).numel() * (dtype or checkpoint.shards[spec][0].dtype).itemsize

    specs, n_layers = list(tensor_specs(checkpoint.params)), checkpoint.params.n_layers
    total = sum(map(nbytes, specs))
    with (
        atomic_folder(folder, total) as part,
        tqdm(
            total=total, desc=f"writing {folder}", unit="B", unit_scale=True, disable=not progress, leave=False
        ) as bar,
    ):
        for number in range(n_layers + 1):
            tensors: dict[str, Tensor] = {}
            given = next(layers, {})
            for spec in specs:
                if spec.layer != (number if number < n_layers else None):
                    continue
                stored = spec if spec in checkpoint.shards else embeddings  # if tied
                matrix = given.get(spec.field) or quantized(whole_tensor(checkpoint, stored), spec.field, quantize)
                matrix = matrix.to(dtype).contiguous() if isinstance(matrix, Tensor) else matrix
                tensors |= by_stored_name(spec.meta_name, matrix)
                bar.update(nbytes(spec))
            write_safetensors(part / f"{quantize}.{number:03}.safetensors", tensors)
        if tokenizer_file is not None:
            name = "tokenizer.json" if tokenizer_file.suffix == ".json" else "tokenizer.model"
            shutil.copyfile(tokenizer_file, part / name)
        for file in (params_file, *(source / name for name in SMALL_FILES)):
            if file.exists():
                shutil.copyfile(file, part / file.name)
