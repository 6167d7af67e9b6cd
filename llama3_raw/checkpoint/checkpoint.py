"""`Checkpoint`: the tensors of a model's files, mapped and checked, but not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..params import Params
from ..quantization.blocks import BlockType
from ..system.files import read_json
from ..system.madvise import drop_pages
from ..weights import DTYPES, MATRICES, SCALE_ENDINGS, TensorSpec, tensor_specs
from .files import FileFormat, find_models, stop_ids_of
from .gguf_reading import GgufFile, is_gguf, read_gguf
from .gguf_vocabulary import stop_ids_in
from .lora import LowRank, merged, read_adapter
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
    blocks: Mapping[TensorSpec, BlockType] = MappingProxyType({})  # of matrices in GGML's blocks, in rows of uint8
    adapter: Mapping[TensorSpec, LowRank] = MappingProxyType({})  # what is added to a matrix when it is loaded
    stop_ids: frozenset[int] | None = None  # the tokens that end a text; None: the files do not say
    metadata: Mapping[str, Any] = MappingProxyType({})  # of a GGUF file
    folder: Path = Path()  # what `open_checkpoint` was given
    params_file: Path = Path()  # params.json, config.json or a GGUF file
    first_file: Path = Path()  # of the weights, in the folder
    others: tuple[Path, ...] = ()  # first weight files of other models in the folder

    @property
    def choice(self) -> str | None:
        """Which of several models in the folder this is, as text; None if there is only one."""
        return f"{self.first_file}, not {' or '.join(map(str, self.others))}" if self.others else None

    @property
    def tied(self) -> bool:
        """Whether `output` is `tok_embeddings`."""
        return all(spec.field != "output" for spec in self.shards)

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are in int8 or in blocks."""
        return bool(self.scales or self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in: the stored one of most matrices of the layers; of blocks it is bfloat16.

        In an int8 model it is that of the embeddings.
        """
        in_layers = Counter(
            torch.bfloat16 if spec in self.blocks else shards[0].dtype
            for spec, shards in self.shards.items()
            if spec.layer is not None and spec.field in MATRICES and spec not in self.scales
        )
        return next((dtype for dtype, _ in in_layers.most_common(1)), next(iter(self.shards.values()))[0].dtype)

    def needs_copy(self, spec: TensorSpec) -> bool:
        """Whether a tensor differs from its bytes in the file, so that it needs its own memory."""
        shards = self.shards[spec]
        is_joined = len(shards) > 1 and spec.field in SHARDED_DIMENSION
        return (
            spec in self.adapter
            or is_joined
            or not shards[0].is_contiguous()
            or (self.hf and spec.field in ("wq", "wk"))
        )


def open_checkpoint(path: Path, file_format: FileFormat | None = None) -> Checkpoint:
    """Map the weights of a folder or a GGUF file and check them against its params, without reading them.

    file_format: as in `find_models`. Raises UserError if a file is missing or damaged, or if a tensor does not match
    the params.
    """
    (params_file, weight_files), *others = find_models(path, file_format)
    if is_gguf(params_file):
        return _from_gguf(read_gguf(params_file))._replace(folder=path)
    params = Params.from_file(params_file)
    by_name = _map_files(weight_files, are_shards=params_file.name == "params.json")
    is_hf = _is_hf(by_name)
    # without an output matrix the embeddings are used for it, if config.json says so; params.json never does
    if is_hf and "lm_head.weight" not in by_name and not read_json(params_file).get("tie_word_embeddings"):
        raise UserError(
            f"{path}: tensor lm_head.weight is missing, and {params_file.name} does not tie it; download the rest"
        )
    source = str(weight_files[0] if len(weight_files) == 1 else path)
    return check_tensors(source, params, by_name)._replace(
        mapped=True,
        stop_ids=stop_ids_of(path),
        folder=path,
        params_file=params_file,
        first_file=weight_files[0].relative_to(path),
        others=tuple(files[0].relative_to(path) for _, files in others),
    )


def _from_gguf(gguf: GgufFile) -> Checkpoint:
    """Return the checkpoint of a GGUF file, whose matrices stay in blocks."""
    specs = list(tensor_specs(gguf.params, gguf.tied))
    return Checkpoint(
        source=str(gguf.file),
        params=gguf.params,
        shards={spec: [gguf.tensors[spec.meta_name]] for spec in specs},
        hf=False,
        scales={},
        mapped=True,
        blocks={spec: gguf.kinds[spec.meta_name] for spec in specs if spec.meta_name in gguf.kinds},
        stop_ids=stop_ids_in(gguf.metadata),
        metadata=gguf.metadata,
        params_file=gguf.file,
    )


def _map_files(files: Sequence[Path], are_shards: bool) -> dict[str, list[Tensor]]:
    """Map weight files: name -> its tensors. are_shards: whether a tensor may be in several files, as Meta's are."""
    by_name: dict[str, list[Tensor]] = {}
    for file in files:
        in_safetensors = file.suffix == ".safetensors"
        for name, tensor in (map_safetensors if in_safetensors else map_checkpoint)(file).items():
            if name in by_name and (in_safetensors or not are_shards):
                raise UserError(f"{file}: tensor {name} is in another file as well; keep the files of one model only")
            by_name.setdefault(name, []).append(tensor)
    renamed = common_names(by_name)
    return {renamed[name]: tensors for name, tensors in by_name.items()}


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return the checkpoint with a LoRA adapter of PEFT, which is merged into each matrix when it is loaded.

    Raises UserError if the adapter does not fit, and for weights that are quantized.
    """
    adapter = read_adapter(folder, {spec.hf_name: spec for spec in checkpoint.shards})
    shards, changes = dict(checkpoint.shards), dict(adapter.changes)
    for spec, tensor in adapter.replaced.items():
        is_tied = checkpoint.tied and adapter.replaces_modules and spec.field == "tok_embeddings"
        if spec.field not in ("tok_embeddings", "norm", "output") or is_tied:
            raise UserError(
                f"{folder}: replaces {spec.hf_name}, which is not supported; merge it with PEFT's merge_and_unload"
            )
        shards[spec] = [tensor]
    embeddings = next(iter(shards.values()))[0]
    if adapter.output is not None and not torch.equal(adapter.output, embeddings):
        raise UserError(
            f"{folder}: replaces lm_head, which the model ties to the embeddings; merge it with PEFT's merge_and_unload"
        )
    for spec, change in adapter.changes.items():
        if spec in checkpoint.scales or spec in checkpoint.blocks:
            raise UserError(
                f"{checkpoint.source}: is quantized, which an adapter cannot be added to; give the original"
            )
        if spec.field in ("wq", "wk"):
            changes[spec] = change._replace(b=interleave_pairs(change.b, checkpoint.params.head_dim))
    return checkpoint._replace(shards=shards, adapter=changes)


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
    if checkpoint.blocks:
        raise UserError(f"{checkpoint.source}: is quantized, and only one process can run it; use the original weights")
    slices, scales, adapter = {}, {}, {}
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
        if spec in checkpoint.adapter:
            adapter[new_spec] = checkpoint.adapter[spec].part(dimension, wanted)
    return checkpoint._replace(params=params, shards=slices, scales=scales, adapter=adapter, of_shard=checkpoint.mapped)


def whole_tensor(checkpoint: Checkpoint, spec: TensorSpec) -> Tensor:
    """Return a tensor as in Meta's unsharded format: shards joined, the rows of wq and wk in interleaved pairs."""
    shards = checkpoint.shards[spec]
    dimension = SHARDED_DIMENSION.get(spec.field)
    tensor = shards[0] if dimension is None else join(shards, dimension).contiguous()
    if checkpoint.hf and spec.field in ("wq", "wk"):
        tensor = interleave_pairs(tensor, checkpoint.params.head_dim)
    if spec in checkpoint.adapter:
        tensor = merged(tensor, checkpoint.adapter[spec])
    if checkpoint.mapped and checkpoint.needs_copy(spec):
        for shard in shards:
            drop_pages(shard)  # only the copy is used from now on
    return tensor


def _is_hf(names: Iterable[str]) -> bool:
    return any(name.startswith("model.") for name in names)


def common_names(names: Iterable[str]) -> dict[str, str]:
    """Return {name: Meta's or Hugging Face's name} of tensors that may share a prefix.

    torch.compile leaves "_orig_mod.", DistributedDataParallel "module.", PEFT "base_model.model."; the names of a
    LlamaModel alone have no "model.". A name outside the prefix stays as it is.
    """
    prefixes: dict[str, str] = {}  # and what replaces them
    for name in names:
        if f".{name}".endswith(".tok_embeddings.weight"):
            prefixes = {name.removesuffix("tok_embeddings.weight"): ""}
        elif f".{name}".endswith(".embed_tokens.weight"):
            body = name.removesuffix("embed_tokens.weight")
            prefixes = {body.removesuffix("model.") + "lm_head.": "lm_head.", body: "model."}
    renamed = {}
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        renamed[name] = name if prefix is None else prefixes[prefix] + name[len(prefix) :]
    return renamed


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
