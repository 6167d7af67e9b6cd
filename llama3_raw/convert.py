"""python -m llama3_raw.convert SOURCE FOLDER: convert a model to another format, or another number of Meta's shards.

A few rows are converted at a time, so the model may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint.checkpoint import Checkpoint, interleave_pairs, open_checkpoint, split_pairs
from .checkpoint.files import find_files, find_tokenizer
from .checkpoint.sharding import SHARDED_DIMENSION, join, take
from .checkpoint.writing import write_at, write_empty_checkpoint, write_empty_safetensors
from .cli.entry_point import ArgumentParser, command_line_tool, not_empty
from .cli.models import find_model
from .cli.options import positive_int
from .errors import UserError
from .params import Params
from .system.files import atomic_folder
from .system.machine import set_threads
from .weights import TensorSpec, dtype_name

Format = Literal["meta", "hf"]

_MAX_SHARDS = 100  # numbered from 00 to 99
LARGEST_FILE = 5_000_000_000  # bytes of tensors in one safetensors file, unless a single tensor is larger
CHUNK = 1 << 22  # bytes of a tensor in memory at once
# files in Hugging Face's folders besides config and weights
_HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Block(NamedTuple):
    """The rows and columns of a tensor that go into one file. A norm is a single column."""

    spec: TensorSpec
    dtype: torch.dtype
    rows: range
    columns: range

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return len(self.rows) * len(self.columns) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """Return the tensor of the file on the meta device, without values."""
        shape = (len(self.rows), len(self.columns))[: len(self.spec.shape)]
        return torch.empty(shape, dtype=self.dtype, device="meta")


Blocks = dict[str, Block]  # by tensor name


class File(NamedTuple):
    """A file being written."""

    opened: BinaryIO
    offsets: dict[str, int]  # of each tensor's first byte
    blocks: Blocks


def convert(
    source: Path, checkpoint: Checkpoint, folder: Path, to: Format, shards: int = 1, progress: bool = False
) -> None:
    """Write the checkpoint of the model folder `source` to a new `folder`, with all values unchanged.

    shards: the number of Meta's files. tokenizer.model is copied too, and for Hugging Face's format the files that
    belong to it. The folder gets its name when all files are complete. progress: show a bar on stderr. Raises UserError
    if the folder exists and is not empty, if it cannot be written, and if the format or the number of shards does not
    fit the model.
    """
    layout = _hf_files(checkpoint) if to == "hf" else _meta_files(checkpoint, shards)
    json_files = _hf_json(source, checkpoint, layout) if to == "hf" else _meta_json(source, checkpoint)
    write_empty = write_empty_safetensors if to == "hf" else write_empty_checkpoint
    n_bytes = sum(block.nbytes for blocks in layout.values() for block in blocks.values())
    with atomic_folder(folder, n_bytes) as unfinished, contextlib.ExitStack() as stack:
        for name, text in json_files.items():
            (unfinished / name).write_text(text)
        for file_to_copy in _files_to_copy(source, to):
            shutil.copyfile(file_to_copy, unfinished / file_to_copy.name)
        files = []
        for name, blocks in layout.items():
            offsets = write_empty(unfinished / name, {tensor: block.empty() for tensor, block in blocks.items()})
            files.append(File(stack.enter_context(open(unfinished / name, "r+b")), offsets, blocks))
        bar = stack.enter_context(_bar(f"writing {folder}", n_bytes, progress))
        for spec in checkpoint.shards:
            for first, rows in _rows(checkpoint, spec, to):
                for file in files:
                    bar.update(_write(file, _name(spec, to), first, rows))


def _write(file: File, name: str, first: int, rows: Tensor) -> int:
    """Write to a file what it holds of some rows of a tensor, from row `first` on. Return the number of bytes."""
    if name not in file.blocks:
        return 0
    block = file.blocks[name]
    begin, end = max(first, block.rows.start), min(first + len(rows), block.rows.stop)
    if begin >= end:
        return 0
    values = rows[begin - first : end - first, block.columns.start : block.columns.stop]
    before = (begin - block.rows.start) * len(block.columns) * values.itemsize
    write_at(file.opened, file.offsets[name] + before, values)
    return values.nbytes


def verify(checkpoint: Checkpoint, copy: Checkpoint, progress: bool = False) -> int:
    """Compare every tensor of a copy with the original, bit by bit in Meta's layout. Return the number of tensors.

    progress: show a bar on stderr. Raises UserError naming the first difference: a param, a dtype or a row of a tensor.
    """
    way_out = f"; it is not a copy of {checkpoint.source}, remove it and convert that again"
    for field in fields(Params):
        actual, expected = getattr(copy.params, field.name), getattr(checkpoint.params, field.name)
        if actual != expected:
            raise UserError(f"{copy.source}: {field.name} is {actual}, not {expected}{way_out}")
    if copy.tied != checkpoint.tied:
        raise UserError(f"{copy.source}: only one of the two has a separate output matrix{way_out}")
    n_bytes = sum(_whole(checkpoint, spec).nbytes for spec in checkpoint.shards)
    with _bar(f"comparing {copy.source}", n_bytes, progress) as bar:
        for spec, shards in checkpoint.shards.items():
            name = _name(spec, _format(copy))
            stored, wanted = dtype_name(copy.shards[spec][0].dtype), dtype_name(shards[0].dtype)
            if stored != wanted:
                raise UserError(f"{copy.source}: tensor {name} is in {stored}, not in {wanted}{way_out}")
            for (first, copied), (_, original) in zip(
                _rows(copy, spec, "meta"), _rows(checkpoint, spec, "meta"), strict=True
            ):
                if not torch.equal(_bits(copied), _bits(original)):
                    row = first + int((_bits(copied) != _bits(original)).any(-1).nonzero()[0])
                    raise UserError(f"{copy.source}: tensor {name} differs, first in row {row}{way_out}")
                bar.update(copied.nbytes)
    return len(checkpoint.shards)


def _rows(checkpoint: Checkpoint, spec: TensorSpec, to: Format) -> Iterator[tuple[int, Tensor]]:
    """Yield a whole tensor in the order of a format, some rows at a time: (first row, rows [rows, columns]).

    The rows are a view of the file if it has the same order, else a copy. A norm is a single column.
    """
    head_dim = checkpoint.params.head_dim
    shards = [shard.view(len(shard), -1) for shard in checkpoint.shards[spec]]
    dimension = SHARDED_DIMENSION.get(spec.field)
    if dimension is None:
        shards = shards[:1]  # all the same
    n_rows = spec.shape[0]
    row_bytes = shards[0].itemsize * torch.Size(spec.shape[1:]).numel()
    step = -(-CHUNK // (row_bytes * head_dim)) * head_dim  # whole heads
    for begin in range(0, n_rows, step):
        wanted = range(begin, min(begin + step, n_rows))
        pieces = take(shards, 0, wanted) if dimension == 0 else [shard[wanted.start : wanted.stop] for shard in shards]
        rows = join(pieces, dimension or 0)
        if spec.field in ("wq", "wk") and to != _format(checkpoint):
            rows = split_pairs(rows, head_dim) if to == "hf" else interleave_pairs(rows, head_dim)
        yield begin, rows


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: NaN equals itself, and -0 differs from 0."""
    return tensor.contiguous().view(torch.uint8)


def _bar(what: str, n_bytes: int, progress: bool) -> tqdm[Any]:
    return tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, disable=not progress, leave=False)


def _format(checkpoint: Checkpoint) -> Format:
    return "hf" if checkpoint.hf else "meta"


def _format_name(to: Format, shards: int) -> str:
    if to == "hf":
        return "in Hugging Face's format"
    return f"in Meta's format, {shards} shard{'s' if shards > 1 else ''}"


def _name(spec: TensorSpec, to: Format) -> str:
    return spec.hf_name if to == "hf" else spec.meta_name


def _whole(checkpoint: Checkpoint, spec: TensorSpec) -> Block:
    columns = torch.Size(spec.shape[1:]).numel()
    return Block(spec, checkpoint.shards[spec][0].dtype, range(spec.shape[0]), range(columns))


def _meta_files(checkpoint: Checkpoint, shards: int) -> dict[str, Blocks]:
    """Split each tensor into equal shards. Raises UserError naming one that cannot be split into that many."""
    if shards > _MAX_SHARDS:
        raise UserError(
            f"{shards}: Meta numbers its files from 00 to 99; give at most {_MAX_SHARDS}", argument="shards"
        )
    files: dict[str, Blocks] = {f"consolidated.{number:02}.pth": {} for number in range(shards)}
    for spec in checkpoint.shards:
        dimension = SHARDED_DIMENSION.get(spec.field)
        if dimension is not None and spec.shape[dimension] % shards:
            raise UserError(
                f"{shards}: the {spec.shape[dimension]} {('rows', 'columns')[dimension]} of {spec.meta_name} do not "
                "divide into that many equal parts; give another number",
                argument="shards",
            )
        for number, blocks in enumerate(files.values()):
            block = _whole(checkpoint, spec)
            if dimension == 0:
                block = block._replace(rows=_nth(block.rows, number, shards))
            elif dimension == 1:
                block = block._replace(columns=_nth(block.columns, number, shards))
            blocks[spec.meta_name] = block
    return files


def _nth(whole: range, number: int, count: int) -> range:
    """Return part `number` of `count` equal ones."""
    size = len(whole) // count
    return whole[number * size : (number + 1) * size]


def _hf_files(checkpoint: Checkpoint) -> dict[str, Blocks]:
    """Distribute whole tensors, in the order of the forward pass, over files of at most LARGEST_FILE bytes."""
    files: list[Blocks] = [{}]
    space = LARGEST_FILE
    for spec in checkpoint.shards:
        block = _whole(checkpoint, spec)
        if block.nbytes > space and files[-1]:
            files.append({})
            space = LARGEST_FILE
        files[-1][spec.hf_name] = block
        space -= block.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": blocks for number, blocks in enumerate(files, start=1)}


def _meta_json(source: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Return params.json: that of the source, if it has one."""
    params_file, _ = find_files(source)
    if params_file.name == "params.json":
        return {"params.json": params_file.read_text()}
    try:
        return {"params.json": _json(checkpoint.params.to_meta())}
    except UserError as error:
        raise UserError(f"{params_file}: {error}; the model cannot be converted to Meta's format") from error


def _hf_json(source: Path, checkpoint: Checkpoint, files: dict[str, Blocks]) -> dict[str, str]:
    """Return config.json, for LlamaForCausalLM.from_pretrained (transformers 4, 5), and an index of several files."""
    try:
        tokenizer = find_tokenizer(source, None, checkpoint.params)
    except UserError:  # not one of Llama 3's; it is copied anyway
        tokenizer = None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **checkpoint.params.to_hf(),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": checkpoint.tied,
        "torch_dtype": dtype_name(checkpoint.dtype),
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and sorted(tokenizer.stop_ids),
    }
    texts = {"config.json": _json(config)}
    if len(files) > 1:
        total = sum(block.nbytes for blocks in files.values() for block in blocks.values())
        weight_map = {name: file for file, blocks in files.items() for name in blocks}
        texts["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return texts


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _files_to_copy(source: Path, to: Format) -> list[Path]:
    """Return the files of a model folder that are copied unchanged."""
    tokenizers = [source / "tokenizer.model", source / "original" / "tokenizer.model"]
    others = [source / name for name in _HF_FILES] if to == "hf" else []
    return [file for file in tokenizers if file.exists()][:1] + [file for file in others if file.exists()]


def open_source(folder: Path) -> Checkpoint:
    """Open a checkpoint to convert. Raises UserError as `open_checkpoint` does, for int8, and for mixed dtypes."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.scales:
        raise UserError(f"{folder}: is in int8, which neither format has; convert the model before quantization")
    for spec, shards in checkpoint.shards.items():
        if any(shard.dtype != shards[0].dtype for shard in shards):
            raise UserError(f"{folder}: the shards have {spec.meta_name} in several dtypes; keep those of one model")
    return checkpoint


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.convert`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.convert",
        description="Convert a model to another format, or another number of Meta's shards, with all values unchanged.",
    )
    parser.add_argument(
        "source",
        type=not_empty,
        metavar="SOURCE",
        help="folder, name in weights/, or org/repo in the Hugging Face cache",
    )
    parser.add_argument("folder", type=not_empty, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--to",
        choices=get_args(Format),
        help="Meta's format (params.json, consolidated.*.pth) or Hugging Face's (config.json, *.safetensors) (default: "
        "the one that SOURCE is not in; with --shards, Meta's)",
    )
    parser.add_argument(
        "--shards",
        type=positive_int,
        metavar="N",
        help="number of Meta's files (default: 1); Meta's own code supports at most as many as there are kv heads",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the files back and compare each tensor with SOURCE, bit by bit; if FOLDER exists, only compare",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    set_threads(None)
    source, folder = find_model(options.source, "SOURCE").path, Path(options.folder)
    if folder.exists() and folder.samefile(source):
        raise UserError(f"{folder}: is SOURCE itself; name another folder")
    checkpoint = open_source(source)
    to: Format = options.to or ("meta" if options.shards or checkpoint.hf else "hf")
    if to == "hf" and options.shards:
        raise UserError(f"--shards {options.shards}: is only for Meta's format; leave it out, or give --to meta")
    if to == _format(checkpoint) == "hf":
        raise UserError(f"--to hf: {source} is in Hugging Face's format already; leave it out, or give --to meta")
    exists = folder.is_dir() and any(folder.iterdir())
    wanted = _format_name(to, options.shards or 1)
    if not (exists and options.verify):
        convert(source, checkpoint, folder, to, options.shards or 1, progress=True)
        print(f"llama3_raw: wrote {folder}, {wanted}; run it with --weights {folder}", file=sys.stderr)
    if options.verify:
        copy = open_checkpoint(folder)
        actual = _format_name(_format(copy), len(next(iter(copy.shards.values()))))
        if actual != wanted and (options.to or options.shards):
            raise UserError(
                f"{folder}: exists already, {actual}, not {wanted}; name another folder, or remove it first"
            )
        if exists:
            print(f"llama3_raw: {folder} exists already, {actual}; it is only compared", file=sys.stderr)
        count = verify(checkpoint, copy, progress=True)
        print(f"{count} tensors of {folder} have the same bits as those of {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
