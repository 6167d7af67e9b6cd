"""`Weights`: every tensor of a model in plain sight, mapped from Meta's checkpoint or a Hugging Face folder.

On the CPU nothing is read or copied at load time: each tensor is a window into the file, whose pages come in when they
are first used, may be dropped again, and are private, so a write to a weight never reaches the file.
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .errors import UserError, in_short
from .params import Params
from .quantization.int8 import Int8, quantize
from .quantization.matrix import Matrix, tensors_of
from .sharding import SHARDED_DIMENSION, Shard, join, take
from .system.files import read_beginning, read_small_file
from .system.madvise import let_go, read_exactly
from .tokenizer import Tokenizer
from .transfer import mover


class LayerWeights(NamedTuple):
    """The nine tensors of a layer, named as in Meta's checkpoint. A matrix is [out, in], a tensor unless quantised."""

    attention_norm: Tensor  # [dim]
    wq: Matrix  # [n_heads * head_dim, dim]; the rows of a head in interleaved pairs (0, 1), (2, 3), …
    wk: Matrix  # [n_kv_heads * head_dim, dim]; likewise
    wv: Matrix  # [n_kv_heads * head_dim, dim]
    wo: Matrix  # [dim, n_heads * head_dim]
    ffn_norm: Tensor  # [dim]
    w1: Matrix  # [hidden_dim, dim]; the gate of SwiGLU
    w2: Matrix  # [dim, hidden_dim]
    w3: Matrix  # [hidden_dim, dim]


class Weights(NamedTuple):
    """All tensors of a model. Where embeddings are tied, `output` is the tensor `tok_embeddings` itself."""

    tok_embeddings: Tensor  # [vocab_size, dim]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [dim]
    output: Matrix  # [vocab_size, dim]


class Model(NamedTuple):
    """What `load` gives: the numbers that define the model, its tensors, and its tokenizer if there was one."""

    params: Params
    weights: Weights
    tokenizer: Tokenizer | None


# what each tensor of a layer is called by Meta, behind "layers.N.", and by Hugging Face, behind "model.layers.N."
_LAYER_NAMES = {
    "attention_norm": ("attention_norm.weight", "input_layernorm.weight"),
    "wq": ("attention.wq.weight", "self_attn.q_proj.weight"),
    "wk": ("attention.wk.weight", "self_attn.k_proj.weight"),
    "wv": ("attention.wv.weight", "self_attn.v_proj.weight"),
    "wo": ("attention.wo.weight", "self_attn.o_proj.weight"),
    "ffn_norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "w1": ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
    "w2": ("feed_forward.w2.weight", "mlp.down_proj.weight"),
    "w3": ("feed_forward.w3.weight", "mlp.up_proj.weight"),
}
_TOP_NAMES = {
    "tok_embeddings": ("tok_embeddings.weight", "model.embed_tokens.weight"),
    "norm": ("norm.weight", "model.norm.weight"),
    "output": ("output.weight", "lm_head.weight"),
}
# tables that some checkpoints carry along and that are computed here instead
_IGNORED_ENDINGS = ("rope.freqs", "rotary_emb.inv_freq")

# the matrices, which are read for each token; a quantised one has its scales beside it, by these endings of its name
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")
_SCALES = (".row_scales", ".column_scales")

# how to go on where the tensors are others than they should be
_ONE_MODEL = "; take params and weights of one model, and all of its shards"
_NOT_READ = "only bfloat16, float16 and float32 are read; take the original, not quantised weights"

# what weights may be stored and computed in, by the names of safetensors
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def in_words(dtype: torch.dtype) -> str:
    """bfloat16, say."""
    return str(dtype).removeprefix("torch.")


class TensorPlace(NamedTuple):
    """A tensor that a model must have: where it goes and what it is called in a file."""

    layer: int | None  # None: a field of Weights itself
    field: str
    meta_name: str
    hf_name: str
    shape: tuple[int, ...]


def tensor_places(params: Params, tied: bool = False) -> Iterator[TensorPlace]:
    """Every tensor of a model with these params, in the order in which the forward pass uses them."""
    q_rows, kv_rows = params.n_heads * params.head_dim, params.n_kv_heads * params.head_dim
    dim, hidden_dim, vocab_size = params.dim, params.hidden_dim, params.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("attention_norm", "ffn_norm", "norm"), (dim,)),
        **dict.fromkeys(("tok_embeddings", "output"), (vocab_size, dim)),
        **{"wq": (q_rows, dim), "wk": (kv_rows, dim), "wv": (kv_rows, dim), "wo": (dim, q_rows)},
        **{"w1": (hidden_dim, dim), "w2": (dim, hidden_dim), "w3": (hidden_dim, dim)},
    }
    yield TensorPlace(None, "tok_embeddings", *_TOP_NAMES["tok_embeddings"], shapes["tok_embeddings"])
    for i in range(params.n_layers):
        for field, (meta_name, hf_name) in _LAYER_NAMES.items():
            yield TensorPlace(i, field, f"layers.{i}.{meta_name}", f"model.layers.{i}.{hf_name}", shapes[field])
    for field in ("norm",) if tied else ("norm", "output"):
        yield TensorPlace(None, field, *_TOP_NAMES[field], shapes[field])


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


def from_state_dict(params: Params, tensors: Mapping[str, Tensor]) -> Weights:
    """Tensors by Meta's names -> Weights, checked against `params`. Raises UserError naming a tensor that is wrong."""
    found = {name: [tensor] for name, tensor in tensors.items()}
    return build_weights(_checked("the state dict", params, found))


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
    endings = ("", *_SCALES) if isinstance(matrix, Int8) else ("",)
    return {name + ending: tensor for ending, tensor in zip(endings, tensors_of(matrix), strict=True)}


def load(
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
        that; `forward` and `trace` are to be given `generation.ops_for(weights)`. None: all of the model goes there.
    shard: the part that one of several processes is to hold, of which alone the bytes are read; the params stay those
        of the whole model. The operations are to be those of `parallel.parallel_ops`.

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
    return Model(params, weights, None if tokenizer is False else find_tokenizer(folder, tokenizer, params))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Maps the weight files of a folder and checks them against its params; reads no weights.

    Raises UserError where a file is missing or damaged, or a tensor is not what the params say.
    """
    params_file, weight_files = find_files(folder)
    params = Params.from_file(params_file)
    in_safetensors = weight_files[0].suffix == ".safetensors"
    found: dict[str, list[Tensor]] = {}
    for file in weight_files:
        for name, tensor in (_map_safetensors if in_safetensors else _map_checkpoint)(file).items():
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
    return _checked(source, params, found)._replace(mapped=True)


def first_layers(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The checkpoint without the layers behind the first so many. Raises UserError where it has no such number."""
    most = checkpoint.params.n_layers
    if not 1 <= layers <= most:
        raise UserError(f"--layers {layers}: {checkpoint.source} has {most} layers; give a number from 1 to that")
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


def check_gpu_layers(gpu_layers: int | None, device: torch.device, params: Params) -> None:
    """Raises UserError where --gpu-layers is given, but for another device than a CUDA GPU, or for other layers."""
    if gpu_layers is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"--gpu-layers {gpu_layers}: shares a model between a CUDA GPU and the CPU, but the device is {device}; "
            "leave it out, or give --device cuda"
        )
    if not 1 <= gpu_layers <= params.n_layers:
        raise UserError(f"--gpu-layers {gpu_layers}: {params.n_layers} layers are run; give a number from 1 to that")


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


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The params file and the weight files of a model folder. Raises UserError where they are not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    for place in (folder, folder / "original"):
        checkpoints = sorted(place.glob("consolidated.[0-9][0-9].pth"))
        if checkpoints and (place / "params.json").exists():
            for number, file in enumerate(checkpoints):
                if file.name != f"consolidated.{number:02}.pth":
                    raise UserError(
                        f"{place}: consolidated.{number:02}.pth is missing, but {file.name} is there; download the rest"
                    )
            return place / "params.json", checkpoints
    quantized = sorted(folder.glob("int8.*.safetensors"))
    if quantized and (folder / "params.json").exists():
        return folder / "params.json", quantized
    shards = sorted(folder.glob("*.safetensors"))
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    if config.exists() and index.exists():
        try:
            named = set(json.loads(read_small_file(index))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{index}: not a safetensors index ({in_short(repr(error))}); download it again") from error
        for name in sorted(named - {shard.name for shard in shards}, key=str):
            raise UserError(f"{index}: names {in_short(name)}, which is no *.safetensors in its folder; download it")
        shards = [shard for shard in shards if shard.name in named]
    if config.exists() and shards:
        return config, shards
    for part in folder.glob("*.part"):
        raise UserError(f"{part}: the download is not complete; run python -m llama3_raw.download again to go on")
    raise UserError(
        f"{folder}: no model here; it should hold params.json and consolidated.00.pth (Meta's files, also in a folder "
        "original/), or config.json and *.safetensors (Hugging Face's)"
    )


def find_tokenizer(folder: Path, given: str | Path | None, params: Params) -> Tokenizer | None:
    """The tokenizer `given`, else that of the folder, else None. Raises UserError where it does not fit the params."""
    candidates = [Path(given)] if given else [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]
    for file in candidates:
        if given or file.exists():
            tokenizer = Tokenizer(file)
            if tokenizer.n_words != params.vocab_size:
                raise UserError(
                    f"{file}: has {tokenizer.n_words} tokens, but the model has {params.vocab_size}; "
                    "give the one that belongs to it with --tokenizer"
                )
            return tokenizer
    return None


def _map_file(file: Path) -> mmap.mmap:
    """The file as memory: writes stay private, and no swap is reserved, so that it may be larger than the RAM."""
    try:
        with open(file, "rb") as opened:
            if sys.platform == "win32":
                return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in Python from 3.13
            flags, protection = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(opened.fileno(), 0, flags=flags, prot=protection)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be mapped ({error.strerror}); is there a limit on memory, by ulimit -v say?"
        ) from error


def _map_checkpoint(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of a file that torch.save wrote. Only plain tensors are unpickled; nothing in the file can run."""
    if not read_beginning(file).startswith(b"PK"):
        raise UserError(f"{file}: not a checkpoint of torch.save (not a zip file); download it again")
    memory = _map_file(file)
    try:
        records = _check_records(file, memory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has remarks on odd pickles, which are none of the user's making
            # the structure alone; each storage remembers where in the file its bytes are
            structure = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        content = f"{code[1]}, which could run code, " if code else "something other than plain tensors "
        raise UserError(f"{file}: holds {content}and is refused; download it from a source that you trust") from error
    except Exception as error:  # on damaged bytes zipfile and torch raise nearly every kind there is
        raise UserError(f"{file}: damaged or cut short ({in_short(error)}); download it again") from error
    if not isinstance(structure, dict):
        kind = type(structure).__name__
        raise UserError(f"{file}: should hold a dictionary of tensors, holds a {kind}; download it again")
    tensors = {}
    for name, tensor in structure.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{file}: {name!r} should be a name with a plain tensor, is a {what}; download it again")
        if name.endswith(_IGNORED_ENDINGS):
            continue
        if not tensor.numel():
            raise UserError(f"{file}: {name} is empty; download the file again")
        try:
            storage = tensor.untyped_storage()
            offset, count = storage._checkpoint_offset, storage.nbytes() // tensor.dtype.itemsize
            if offset is None or records.get(offset) != storage.nbytes():
                raise ValueError("its bytes are not where they should be")
            whole = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=offset)
            tensors[name] = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{file}: tensor {name} is damaged ({in_short(error)}); download it again") from error
    return tensors


def _check_records(file: Path, memory: mmap.mmap) -> dict[int, int]:
    """Where the records of a zip file begin -> how many bytes each has. Raises ValueError where that cannot be.

    torch believes the directory, and checks no checksum: with a bit of it turned, other bytes would be the weights.
    So each record should have the name before it and its end behind it; the data of the tensors is not read.
    """
    records = {}
    with zipfile.ZipFile(file) as archive:
        directory = archive.infolist()
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_RANDOM)  # or each record's few bytes would bring megabytes around them
    for entry in directory:
        name_length, extra_length = struct.unpack_from("<26xHH", memory, entry.header_offset)
        name_begin = entry.header_offset + 30
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        begin = name_begin + name_length + extra_length
        end = begin + entry.file_size
        # every piece of a zip file begins with PK
        if memory[name_begin : name_begin + name_length] != name or memory[end : end + 2] != b"PK":
            raise ValueError(f"the zip directory is wrong about {entry.filename}")
        records[begin] = entry.file_size
        if "/data/" in entry.filename:
            continue
        content = memory[begin:end]
        if entry.CRC and zlib.crc32(content) != entry.CRC:  # 0: saved without checksums
            raise ValueError(f"the checksum of {entry.filename} is wrong")
        if entry.filename.endswith("/byteorder") and content != sys.byteorder.encode():  # which torch dies of
            raise ValueError(f"its byte order is {content!r}, this machine's is {sys.byteorder}")
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_NORMAL)
    return records


def _map_safetensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file."""
    read_beginning(file)
    try:
        with safe_open(file, framework="np"):  # checks the header and the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({in_short(error)}); download it again") from error
    memory = _map_file(file)
    header_end = 8 + int.from_bytes(memory[:8], "little")
    header = json.loads(memory[8:header_end])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        has_scales = all(name + ending in header for ending in _SCALES)
        dtype = torch.int8 if entry["dtype"] == "I8" and has_scales else DTYPES.get(entry["dtype"])
        begin, end = entry["data_offsets"]
        if name.endswith(_IGNORED_ENDINGS):
            continue
        if dtype is None or begin == end:
            raise UserError(f"{file}: tensor {name} is {entry['shape']} {entry['dtype']}; {_NOT_READ}")
        flat = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=header_end + begin)
        tensors[name] = flat.view(entry["shape"])
    return tensors


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
    source, params, all_parts, hf, scales, *_ = checkpoint
    if dtype is None:
        common = checkpoint.dtype
        for place, parts in all_parts.items():
            for other in {part.dtype for part in parts if place not in scales} - {common}:
                name = place.hf_name if hf else place.meta_name
                raise UserError(
                    f"{source}: tensor {name} is {other}, should be {common} like the rest; --dtype makes them all one"
                )
    total = sum(part.nbytes for parts in all_parts.values() for part in parts)
    top: dict[str, Any] = {}
    by_layer: list[dict[str, Any]] = [{} for _ in range(params.n_layers)]
    largest = max(part.nbytes for parts in all_parts.values() for part in parts)
    cpu = torch.device("cpu")
    with (
        mover(device, largest) as to_device,
        tqdm(
            total=total, unit="B", unit_scale=True, desc=f"loading {source}", disable=not progress, leave=False
        ) as bar,
    ):
        for place, parts in all_parts.items():
            home, move = (device, to_device) if goes_to_gpu(place, checkpoint.tied, gpu_layers) else (cpu, _stay)
            # of which a prompt uses but a few rows
            rows_only = place.field == "tok_embeddings" and (quantized or not checkpoint.tied)
            if checkpoint.of_shard and not rows_only:
                for part in parts:
                    read_exactly(part)
            try:
                moved = move(whole_tensor(checkpoint, place), None if place in scales else dtype)
                matrix: Matrix = moved
                if place in scales:
                    matrix = Int8(moved, *(move(scale, None) for scale in scales[place]))
                elif quantized and place.field in MATRICES:
                    matrix = quantize(moved)
            except RuntimeError as error:  # torch's only word for memory that the CPU does not have
                raise UserError(
                    f"{source}: {total / 1e9:.1f} GB of weights do not fit on {home}, from {place.meta_name} on; "
                    f"{'give' if home.type == 'cpu' else 'use --device cpu, or'} fewer --layers"
                ) from error
            if progress and tensors_of(matrix)[0] is parts[0] and moved.is_contiguous() and not rows_only:
                _touch(moved, bar)
            else:
                bar.update(sum(part.nbytes for part in parts))
            (top if place.layer is None else by_layer[place.layer])[place.field] = matrix
    if checkpoint.tied:
        top["output"] = quantize(top["tok_embeddings"]) if quantized else top["tok_embeddings"]
    return Weights(
        tok_embeddings=top["tok_embeddings"],
        layers=tuple(LayerWeights(**fields) for fields in by_layer),
        norm=top["norm"],
        output=top["output"],
    )


def _stay(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor on the CPU, as it is or in another dtype."""
    return tensor if dtype is None else tensor.to(dtype)


def devices_of(weights: Weights) -> set[torch.device]:
    """Where the tensors lie: on one device, or, with `gpu_layers`, on two."""
    matrices = [weights.tok_embeddings, weights.output, *(matrix for layer in weights.layers for matrix in layer)]
    return {tensor.device for matrix in matrices for tensor in tensors_of(matrix)} | {weights.norm.device}


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


def _checked(source: str, params: Params, found: Mapping[str, list[Tensor]]) -> Checkpoint:
    """The tensors found under their names (several shards each, or one) -> Checkpoint.

    Raises UserError naming the first tensor that is too many, missing, or of another shape or dtype than it should be.
    """
    hf = _is_hf(found)
    in_int8 = {name for name, parts in found.items() if parts[0].dtype == torch.int8}
    scales = {name: [found.get(name + end, [None])[0] for end in _SCALES] for name in in_int8}
    beside = {name + end for name in in_int8 for end in _SCALES}
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
        parts = found[name]
        shape = _joined_shape(place, parts)
        if shape != place.shape:
            has = list(shape) if shape else " and ".join(str(list(part.shape)) for part in parts)
            raise UserError(
                f"{source}: tensor {name} is {has}, should be {list(place.shape)} by the params{_ONE_MODEL}"
            )
        for scale, size in zip(scales.get(name, ()), place.shape, strict=False):
            if scale is None or scale.shape != (size,) or scale.dtype != torch.float32 or place.field not in MATRICES:
                raise UserError(f"{source}: tensor {name} is in int8, without the scales that belong to it{_ONE_MODEL}")
        for part in parts:
            if part.dtype not in ((torch.int8,) if name in in_int8 else DTYPES.values()):
                raise UserError(f"{source}: tensor {name} is {part.dtype}; {_NOT_READ}")
        if place.field not in SHARDED_DIMENSION and any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise UserError(f"{source}: the shards differ in {name}; keep the shards of one model only")
    parts_of = {place: found[name] for name, place in wanted.items()}
    scales_of = {wanted[name]: tuple(scale for scale in scales[name] if scale is not None) for name in in_int8}
    return Checkpoint(source, params, parts_of, hf, scales_of)


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


def _touch(tensor: Tensor, bar: tqdm[None], chunk: int = 1 << 26, page: int = 4096) -> None:
    """Looks at one byte of every page, so that the system reads them in now."""
    for piece in tensor.view(-1).view(torch.uint8).split(chunk):
        piece[::page].sum()
        bar.update(piece.numel())
