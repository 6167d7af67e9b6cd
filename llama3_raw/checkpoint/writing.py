"""Files of a model that are written: in a folder that gets its name when it is whole, and never all of it in memory.

First their structure alone, then the bytes of each tensor where they go; or, in int8, a file for each layer.
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

from ..errors import in_short
from ..quantization.int8 import quantize
from ..system.files import atomic_folder
from ..weights import DTYPES, MATRICES, tensor_places
from .checkpoint import Checkpoint, whole_tensor
from .files import find_files
from .loading import by_stored_name

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_empty_checkpoint(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Writes what torch.save would, but for the bytes of the tensors; -> where in the file those of each begin.

    tensors: by name, on the device meta. The checksums of the tensors stay zero. Raises OSError.
    """
    try:
        # memory that is never touched costs nothing, unless the process may not even ask for so much
        empty = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
        with torch.serialization.skip_data():
            torch.save(empty, file)
    except RuntimeError as error:  # torch's word for what the system refuses
        raise OSError(in_short(error)) from error
    del empty
    structure = torch.load(file, map_location="meta", weights_only=True)
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in structure.items()}


def write_empty_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Writes what safetensors' save_file would, but for the bytes of the tensors; -> where those of each begin.

    tensors: by name, on the device meta. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without which transformers reads no file
    end = 0
    offsets = {}
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # the wider first, so that all are aligned
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
    """Puts the bytes of a tensor on the CPU, in the order of its dimensions, into a file from an offset on."""
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
    """Writes the checkpoint of the model folder `source` into another `folder`, its matrices in int8; `load` maps it.

    A file of safetensors for each layer, which is all that is in memory at a time, by Meta's names, a matrix with its
    scales beside it. The other tensors are in `dtype`; None: as they are stored. progress: shows a bar on stderr.
    Raises what `atomic_folder` raises.
    """
    params_file, _ = find_files(source)
    n_layers = checkpoint.params.n_layers
    embeddings = next(place for place in checkpoint.parts if place.field == "tok_embeddings")
    n_values = sum(torch.Size(place.shape).numel() for place in tensor_places(checkpoint.params))
    n_bytes = n_values + 4 * torch.Size(embeddings.shape).numel()  # at most: the embeddings are not in int8
    with atomic_folder(folder, n_bytes) as part:
        numbers = range(n_layers + 1)
        for number in tqdm(numbers, desc=f"writing {folder}", unit="layer", disable=not progress, leave=False):
            tensors: dict[str, Tensor] = {}
            for place in tensor_places(checkpoint.params):
                if place.layer != (number if number < n_layers else None):
                    continue
                tensor = whole_tensor(checkpoint, place if place in checkpoint.parts else embeddings)  # where tied
                matrix = quantize(tensor) if place.field in MATRICES else tensor.to(dtype).contiguous()
                tensors |= by_stored_name(place.meta_name, matrix)
            file = part / f"int8.{number:03}.safetensors"
            try:
                save_file(tensors, file)
            except SafetensorError as error:  # its word for what the system refuses
                raise OSError(in_short(error)) from error
            file.chmod(params_file.stat().st_mode)  # otherwise nobody else could read it
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, part / "tokenizer.model")
        shutil.copyfile(params_file, part / params_file.name)
