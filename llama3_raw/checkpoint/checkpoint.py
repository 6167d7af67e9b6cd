"""`Checkpoint`: the tensors of a model's files, mapped and checked, but not read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..params import Params
from ..system.madvise import drop_pages
from ..weights import DTYPES, MATRICES, SCALE_ENDINGS, TensorSpec, tensor_specs
from .files import find_files
from .mapping import UNSUPPORTED_DTYPE, map_checkpoint, map_safetensors
from .sharding import SHARDED_DIMENSION, Shard, join, take

# the way out if tensors and params do not match
_ONE_MODEL = "; use params and weights of one model, with all of its shards"


class Checkpoint(NamedTuple):
    """The tensors of a model's files: mapped and checked against the params, but not read."""

    source: str  # the file, or the folder if there are several
    params: Params
    shards: dict[TensorSpec, list[Tensor]]  # the whole tensor, or Meta's shards of it
    hf: bool  # whether the rows of wq and wk are in Hugging Face's order
    scales: dict[TensorSpec, tuple[Tensor, ...]]  # of the rows and of the columns of int8 matrices
    mapped: bool = False  # whether the tensors are views of mapped files and have not been written to
    of_shard: bool = False  # whether this is one process's shard of the files

    @property
    def tied(self) -> bool:
        """Whether `output` is `tok_embeddings`."""
        return all(spec.field != "output" for spec in self.shards)

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the first tensor, the embeddings, which are never quantized."""
        return next(iter(self.shards.values()))[0].dtype

    def needs_copy(self, spec: TensorSpec) -> bool:
        """Whether a tensor differs from its bytes in the file, so that it needs its own memory."""
        shards = self.shards[spec]
        is_joined = len(shards) > 1 and spec.field in SHARDED_DIMENSION
        return is_joined or not shards[0].is_contiguous() or (self.hf and spec.field in ("wq", "wk"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Map the weight files of a folder and check them against its params, without reading weights.

    Raises UserError if a file is missing or damaged, or if a tensor does not match the params.
    """
    params_file, weight_files = find_files(folder)
    params = Params.from_file(params_file)
    in_safetensors = weight_files[0].suffix == ".safetensors"
    by_name: dict[str, list[Tensor]] = {}
    for file in weight_files:
        for name, tensor in (map_safetensors if in_safetensors else map_checkpoint)(file).items():
            if in_safetensors and name in by_name:
                raise UserError(f"{file}: tensor {name} is in another file as well; keep the files of one model only")
            by_name.setdefault(name, []).append(tensor)
    # without an output matrix the embeddings are used for it, unless config.json denies it; params.json never says
    if (
        _is_hf(by_name)
        and "lm_head.weight" not in by_name
        and json.loads(params_file.read_bytes()).get("tie_word_embeddings") is False
    ):
        raise UserError(
            f"{folder}: tensor lm_head.weight is missing, and config.json does not tie it; download the rest"
        )
    source = str(weight_files[0] if len(weight_files) == 1 else folder)
    return check_tensors(source, params, by_name)._replace(mapped=True)


def first_layers(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """Return the checkpoint with only the first `layers` layers. Raises UserError if it has fewer."""
    n_layers = checkpoint.params.n_layers
    if not 1 <= layers <= n_layers:
        raise UserError(
            f"{layers}: {checkpoint.source} has {n_layers} layers; give a number from 1 to {n_layers}",
            argument="layers",
        )
    return checkpoint._replace(
        params=replace(checkpoint.params, n_layers=layers),
        shards={spec: shards for spec, shards in checkpoint.shards.items() if (spec.layer or 0) < layers},
    )


def shard_of(checkpoint: Checkpoint, shard: Shard) -> Checkpoint:
    """Return the checkpoint of the shard that one of several processes holds, with the shard's params.

    Raises UserError if the model cannot be split that way.
    """
    params = shard.of_params(checkpoint.params)
    if shard.size == 1:
        return checkpoint
    slices, scales = {}, {}
    for spec, whole in checkpoint.shards.items():
        dimension = SHARDED_DIMENSION.get(spec.field)
        if dimension is None:
            slices[spec] = whole
            continue
        wanted = shard.of_dimension(spec.field, spec.shape[dimension], checkpoint.params)
        shape = tuple(len(wanted) if i == dimension else length for i, length in enumerate(spec.shape))
        new_spec = spec._replace(shape=shape)
        slices[new_spec] = take(whole, dimension, wanted)
        if spec in checkpoint.scales:
            scales[new_spec] = tuple(
                scale[wanted.start : wanted.stop] if i == dimension else scale
                for i, scale in enumerate(checkpoint.scales[spec])
            )
    return checkpoint._replace(params=params, shards=slices, scales=scales, of_shard=checkpoint.mapped)


def whole_tensor(checkpoint: Checkpoint, spec: TensorSpec) -> Tensor:
    """Return a tensor as in Meta's unsharded format: shards joined, the rows of wq and wk in interleaved pairs."""
    shards = checkpoint.shards[spec]
    dimension = SHARDED_DIMENSION.get(spec.field)
    tensor = shards[0] if dimension is None else join(shards, dimension).contiguous()
    if checkpoint.hf and spec.field in ("wq", "wk"):
        tensor = interleave_pairs(tensor, checkpoint.params.head_dim)
    if checkpoint.mapped and checkpoint.needs_copy(spec):
        for shard in shards:
            drop_pages(shard)  # only the copy is used from now on
    return tensor


def _is_hf(names: Iterable[str]) -> bool:
    return any(name.startswith("model.") for name in names)


def check_tensors(source: str, params: Params, by_name: Mapping[str, list[Tensor]]) -> Checkpoint:
    """Return the checkpoint of named tensors, each a list of its shards, or of one tensor.

    Raises UserError naming the first tensor that is unexpected, missing, or of the wrong shape or dtype.
    """
    hf = _is_hf(by_name)
    in_int8 = {name for name, shards in by_name.items() if shards[0].dtype == torch.int8}
    scales = {name: [by_name.get(name + end, [None])[0] for end in SCALE_ENDINGS] for name in in_int8}
    scale_names = {name + end for name in in_int8 for end in SCALE_ENDINGS}
    by_name = {name: shards for name, shards in by_name.items() if name not in scale_names}
    tied = ("lm_head.weight" if hf else "output.weight") not in by_name
    wanted = {spec.hf_name if hf else spec.meta_name: spec for spec in tensor_specs(params, tied)}
    for name in by_name:
        if name not in wanted:
            raise UserError(
                f"{source}: unexpected tensor {in_short(name)}; the params describe a model without it{_ONE_MODEL}"
            )
    for name, spec in wanted.items():
        if name not in by_name:
            raise UserError(f"{source}: tensor {name} is missing; it should be {list(spec.shape)}{_ONE_MODEL}")
        _check_tensor(source, name, spec, by_name[name], scales.get(name))
    shards_of = {spec: by_name[name] for name, spec in wanted.items()}
    scales_of = {wanted[name]: tuple(scale for scale in scales[name] if scale is not None) for name in in_int8}
    return Checkpoint(source, params, shards_of, hf, scales_of)


def _check_tensor(
    source: str, name: str, spec: TensorSpec, shards: Sequence[Tensor], scales: Sequence[Tensor | None] | None
) -> None:
    """Raise UserError unless the shards of a tensor, and its scales if it is in int8, match the spec."""
    what = f"{source}: tensor {name}"
    shape = _joined_shape(spec, shards)
    if shape != spec.shape:
        actual = list(shape) if shape else " and ".join(str(list(shard.shape)) for shard in shards)
        raise UserError(f"{what} is {actual}, should be {list(spec.shape)} by the params{_ONE_MODEL}")
    for scale, size in zip(scales or (), spec.shape, strict=False):
        if scale is None or scale.shape != (size,) or scale.dtype != torch.float32 or spec.field not in MATRICES:
            raise UserError(f"{what} is in int8, without the scales that belong to it{_ONE_MODEL}")
    for shard in shards:
        if shard.dtype not in (DTYPES.values() if scales is None else (torch.int8,)):
            raise UserError(f"{what} is {shard.dtype}; {UNSUPPORTED_DTYPE}")
    if spec.field not in SHARDED_DIMENSION and any(not torch.equal(shard, shards[0]) for shard in shards[1:]):
        raise UserError(f"{source}: the shards differ in {name}; keep the shards of one model only")


def _joined_shape(spec: TensorSpec, shards: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return the shape of the joined shards, or None if they do not fit together."""
    if len(shards) == 1:
        return tuple(shards[0].shape)
    dimension = SHARDED_DIMENSION.get(spec.field)
    if any(shard.shape != shards[0].shape for shard in shards) or (dimension is not None and shards[0].dim() != 2):
        return None
    shape = list(shards[0].shape)
    if dimension is not None:
        shape[dimension] *= len(shards)
    return tuple(shape)


def interleave_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Convert wq or wk [heads * head_dim, dim] from Hugging Face's row order to Meta's.

    Both rotate the same pairs. Hugging Face stores the first halves of all pairs of a head before the second halves
    (permute in transformers' convert_llama_weights_to_hf.py; this is its inverse).
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])  # [heads, 2, head_dim/2, dim]
    return halves.transpose(1, 2).reshape(weight.shape)


def split_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Convert wq or wk [heads * head_dim, dim] from Meta's row order to Hugging Face's; inverts `interleave_pairs`."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[-1])  # [heads, head_dim/2, 2, dim]
    return pairs.transpose(1, 2).reshape(weight.shape)
