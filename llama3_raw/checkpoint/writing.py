"""Writing checkpoints that are larger than the memory, in a folder that gets its name when it is complete.

Either the structure of a file is written first and then the bytes of each tensor in place, or, in int8, a file for each
layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, in_short
from ..quantization.int8 import Int8
from ..system.files import atomic_folder
from ..weights import DTYPES, MATRICES, tensor_specs
from .checkpoint import Checkpoint, whole_tensor
from .files import SMALL_FILES
from .gguf_reading import is_gguf
from .loading import by_stored_name

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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

    tensors: by name, on the meta device. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    offsets = {}
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # wider dtypes first, which aligns all
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


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
) -> None:
    """Write the checkpoint of the model folder `source` to another `folder`, matrices in int8; `load` maps the result.

    Each layer is one safetensors file, and only one layer is in memory at a time. Names are Meta's; a matrix has its
    scales next to it. The other tensors are in `dtype`; None keeps the stored dtype. progress: show a bar on stderr.
    Raises what `atomic_folder` raises.
    """
    params_file = checkpoint.params_file
    if checkpoint.is_quantized:
        raise UserError(f"{source}: is quantized already; write the original weights in int8")
    if is_gguf(params_file):
        raise UserError(f"{source}: convert it to Meta's format first, with python -m llama3_raw.convert")
    n_layers = checkpoint.params.n_layers
    embeddings = next(spec for spec in checkpoint.shards if spec.field == "tok_embeddings")
    n_values = sum(torch.Size(spec.shape).numel() for spec in tensor_specs(checkpoint.params))
    n_bytes = n_values + 4 * torch.Size(embeddings.shape).numel()  # at most: the embeddings are not in int8
    with atomic_folder(folder, n_bytes) as part:
        numbers = range(n_layers + 1)
        for number in tqdm(numbers, desc=f"writing {folder}", unit="layer", disable=not progress, leave=False):
            tensors: dict[str, Tensor] = {}
            for spec in tensor_specs(checkpoint.params):
                if spec.layer != (number if number < n_layers else None):
                    continue
                tensor = whole_tensor(checkpoint, spec if spec in checkpoint.shards else embeddings)  # if tied
                matrix = Int8.quantize(tensor) if spec.field in MATRICES else tensor.to(dtype).contiguous()
                tensors |= by_stored_name(spec.meta_name, matrix)
            file = part / f"int8.{number:03}.safetensors"
            try:
                save_file(tensors, file)
            except SafetensorError as error:  # safetensors raises it for errors of the system
                raise OSError(in_short(error)) from error
            file.chmod(params_file.stat().st_mode)  # otherwise only its owner could read it
        if tokenizer_file is not None:
            name = "tokenizer.json" if tokenizer_file.suffix == ".json" else "tokenizer.model"
            shutil.copyfile(tokenizer_file, part / name)
        for file in (params_file, *(source / name for name in SMALL_FILES)):
            if file.exists():
                shutil.copyfile(file, part / file.name)
