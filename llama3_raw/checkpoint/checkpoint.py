"""`Checkpoint`: a model as it lies in its files, every tensor mapped and checked, none of them read yet."""

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
from ..system.madvise import let_go
from ..weights import DTYPES, MATRICES, SCALE_ENDINGS, TensorPlace, tensor_places
from .files import find_files
from .mapping import NOT_READ, map_checkpoint, map_safetensors
from .sharding import SHARDED_DIMENSION, Shard, join, take

# how to go on where the tensors are others than they should be
_ONE_MODEL = "; take params and weights of one model, and all of its shards"


class Checkpoint(NamedTuple):
    """A model as it lies in its files: every tensor mapped and checked against the params, none of them read yet."""

    source: str  # the file, or the folder of several
    params: Params
    parts: dict[TensorPlace, list[Tensor]]  # one tensor each, or Meta's shards of it
    hf: bool  # whether the rows of wq and wk stand in Hugging Face's order
    scales: dict[TensorPlace, tuple[Tensor, ...]]  # of the rows and of the columns of those that are in int8
    mapped: bool = False  # whether the tensors are windows into files, which nobody has written to
    of_shard: bool = False  # whether there is more in the files, for other processes

    @property
    def tied(self) -> bool:
        """Whether `output` is `tok_embeddings`."""
        return all(place.field != "output" for place in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """What the first tensor is stored in, the embeddings, which are never quantised."""
        return next(iter(self.parts.values()))[0].dtype

    def must_change(self, place: TensorPlace) -> bool:
        """Whether a tensor is other than its file has it, so that it takes memory of its own."""
        parts = self.parts[place]
        is_joined = len(parts) > 1 and place.field in SHARDED_DIMENSION
        return is_joined or not parts[0].is_contiguous() or (self.hf and place.field in ("wq", "wk"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Maps the weight files of a folder and checks them against its params; reads no weights.

    Raises UserError where a file is missing or damaged, or a tensor is not what the params say.
    """
    params_file, weight_files = find_files(folder)
    params = Params.from_file(params_file)
    in_safetensors = weight_files[0].suffix == ".safetensors"
    found: dict[str, list[Tensor]] = {}
    for file in weight_files:
        for name, tensor in (map_safetensors if in_safetensors else map_checkpoint)(file).items():
            if in_safetensors and name in found:
                raise UserError(f"{file}: tensor {name} is in another file as well; keep the files of one model only")
            found.setdefault(name, []).append(tensor)
    # without an output matrix the embeddings are taken for it, unless the config knows better; params.json never says
    if (
        _is_hf(found)
        and "lm_head.weight" not in found
        and json.loads(params_file.read_bytes()).get("tie_word_embeddings") is False
    ):
        raise UserError(
            f"{folder}: tensor lm_head.weight is missing, and config.json does not tie it; download the rest"
        )
    source = str(weight_files[0] if len(weight_files) == 1 else folder)
    return check_tensors(source, params, found)._replace(mapped=True)


def first_layers(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The checkpoint without the layers behind the first so many. Raises UserError where it has no such number."""
    most = checkpoint.params.n_layers
    if not 1 <= layers <= most:
        raise UserError(
            f"{layers}: {checkpoint.source} has {most} layers; give a number from 1 to that", argument="layers"
        )
    return checkpoint._replace(
        params=replace(checkpoint.params, n_layers=layers),
        parts={place: parts for place, parts in checkpoint.parts.items() if (place.layer or 0) < layers},
    )


def shard_of(checkpoint: Checkpoint, shard: Shard) -> Checkpoint:
    """The checkpoint of the part that one of several processes holds; its params are those of the part.

    Raises UserError where the model cannot be split so.
    """
    params = shard.of_params(checkpoint.params)
    if shard.size == 1:
        return checkpoint
    parts, scales = {}, {}
    for place, whole in checkpoint.parts.items():
        dimension = SHARDED_DIMENSION.get(place.field)
        if dimension is None:
            parts[place] = whole
            continue
        wanted = shard.of_dimension(place.field, place.shape[dimension], checkpoint.params)
        shape = tuple(len(wanted) if i == dimension else length for i, length in enumerate(place.shape))
        own = place._replace(shape=shape)
        parts[own] = take(whole, dimension, wanted)
        if place in checkpoint.scales:
            scales[own] = tuple(
                scale[wanted.start : wanted.stop] if i == dimension else scale
                for i, scale in enumerate(checkpoint.scales[place])
            )
    return checkpoint._replace(params=params, parts=parts, scales=scales, of_shard=checkpoint.mapped)


def whole_tensor(checkpoint: Checkpoint, place: TensorPlace) -> Tensor:
    """A tensor as Meta has it in one file: shards joined, the rows of wq and wk in interleaved pairs."""
    parts = checkpoint.parts[place]
    dimension = SHARDED_DIMENSION.get(place.field)
    tensor = parts[0] if dimension is None else join(parts, dimension).contiguous()
    if checkpoint.hf and place.field in ("wq", "wk"):
        tensor = interleave_pairs(tensor, checkpoint.params.head_dim)
    if checkpoint.mapped and checkpoint.must_change(place):
        for part in parts:
            let_go(part)  # the copy is there instead
    return tensor


def _is_hf(names: Iterable[str]) -> bool:
    return any(name.startswith("model.") for name in names)


def check_tensors(source: str, params: Params, found: Mapping[str, list[Tensor]]) -> Checkpoint:
    """The tensors found under their names (several shards each, or one) -> Checkpoint.

    Raises UserError naming the first tensor that is too many, missing, or of another shape or dtype than it should be.
    """
    hf = _is_hf(found)
    in_int8 = {name for name, parts in found.items() if parts[0].dtype == torch.int8}
    scales = {name: [found.get(name + end, [None])[0] for end in SCALE_ENDINGS] for name in in_int8}
    beside = {name + end for name in in_int8 for end in SCALE_ENDINGS}
    found = {name: parts for name, parts in found.items() if name not in beside}
    tied = ("lm_head.weight" if hf else "output.weight") not in found
    wanted = {place.hf_name if hf else place.meta_name: place for place in tensor_places(params, tied)}
    for name in found:
        if name not in wanted:
            raise UserError(
                f"{source}: unexpected tensor {in_short(name)}; the params describe a model without it{_ONE_MODEL}"
            )
    for name, place in wanted.items():
        if name not in found:
            raise UserError(f"{source}: tensor {name} is missing; it should be {list(place.shape)}{_ONE_MODEL}")
        _check_tensor(source, name, place, found[name], scales.get(name))
    parts_of = {place: found[name] for name, place in wanted.items()}
    scales_of = {wanted[name]: tuple(scale for scale in scales[name] if scale is not None) for name in in_int8}
    return Checkpoint(source, params, parts_of, hf, scales_of)


def _check_tensor(
    source: str, name: str, place: TensorPlace, parts: Sequence[Tensor], scales: Sequence[Tensor | None] | None
) -> None:
    """Raise UserError unless the shards of a tensor, with its scales if it is in int8, are what they should be."""
    what = f"{source}: tensor {name}"
    shape = _joined_shape(place, parts)
    if shape != place.shape:
        has = list(shape) if shape else " and ".join(str(list(part.shape)) for part in parts)
        raise UserError(f"{what} is {has}, should be {list(place.shape)} by the params{_ONE_MODEL}")
    for scale, size in zip(scales or (), place.shape, strict=False):
        if scale is None or scale.shape != (size,) or scale.dtype != torch.float32 or place.field not in MATRICES:
            raise UserError(f"{what} is in int8, without the scales that belong to it{_ONE_MODEL}")
    for part in parts:
        if part.dtype not in (DTYPES.values() if scales is None else (torch.int8,)):
            raise UserError(f"{what} is {part.dtype}; {NOT_READ}")
    if place.field not in SHARDED_DIMENSION and any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise UserError(f"{source}: the shards differ in {name}; keep the shards of one model only")


def _joined_shape(place: TensorPlace, parts: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The shape of the tensor that the parts make together; None where they do not fit together."""
    if len(parts) == 1:
        return tuple(parts[0].shape)
    dimension = SHARDED_DIMENSION.get(place.field)
    if any(part.shape != parts[0].shape for part in parts) or (dimension is not None and parts[0].dim() != 2):
        return None
    shape = list(parts[0].shape)
    if dimension is not None:
        shape[dimension] *= len(parts)
    return tuple(shape)


def interleave_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """wq or wk [heads * head_dim, dim] as Hugging Face stores it -> as Meta does.

    Both rotate the same pairs; Hugging Face keeps the first halves of all pairs of a head before the second halves
    (permute in transformers' convert_llama_weights_to_hf.py; this is its inverse).
    """
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])  # [heads, 2, head_dim/2, dim]
    return halves.transpose(1, 2).reshape(weight.shape)


def split_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """wq or wk [heads * head_dim, dim] as Meta stores it -> as Hugging Face does: the inverse of `interleave_pairs`."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[-1])  # [heads, head_dim/2, 2, dim]
    return pairs.transpose(1, 2).reshape(weight.shape)
