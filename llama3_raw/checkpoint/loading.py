"""From a checkpoint to `Weights` on a device, and from a state dict and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..params import Params
from ..quantization.int8 import Int8, quantize
from ..quantization.matrix import Matrix, tensors_of
from ..system.madvise import read_exactly
from ..weights import DTYPES, MATRICES, SCALE_ENDINGS, LayerWeights, Model, TensorPlace, Weights, tensor_places
from .checkpoint import Checkpoint, check_tensors, first_layers, open_checkpoint, shard_of, whole_tensor
from .files import find_tokenizer
from .sharding import Shard
from .staging import Move, mover


def from_state_dict(params: Params, tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors by Meta's names -> Weights, checked against `params`. Raises UserError naming a tensor that is wrong."""
    found = {name: [tensor] for name, tensor in tensors.items()}
    return build_weights(check_tensors("the state dict", params, found))


def to_state_dict(params: Params, weights: Weights) -> dict[str, Tensor]:
    """Weights -> tensors by Meta's names, as torch.save writes them into consolidated.00.pth.

    A matrix in int8 is three tensors, as `save_quantized` names them.
    """
    tensors: dict[str, Tensor] = {}
    for place in tensor_places(params, tied=weights.output is weights.tok_embeddings):
        matrix = getattr(weights if place.layer is None else weights.layers[place.layer], place.field)
        tensors |= by_stored_name(place.meta_name, matrix)
    return tensors


def by_stored_name(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """A matrix by its name, the scales of a quantised one beside it."""
    endings = ("", *SCALE_ENDINGS) if isinstance(matrix, Int8) else ("",)
    return {name + ending: tensor for ending, tensor in zip(endings, tensors_of(matrix), strict=True)}


def load(  # noqa: PLR0913  # what a caller may set
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    tokenizer: str | Path | Literal[False] | None = None,
    quantized: bool = False,
    progress: bool = False,
    gpu_layers: int | None = None,
    shard: Shard | None = None,
) -> Model:
    """A folder with Meta's files, a Hugging Face folder, or a repository with Meta's files in original/ -> Model.

    dtype: None keeps the checkpoint's own. layers: only the first so many. tokenizer: a tokenizer.model elsewhere;
        None takes the one in the folder or in its original/, if there is one; False reads none.
    quantized: round the matrices to int8; they take memory of their own. (What `save_quantized` wrote is mapped.)
    progress: read the weights into memory now, with a bar on stderr; otherwise the pages of a CPU model come in as the
        first forward pass uses them.
    gpu_layers: with a CUDA device, for a model that is larger than its memory: the matrices of only the first so many
        layers go there, those of the others stay on the CPU (see `goes_to_gpu`). `generate` finds the operations for
        that; `forward` and `trace` are to be given `backends.choose.ops_for(weights)`. None: all layers go there.
    shard: the part that one of several processes is to hold, of which alone the bytes are read; the params stay those
        of the whole model. The operations are to be those of `backends.tensor_parallel.parallel_ops`.

    Raises UserError where a file is missing or damaged, or a tensor is not what params.json says, for a number of
    layers that the model does not have, and for so many shards as it cannot be split into.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise UserError(f"dtype should be torch.bfloat16, float16 or float32, is {dtype}")
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    if layers is not None:
        checkpoint = first_layers(checkpoint, layers)
    device, params = torch.device(device), checkpoint.params
    check_gpu_layers(gpu_layers, device, params)
    if shard is not None:
        checkpoint = shard_of(checkpoint, shard)
    weights = build_weights(checkpoint, device, dtype, progress, quantized, gpu_layers)
    return Model(weights, params, None if tokenizer is False else find_tokenizer(folder, tokenizer, params))


def check_gpu_layers(gpu_layers: int | None, device: torch.device, params: Params) -> None:
    """Raise UserError if gpu_layers is given for another device than a CUDA GPU, or for layers that are not there."""
    if gpu_layers is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"{gpu_layers}: shares a model between a CUDA GPU and the CPU, but the device is {device}; leave it out, "
            "or take a CUDA device",
            argument="gpu_layers",
        )
    if not 1 <= gpu_layers <= params.n_layers:
        raise UserError(
            f"{gpu_layers}: {params.n_layers} layers are run; give a number from 1 to that", argument="gpu_layers"
        )


def goes_to_gpu(place: TensorPlace, tied: bool, gpu_layers: int | None) -> bool:
    """Whether a tensor lies on the GPU where the matrices of the first `gpu_layers` layers do; None: each one does.

    All norms do, and the cache goes with them. The output matrix does, which is read whole for each token as a layer
    is. The embeddings, of which a token reads one row, only where they are the output matrix (`tied`).
    """
    if gpu_layers is None:
        return True
    if place.field == "tok_embeddings":
        return tied
    return place.layer is None or place.layer < gpu_layers or place.field not in MATRICES


def build_weights(
    checkpoint: Checkpoint,
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype | None = None,
    progress: bool = False,
    quantized: bool = False,
    gpu_layers: int | None = None,
) -> Weights:
    """The tensors of a checkpoint, in one dtype, moved to `device` one by one; the arguments are those of `load`.

    Raises UserError where the stored dtypes differ and none is given, or where the memory does not hold them.
    """
    if dtype is None:
        _check_one_dtype(checkpoint)
    source, all_parts = checkpoint.source, checkpoint.parts
    total = sum(part.nbytes for parts in all_parts.values() for part in parts)
    largest = max(part.nbytes for parts in all_parts.values() for part in parts)
    made: dict[TensorPlace, Matrix] = {}
    with (
        mover(device, largest) as to_device,
        tqdm(
            total=total, unit="B", unit_scale=True, desc=f"loading {source}", disable=not progress, leave=False
        ) as bar,
    ):
        for place, parts in all_parts.items():
            on_gpu = goes_to_gpu(place, checkpoint.tied, gpu_layers)
            # of which a prompt uses but a few rows
            rows_only = place.field == "tok_embeddings" and (quantized or not checkpoint.tied)
            if checkpoint.of_shard and not rows_only:
                for part in parts:
                    read_exactly(part)
            try:
                made[place] = matrix = _made(checkpoint, place, to_device if on_gpu else _stay, dtype, quantized)
            except RuntimeError as error:  # torch's only word for memory that the CPU does not have
                home = device if on_gpu else torch.device("cpu")
                raise UserError(
                    f"{source}: {total / 1e9:.1f} GB of weights do not fit on {home}, from {place.meta_name} on; "
                    f"{'take' if home.type == 'cpu' else 'compute on the CPU, or take'} fewer {{argument}}",
                    argument="layers",
                ) from error
            values = tensors_of(matrix)[0]
            if progress and values is parts[0] and values.is_contiguous() and not rows_only:
                _touch(values, bar)
            else:
                bar.update(sum(part.nbytes for part in parts))
    return _put_together(made, checkpoint.params.n_layers, quantized)


def _check_one_dtype(checkpoint: Checkpoint) -> None:
    """Raise UserError naming a tensor that is stored in another dtype than the rest."""
    source, common = checkpoint.source, checkpoint.dtype
    for place, parts in checkpoint.parts.items():
        for other in {part.dtype for part in parts if place not in checkpoint.scales} - {common}:
            name = place.hf_name if checkpoint.hf else place.meta_name
            raise UserError(
                f"{source}: tensor {name} is {other}, should be {common} like the rest; {{argument}} makes them all "
                "one",
                argument="dtype",
            )


def _made(checkpoint: Checkpoint, place: TensorPlace, move: Move, dtype: torch.dtype | None, quantized: bool) -> Matrix:
    """A tensor of the checkpoint where `move` moves it, in one piece, and in int8 if it is or is to be."""
    scales = checkpoint.scales.get(place)
    moved = move(whole_tensor(checkpoint, place), None if scales else dtype)
    if scales:
        return Int8(moved, *(move(scale, None) for scale in scales))
    return quantize(moved) if quantized and place.field in MATRICES else moved


def _put_together(made: Mapping[TensorPlace, Matrix], n_layers: int, quantized: bool) -> Weights:
    """The tensors by their places. Without an `output`, the embeddings are that too."""
    top: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(n_layers)]
    for place, matrix in made.items():
        (top if place.layer is None else layers[place.layer])[place.field] = matrix
    if "output" not in top:
        top["output"] = quantize(top["tok_embeddings"]) if quantized else top["tok_embeddings"]
    return Weights(layers=tuple(LayerWeights(**fields) for fields in layers), **top)


def _stay(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor on the CPU, as it is or in another dtype."""
    return tensor if dtype is None else tensor.to(dtype)


def _touch(tensor: Tensor, bar: tqdm[None], chunk: int = 1 << 26, page: int = 4096) -> None:
    """Looks at one byte of every page, so that the system reads them in now."""
    for piece in tensor.view(-1).view(torch.uint8).split(chunk):
        piece[::page].sum()
        bar.update(piece.numel())
