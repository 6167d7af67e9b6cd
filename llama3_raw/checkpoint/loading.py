"""`load`, and the conversion of checkpoints and state dicts to `Weights`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..params import Params
from ..quantization.blocks import Blocks
from ..quantization.matrix import Matrix, stored_names, tensors_of
from ..system.devices import usable_device
from ..system.madvise import prefetch_pages, read_single_pages
from ..weights import (
    MATRICES,
    LayerWeights,
    Model,
    TensorSpec,
    Weights,
    dtype_name,
    dtype_of,
    quantized,
    tensor_specs,
)
from .checkpoint import (
    Checkpoint,
    check_quantize,
    check_tensors,
    first_layers,
    open_checkpoint,
    shard_of,
    whole_quantized,
    whole_tensor,
    with_adapter,
)
from .files import FileFormat
from .gguf_reading import is_gguf
from .locate import find_named, name_of
from .sharding import Shard
from .staging import Move, staging
from .text import end_tokens, find_tokenizer


def from_state_dict(params: Params, tensors: Mapping[str, Tensor]) -> Weights:
    """Return the weights of a state dict with Meta's names, on the device of its first tensor.

    Raises UserError naming a tensor that is wrong.
    """
    by_name = {name: [tensor] for name, tensor in tensors.items()}
    checkpoint = check_tensors("the state dict", params, by_name)
    return build_weights(checkpoint, next(iter(tensors.values())).device)


def to_state_dict(params: Params, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of a model by Meta's names, ready for torch.save to consolidated.00.pth.

    A matrix in int8 or int4 is three tensors, with the names that `save_quantized` uses.
    """
    tensors: dict[str, Tensor] = {}
    for spec in tensor_specs(params, tied=weights.output is weights.tok_embeddings):
        matrix = getattr(weights if spec.layer is None else weights.layers[spec.layer], spec.field)
        tensors |= by_stored_name(spec.meta_name, matrix)
    return tensors


def by_stored_name(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """Return the tensors of a matrix by their names in files: itself and, if it is in int8 or int4, its scales.

    Of blocks they are the values that these stand for.
    """
    if isinstance(matrix, Blocks):
        return {name: matrix.dequantize(matrix.dtype)}
    names = [name] if isinstance(matrix, Tensor) else stored_names(name, matrix.format)
    return dict(zip(names, tensors_of(matrix), strict=True))


def load(  # noqa: PLR0913  # what a caller may set
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    layers: int | None = None,
    tokenizer: str | Path | Literal[False] | None = None,
    quantize: str | None = None,
    progress: bool = False,
    gpu_layers: int | None = None,
    shard: Shard | None = None,
    format: FileFormat | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Load a model from a folder with Meta's files or Hugging Face's, or from a GGUF file.

    Meta's files may also be in a subfolder original/, but weights in the folder itself come first.

    Args:
        folder: the folder, with a tokenizer.model or tokenizer.json if there is to be text; or a file NAME.gguf. A str
            may also be the name of a folder in weights/, or "org/repo" or "org/repo@revision" for a repository in the
            Hugging Face cache. Nothing is downloaded.
        device: where the tensors are: "cpu", "cuda", "cuda:N" or "mps". On the CPU they are memory-mapped, and not
            copied unless they must be converted.
        dtype: "float32" or torch.float32; likewise bfloat16, float16, float64. None keeps the checkpoint's dtype. Where
            the norms have another one, they take that of the matrices.
        layers: load only the first `layers` layers.
        tokenizer: a tokenizer.model or tokenizer.json elsewhere; None loads the folder's, if there is one; False
            loads none.
        quantize: round the matrices to "int8" or "int4", in allocated memory. In an int4 model the output matrix is in
            int8. (What `save_quantized` wrote is mapped.)
        progress: read the weights into memory now, with a bar on stderr. Otherwise the pages of a CPU model are read
            when the first forward pass uses them.
        gpu_layers: for a model larger than a CUDA GPU's memory: only the matrices of the first `gpu_layers` layers are
            on the GPU (see `goes_to_gpu`). `generate` chooses the operations for that; pass
            `ops=backends.choose.ops_for(weights)` to `forward` and `trace`. None: all layers are on the GPU.
        shard: load only the shard that one of several processes holds; only its bytes are read. The params are those
            of the whole model. Use it with the operations of `backends.tensor_parallel.parallel_ops`.
        format: "original" takes only Meta's files, "safetensors" only Hugging Face's, where a folder has both.
        adapter: a folder with a LoRA adapter of PEFT, which is merged into the weights.

    Raises:
        UserError: a file is missing or damaged, a tensor does not match the params, the model has fewer layers, or it
            cannot be split into that many shards, or quantized. Or there is no such dtype or device.
    """
    device, dtype = usable_device(device), None if dtype is None else dtype_of(dtype)
    folder = find_named(folder) if isinstance(folder, str) else folder.expanduser()
    checkpoint = open_checkpoint(folder, format)
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, Path(adapter))
    if layers is not None:
        checkpoint = first_layers(checkpoint, layers)
    params = checkpoint.params
    check_gpu_layers(gpu_layers, device, params)
    if shard is not None:
        checkpoint = shard_of(checkpoint, shard)
    weights = build_weights(checkpoint, device, dtype, progress, quantize, gpu_layers)
    found = None if tokenizer is False else find_tokenizer(checkpoint, tokenizer)
    return Model(weights, params, found, end_tokens(checkpoint, found), name_of(folder))


def check_gpu_layers(gpu_layers: int | None, device: torch.device, params: Params) -> None:
    """Raise UserError if gpu_layers is given for a device other than a CUDA GPU, or is out of range."""
    if gpu_layers is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"{gpu_layers}: splits a model between a CUDA GPU and the CPU, but the device is {device}; leave it out, "
            "or use a CUDA device",
            argument="gpu_layers",
        )
    if not 1 <= gpu_layers <= params.n_layers:
        raise UserError(
            f"{gpu_layers}: {params.n_layers} layers are loaded; give a number from 1 to {params.n_layers}",
            argument="gpu_layers",
        )


def goes_to_gpu(spec: TensorSpec, tied: bool, gpu_layers: int | None) -> bool:
    """Whether a tensor is on the GPU if the matrices of the first `gpu_layers` layers are; None: every tensor is.

    All norms are, and the cache with them. So is the output matrix, which is read whole for each token, like a layer.
    The embeddings, of which a token reads one row, are only if they are the output matrix (`tied`).
    """
    if gpu_layers is None:
        return True
    if spec.field == "tok_embeddings":
        return tied
    return spec.layer is None or spec.layer < gpu_layers or spec.field not in MATRICES


def build_weights(
    checkpoint: Checkpoint,
    device: torch.device = torch.device("cpu"),
    dtype: torch.dtype | None = None,
    progress: bool = False,
    quantize: str | None = None,
    gpu_layers: int | None = None,
) -> Weights:
    """Return the tensors of a checkpoint in one dtype, moved to `device` one by one; arguments as in `load`.

    Raises UserError if the stored dtypes differ and none is given, if the matrices cannot be quantized, or if the
    tensors do not fit into memory.
    """
    check_quantize(checkpoint, quantize)
    if dtype is None:
        dtype = _common_dtype(checkpoint)
    source, sizes = checkpoint.source, [shard.nbytes for shards in checkpoint.shards.values() for shard in shards]
    total, largest = sum(sizes), max(sizes)
    built: dict[TensorSpec, Matrix] = {}
    with (
        staging(device, largest) as to_device,
        tqdm(
            total=total, unit="B", unit_scale=True, desc=f"loading {source}", disable=not progress, leave=False
        ) as bar,
    ):
        for spec, shards in checkpoint.shards.items():
            on_gpu = goes_to_gpu(spec, checkpoint.tied, gpu_layers)
            # a token uses only one row of the embeddings
            rows_only = spec.field == "tok_embeddings" and (quantize or not checkpoint.tied)
            if checkpoint.of_shard and not rows_only:
                for shard in shards:
                    prefetch_pages(shard)
            try:
                built[spec] = matrix = _build(checkpoint, spec, to_device if on_gpu else _on_cpu, dtype, quantize)
            except RuntimeError as error:  # torch raises nothing more specific if the CPU's memory is too small
                home = device if on_gpu else torch.device("cpu")
                raise UserError(
                    f"{source}: {total / 1e9:.1f} GB of weights do not fit on {home}, from {spec.meta_name} on; "
                    f"{'use' if home.type == 'cpu' else 'compute on the CPU, or use'} fewer {{argument}}",
                    argument="layers",
                ) from error
            tensors = tensors_of(matrix)
            is_mapped = tensors[0] is shards[0] and tensors[0].device.type == "cpu"
            if rows_only and not checkpoint.tied and is_mapped:
                read_single_pages(tensors[0])
            if progress and is_mapped and tensors[0].is_contiguous() and not rows_only:
                for tensor in tensors:
                    _read_pages(tensor, bar)
            else:
                bar.update(sum(shard.nbytes for shard in shards))
    return _to_weights(built, checkpoint.params.n_layers, quantize)


def _common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the layers' matrices, and print a line if other tensors are converted to it.

    Raises UserError naming a matrix of a layer that has another dtype than the rest.
    """
    source, common = checkpoint.source, checkpoint.dtype
    others: dict[torch.dtype, str] = {}  # and the name of the first such tensor
    for spec, shards in checkpoint.shards.items():
        if spec in checkpoint.formats or spec in checkpoint.blocks:
            continue
        for other in {shard.dtype for shard in shards} - {common}:
            name = spec.hf_name if checkpoint.hf else spec.meta_name
            others.setdefault(other, name)
            if spec.field in MATRICES and spec.layer is not None:
                raise UserError(
                    f"{source}: tensor {name} is {other}, should be {common} like the rest; {{argument}} converts them "
                    "all",
                    argument="dtype",
                )
    for other, name in () if is_gguf(checkpoint.params_file) else others.items():  # in GGUF files that is the rule
        print(
            f"llama3_raw: {source}: {name} is in {dtype_name(other)}; converted to {dtype_name(common)} like the rest",
            file=sys.stderr,
        )
    return common


def _build(
    checkpoint: Checkpoint, spec: TensorSpec, move: Move, dtype: torch.dtype | None, quantize: str | None
) -> Matrix:
    """Return a tensor of the checkpoint, joined, moved by `move`; quantized if it is stored so, or by `quantize`."""
    if spec in checkpoint.formats:
        matrix = whole_quantized(checkpoint, spec)
        return type(matrix)(*(move(tensor, None) for tensor in matrix))
    block_type = checkpoint.blocks.get(spec)
    moved = move(whole_tensor(checkpoint, spec), None if block_type else dtype)
    if block_type:
        return Blocks(moved, block_type, dtype or checkpoint.dtype)
    return quantized(moved, spec.field, quantize)


def _to_weights(built: Mapping[TensorSpec, Matrix], n_layers: int, quantize: str | None) -> Weights:
    """Return the tensors as `Weights`. Without an `output`, the embeddings are used for it."""
    top: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(n_layers)]
    for spec, matrix in built.items():
        (top if spec.layer is None else layers[spec.layer])[spec.field] = matrix
    if "output" not in top:
        top["output"] = quantized(top["tok_embeddings"], "output", quantize)
    return Weights(layers=tuple(LayerWeights(**fields) for fields in layers), **top)


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor on the CPU in `dtype`; None leaves it as it is."""
    return tensor if dtype is None else tensor.to(dtype)


def _read_pages(tensor: Tensor, bar: tqdm[None], chunk: int = 1 << 26, page: int = 4096) -> None:
    """Access one byte of every page, so that the system reads all of them now."""
    for piece in tensor.view(-1).view(torch.uint8).split(chunk):
        piece[::page].sum()
        bar.update(piece.numel())
