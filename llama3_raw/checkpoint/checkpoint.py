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
from ..quantization.int4 import Int4
from ..quantization.int8 import Int8
from ..quantization.matrix import FORMATS, stored_names
from ..system.files import read_json
from ..system.madvise import drop_pages
from ..weights import DTYPES, MATRICES, TensorSpec, format_of, tensor_specs
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
    shards: dict[TensorSpec, list[Tensor]]  # the whole tensor, Meta's shards of it, or those of a quantized matrix
    hf: bool  # whether the rows of wq and wk are in Hugging Face's order
    formats: Mapping[TensorSpec, str] = MappingProxyType({})  # of matrices in int8 or int4
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
        """Whether matrices are in int8, in int4 or in blocks."""
        return bool(self.formats or self.blocks)

    @property
    def format(self) -> str | None:
        """The format of the layers' matrices, if they are in int8 or int4."""
        return next(iter(self.formats.values()), None)  # `output` is the last

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in: the stored one of most matrices of the layers; of blocks it is bfloat16.

        In an int8 or int4 model it is that of the embeddings.
        """
        in_layers = Counter(
            torch.bfloat16 if spec in self.blocks else shards[0].dtype
            for spec, shards in self.shards.items()
            if spec.layer is not None and spec.field in MATRICES and spec not in self.formats
        )
        return next((dtype for dtype, _ in in_layers.most_common(1)), next(iter(self.shards.values()))[0].dtype)

    def needs_copy(self, spec: TensorSpec) -> bool:
        """Whether a tensor differs from its bytes in the file, so that it needs its own memory."""
        shards = self.shards[spec]
        is_joined = len(shards) > 1 and spec.field in SHARDED_DIMENSION and spec not in self.formats
        return (
            spec in self.adapter
            or is_joined
            or not all(shard.is_contiguous() for shard in shards)
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
        if spec in checkpoint.formats or spec in checkpoint.blocks:
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
    slices, formats, adapter = {}, {}, {}
    for spec, whole in checkpoint.shards.items():
        dimension = SHARDED_DIMENSION.get(spec.field)
        if dimension is None:
            slices[spec] = whole
            continue
        wanted = shard.of_dimension(spec.field, spec.shape[dimension], checkpoint.params)
        shape = tuple(len(wanted) if i == dimension else length for i, length in enumerate(spec.shape))
        new_spec = spec._replace(shape=shape)
        if spec in checkpoint.formats:
            formats[new_spec] = checkpoint.formats[spec]
            slices[new_spec] = _part_of_quantized(checkpoint, spec, dimension, wanted)
        else:
            slices[new_spec] = take(whole, dimension, wanted)
        if spec in checkpoint.adapter:
            adapter[new_spec] = checkpoint.adapter[spec].part(dimension, wanted)
    return checkpoint._replace(
        params=params, shards=slices, formats=formats, adapter=adapter, of_shard=checkpoint.mapped
    )


def _part_of_quantized(checkpoint: Checkpoint, spec: TensorSpec, dimension: int, wanted: range) -> list[Tensor]:
    """Return the tensors of some rows or columns of a quantized matrix. Raises UserError if a group would be split."""
    name = checkpoint.formats[spec]
    matrix = FORMATS[name](*checkpoint.shards[spec])
    unit, length = matrix.units()[dimension], spec.shape[dimension]
    if wanted.start % unit or (wanted.stop % unit and wanted.stop != length):
        raise UserError(
            f"{checkpoint.source}: tensor {spec.meta_name} cannot be split among these processes: {name} has "
            f"{'columns' if dimension else 'rows'} in groups of {unit}, and theirs are {len(wanted)} of {length}; use "
            "fewer processes, or --save-quantized FOLDER --quantize int8"
        )
    return list(matrix.part(dimension, wanted))


def check_quantize(checkpoint: Checkpoint, quantize: str | None) -> None:
    """Raise UserError unless the matrices of a checkpoint can be rounded to the format of this name. None: to none."""
    if quantize is None:
        return
    if quantize not in FORMATS:
        raise UserError(f"should be {' or '.join(FORMATS)}, is {in_short(quantize)}", argument="quantize")
    if checkpoint.is_quantized:
        raise UserError(
            f"{quantize}: {checkpoint.source} is quantized already; leave it out, or give the original weights",
            argument="quantize",
        )
    for spec in checkpoint.shards:
        name = format_of(spec.field, quantize)
        if name and spec.shape[1] % FORMATS[name].units()[1]:
            unit, full_name = FORMATS[name].units()[1], spec.hf_name if checkpoint.hf else spec.meta_name
            raise UserError(
                f"{quantize}: {checkpoint.source}: tensor {full_name} is {list(spec.shape)}, and {name} needs inputs "
                f"in groups of {unit}; use int8 instead",
                argument="quantize",
            )


def whole_tensor(checkpoint: Checkpoint, spec: TensorSpec) -> Tensor:
    """Return a tensor as in Meta's unsharded format: shards joined, the rows of wq and wk in interleaved pairs.

    Not for a matrix in int8 or int4, see `whole_quantized`.
    """
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


def whole_quantized(checkpoint: Checkpoint, spec: TensorSpec) -> Int8 | Int4:
    """Return a matrix that is stored in int8 or int4. What is not contiguous in the file, columns, is copied."""
    stored = checkpoint.shards[spec]
    tensors = [tensor.contiguous() for tensor in stored]
    for tensor, its_copy in zip(stored, tensors, strict=True):
        if checkpoint.mapped and its_copy is not tensor:
            drop_pages(tensor)
    return FORMATS[checkpoint.formats[spec]](*tensors)


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
    tied = ("lm_head.weight" if hf else "output.weight") not in by_name
    wanted = {spec.hf_name if hf else spec.meta_name: spec for spec in tensor_specs(params, tied)}
    formats = {} if hf else _stored_formats(wanted, by_name)
    of_matrices = {part for name, format_name in formats.items() for part in stored_names(name, format_name)}
    for name in by_name:
        if name not in wanted and name not in of_matrices:
            raise UserError(
                f"{source}: unexpected tensor {in_short(name)}; the params describe a model without it{_ONE_MODEL}"
            )
    for name, spec in wanted.items():
        if name not in by_name:
            raise UserError(f"{source}: tensor {name} is missing; it should be {list(spec.shape)}{_ONE_MODEL}")
        if name in formats:
            _check_quantized(source, spec, formats[name], by_name)
        else:
            _check_tensor(source, name, spec, by_name[name])
    shards_of = {
        spec: [tensor for part in stored_names(name, formats[name]) for tensor in by_name[part]]
        if name in formats
        else by_name[name]
        for name, spec in wanted.items()
    }
    return Checkpoint(
        source, params, shards_of, hf, {wanted[name]: formats[name] for name in wanted if name in formats}
    )


def _stored_formats(names: Iterable[str], by_name: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Return the names of the formats of matrices, by the dtypes of their values; those of plain tensors have none."""
    dtypes = {kind.meta(kind.units()).values.dtype: format_name for format_name, kind in FORMATS.items()}
    return {
        name: dtypes[by_name[name][0].dtype] for name in names if name in by_name and by_name[name][0].dtype in dtypes
    }


def _check_quantized(source: str, spec: TensorSpec, format_name: str, by_name: Mapping[str, list[Tensor]]) -> None:
    """Raise UserError unless the tensors of a matrix in int8 or int4 are those that the spec needs."""
    what = f"{source}: tensor {spec.meta_name} is in {format_name}"
    kind = FORMATS[format_name]
    if spec.field not in MATRICES or spec.shape[1] % kind.units()[1]:
        raise UserError(f"{what}, which its {list(spec.shape)} values cannot be{_ONE_MODEL}")
    for name, wanted in zip(stored_names(spec.meta_name, format_name), kind.meta(spec.shape), strict=True):
        stored = by_name.get(name, [])
        if len(stored) != 1 or stored[0].dtype != wanted.dtype:
            raise UserError(f"{what}, without the scales that belong to it{_ONE_MODEL}")
        if stored[0].shape != wanted.shape:
            actual = list(stored[0].shape)
            raise UserError(
                f"{source}: tensor {name} is {actual}, should be {list(wanted.shape)} by the params{_ONE_MODEL}"
            )


def _check_tensor(source: str, name: str, spec: TensorSpec, shards: Sequence[Tensor]) -> None:
    """Raise UserError unless the shards of a tensor match the spec."""
    what = f"{source}: tensor {name}"
    shape = _joined_shape(spec, shards)
    if shape != spec.shape:
        actual = list(shape) if shape else " and ".join(str(list(shard.shape)) for shard in shards)
        raise UserError(f"{what} is {actual}, should be {list(spec.shape)} by the params{_ONE_MODEL}")
    for shard in shards:
        if shard.dtype not in DTYPES.values():
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
