"""python -m llama3_raw.convert SOURCE FOLDER: a model in another number of Meta's shards, or in another format.

It is written a few rows at a time, so that models larger than the memory can be converted too.
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
from .weights import TensorPlace, in_words

Format = Literal["meta", "hf"]

_MOST_SHARDS = 100  # they are numbered from 00 to 99
LARGEST_FILE = 5_000_000_000  # bytes of tensors in a file of Hugging Face's, unless a single one has more
CHUNK = 1 << 22  # bytes of a tensor in memory at a time
# what Hugging Face's folders have beside the config and the weights
_HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Part(NamedTuple):
    """What of a tensor goes into one file: a block of rows and columns. A norm is a single column."""

    place: TensorPlace
    dtype: torch.dtype
    rows: range
    columns: range

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return len(self.rows) * len(self.columns) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """The tensor in the file, without content (on meta)."""
        shape = (len(self.rows), len(self.columns))[: len(self.place.shape)]
        return torch.empty(shape, dtype=self.dtype, device="meta")


Parts = dict[str, Part]  # by the name of the tensor


class File(NamedTuple):
    """A file that is being written."""

    opened: BinaryIO
    offsets: dict[str, int]  # where the bytes of each tensor begin
    parts: Parts


def convert(
    source: Path, checkpoint: Checkpoint, folder: Path, to: Format, shards: int = 1, progress: bool = False
) -> None:
    """Writes the checkpoint of the model folder `source` into another `folder`, every value as it is.

    shards: how many of Meta's files. tokenizer.model is copied along, and what else Hugging Face's folders hold if both
    do. The folder gets its name when all of it is written. progress: shows a bar on stderr. Raises UserError where
    there is one of that name, where it cannot be written, and for what the format or the number of shards cannot hold.
    """
    layout = _hf_files(checkpoint) if to == "hf" else _meta_files(checkpoint, shards)
    small_files = _hf_texts(source, checkpoint, layout) if to == "hf" else _meta_texts(source, checkpoint)
    write_empty = write_empty_safetensors if to == "hf" else write_empty_checkpoint
    n_bytes = sum(part.nbytes for parts in layout.values() for part in parts.values())
    with atomic_folder(folder, n_bytes) as unfinished, contextlib.ExitStack() as stack:
        for name, text in small_files.items():
            (unfinished / name).write_text(text)
        for beside in _files_beside(source, to):
            shutil.copyfile(beside, unfinished / beside.name)
        files = []
        for name, parts in layout.items():
            offsets = write_empty(unfinished / name, {tensor: part.empty() for tensor, part in parts.items()})
            files.append(File(stack.enter_context(open(unfinished / name, "r+b")), offsets, parts))
        bar = stack.enter_context(_bar(f"writing {folder}", n_bytes, progress))
        for place in checkpoint.parts:
            for first, rows in _rows(checkpoint, place, to):
                for file in files:
                    bar.update(_write(file, _name(place, to), first, rows))


def _write(file: File, name: str, first: int, rows: Tensor) -> int:
    """Puts what belongs there of some rows of a tensor, from the row `first` on, into a file; -> how many bytes."""
    if name not in file.parts:
        return 0
    part = file.parts[name]
    begin, end = max(first, part.rows.start), min(first + len(rows), part.rows.stop)
    if begin >= end:
        return 0
    block = rows[begin - first : end - first, part.columns.start : part.columns.stop]
    before = (begin - part.rows.start) * len(part.columns) * block.itemsize
    write_at(file.opened, file.offsets[name] + before, block)
    return block.nbytes


def verify(checkpoint: Checkpoint, copy: Checkpoint, progress: bool = False) -> int:
    """Holds every tensor of a copy against the original, bit by bit in Meta's layout; -> how many there are.

    progress: shows a bar on stderr. Raises UserError naming the first that differs, or what else does.
    """
    way_out = f"; it is no copy of {checkpoint.source}, remove it and convert that again"
    for field in fields(Params):
        has, should = getattr(copy.params, field.name), getattr(checkpoint.params, field.name)
        if has != should:
            raise UserError(f"{copy.source}: {field.name} is {has}, not {should}{way_out}")
    if copy.tied != checkpoint.tied:
        raise UserError(f"{copy.source}: only one of the two has an output matrix of its own{way_out}")
    n_bytes = sum(_whole(checkpoint, place).nbytes for place in checkpoint.parts)
    with _bar(f"comparing {copy.source}", n_bytes, progress) as bar:
        for place, parts in checkpoint.parts.items():
            name = _name(place, _format(copy))
            stored, wanted = in_words(copy.parts[place][0].dtype), in_words(parts[0].dtype)
            if stored != wanted:
                raise UserError(f"{copy.source}: tensor {name} is in {stored}, not in {wanted}{way_out}")
            for (first, ours), (_, theirs) in zip(
                _rows(copy, place, "meta"), _rows(checkpoint, place, "meta"), strict=True
            ):
                if not torch.equal(_bits(ours), _bits(theirs)):
                    row = first + int((_bits(ours) != _bits(theirs)).any(-1).nonzero()[0])
                    raise UserError(f"{copy.source}: tensor {name} differs, first in row {row}{way_out}")
                bar.update(ours.nbytes)
    return len(checkpoint.parts)


def _rows(checkpoint: Checkpoint, place: TensorPlace, to: Format) -> Iterator[tuple[int, Tensor]]:
    """A whole tensor as a format has it, some rows at a time: the number of the first, and the rows [rows, columns].

    They are a window into the file where that has them so, else a copy. A norm is a single column.
    """
    head_dim = checkpoint.params.head_dim
    parts = [part.view(len(part), -1) for part in checkpoint.parts[place]]
    dimension = SHARDED_DIMENSION.get(place.field)
    if dimension is None:
        parts = parts[:1]  # the same in each shard
    n_rows = place.shape[0]
    row_bytes = parts[0].itemsize * torch.Size(place.shape[1:]).numel()
    step = -(-CHUNK // (row_bytes * head_dim)) * head_dim  # whole heads
    for begin in range(0, n_rows, step):
        wanted = range(begin, min(begin + step, n_rows))
        pieces = take(parts, 0, wanted) if dimension == 0 else [part[wanted.start : wanted.stop] for part in parts]
        rows = join(pieces, dimension or 0)
        if place.field in ("wq", "wk") and to != _format(checkpoint):
            rows = split_pairs(rows, head_dim) if to == "hf" else interleave_pairs(rows, head_dim)
        yield begin, rows


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, by which NaN is NaN, and -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)


def _bar(what: str, n_bytes: int, progress: bool) -> tqdm[Any]:
    return tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what, disable=not progress, leave=False)


def _format(checkpoint: Checkpoint) -> Format:
    return "hf" if checkpoint.hf else "meta"


def _kind(to: Format, shards: int) -> str:
    """In words."""
    if to == "hf":
        return "in Hugging Face's format"
    return f"in Meta's format, {shards} shard{'s' if shards > 1 else ''}"


def _name(place: TensorPlace, to: Format) -> str:
    return place.hf_name if to == "hf" else place.meta_name


def _whole(checkpoint: Checkpoint, place: TensorPlace) -> Part:
    columns = torch.Size(place.shape[1:]).numel()
    return Part(place, checkpoint.parts[place][0].dtype, range(place.shape[0]), range(columns))


def _meta_files(checkpoint: Checkpoint, shards: int) -> dict[str, Parts]:
    """Equal parts of each tensor. Raises UserError naming one that does not divide into so many."""
    if shards > _MOST_SHARDS:
        raise UserError(
            f"{shards}: Meta numbers its files from 00 to 99; give at most {_MOST_SHARDS}", argument="shards"
        )
    files: dict[str, Parts] = {f"consolidated.{number:02}.pth": {} for number in range(shards)}
    for place in checkpoint.parts:
        dimension = SHARDED_DIMENSION.get(place.field)
        if dimension is not None and place.shape[dimension] % shards:
            raise UserError(
                f"{shards}: the {place.shape[dimension]} {('rows', 'columns')[dimension]} of {place.meta_name} do not "
                "divide into so many equal parts; give another number",
                argument="shards",
            )
        for number, parts in enumerate(files.values()):
            part = _whole(checkpoint, place)
            if dimension == 0:
                part = part._replace(rows=_nth(part.rows, number, shards))
            elif dimension == 1:
                part = part._replace(columns=_nth(part.columns, number, shards))
            parts[place.meta_name] = part
    return files


def _nth(whole: range, number: int, count: int) -> range:
    """One of `count` equal parts."""
    size = len(whole) // count
    return whole[number * size : (number + 1) * size]


def _hf_files(checkpoint: Checkpoint) -> dict[str, Parts]:
    """Whole tensors, in the order of the forward pass, in files of at most LARGEST_FILE bytes."""
    files: list[Parts] = [{}]
    room = LARGEST_FILE
    for place in checkpoint.parts:
        part = _whole(checkpoint, place)
        if part.nbytes > room and files[-1]:
            files.append({})
            room = LARGEST_FILE
        files[-1][place.hf_name] = part
        room -= part.nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": parts for number, parts in enumerate(files, start=1)}


def _meta_texts(source: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """params.json: that of the source, if it has one."""
    params_file, _ = find_files(source)
    if params_file.name == "params.json":
        return {"params.json": params_file.read_text()}
    try:
        return {"params.json": _json(checkpoint.params.to_meta())}
    except UserError as error:
        raise UserError(f"{params_file}: {error}; so the model cannot be in Meta's format") from error


def _hf_texts(source: Path, checkpoint: Checkpoint, files: dict[str, Parts]) -> dict[str, str]:
    """config.json, as LlamaForCausalLM.from_pretrained reads it in transformers 4 and 5; the index of several files."""
    try:
        tokenizer = find_tokenizer(source, None, checkpoint.params)
    except UserError:  # it is none of Llama 3's, and goes along as it is
        tokenizer = None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **checkpoint.params.to_hf(),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": checkpoint.tied,
        "torch_dtype": in_words(checkpoint.dtype),
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and sorted(tokenizer.stop_ids),
    }
    texts = {"config.json": _json(config)}
    if len(files) > 1:
        total = sum(part.nbytes for parts in files.values() for part in parts.values())
        weight_map = {name: file for file, parts in files.items() for name in parts}
        texts["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return texts


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _files_beside(source: Path, to: Format) -> list[Path]:
    """The files of a model folder that go along as they are."""
    tokenizers = [source / "tokenizer.model", source / "original" / "tokenizer.model"]
    others = [source / name for name in _HF_FILES] if to == "hf" else []
    return [file for file in tokenizers if file.exists()][:1] + [file for file in others if file.exists()]


def open_source(folder: Path) -> Checkpoint:
    """A checkpoint to convert. Raises UserError as `open_checkpoint` does, and for one in int8."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.scales:
        raise UserError(f"{folder}: is in int8, which neither format holds; take the model that it was made of")
    for place, parts in checkpoint.parts.items():
        if any(part.dtype != parts[0].dtype for part in parts):
            raise UserError(f"{folder}: the shards have {place.meta_name} in several dtypes; keep those of one model")
    return checkpoint


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.convert`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.convert",
        description="Writes a model in another format, or in another number of Meta's shards, into a new folder.",
    )
    parser.add_argument(
        "source",
        type=not_empty,
        metavar="SOURCE",
        help="a folder, a name in weights/, or org/repo in the Hugging Face cache",
    )
    parser.add_argument("folder", type=not_empty, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--to",
        choices=get_args(Format),
        help="Meta's format (params.json, consolidated.*.pth) or Hugging Face's (config.json, *.safetensors); default: "
        "the one that SOURCE is not in, with --shards Meta's",
    )
    parser.add_argument(
        "--shards",
        type=positive_int,
        metavar="N",
        help="how many of Meta's files; its own code, in N processes, wants no more than kv heads (default: 1)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read what was written, and compare each tensor with SOURCE bit by bit; a FOLDER that is there already is "
        "only compared",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(arguments)
    set_threads(None)
    source, folder = find_model(options.source, "SOURCE").path, Path(options.folder)
    if folder.exists() and folder.samefile(source):
        raise UserError(f"{folder}: is SOURCE itself; name another folder")
    checkpoint = open_source(source)
    to: Format = options.to or ("meta" if options.shards or checkpoint.hf else "hf")
    if to == "hf" and options.shards:
        raise UserError(f"--shards {options.shards}: is about Meta's format; leave it out, or give --to meta")
    if to == _format(checkpoint) == "hf":
        raise UserError(f"--to hf: {source} is in Hugging Face's format already; leave it out, or give --to meta")
    is_there = folder.is_dir() and any(folder.iterdir())
    wanted = _kind(to, options.shards or 1)
    if not (is_there and options.verify):
        convert(source, checkpoint, folder, to, options.shards or 1, progress=True)
        print(f"llama3_raw: {folder} is written, {wanted}; run it with --weights {folder}", file=sys.stderr)
    if options.verify:
        copy = open_checkpoint(folder)
        found = _kind(_format(copy), len(next(iter(copy.parts.values()))))
        if found != wanted and (options.to or options.shards):
            raise UserError(
                f"{folder}: is there already, {found}, not {wanted}; name another folder, or remove it first"
            )
        if is_there:
            print(f"llama3_raw: {folder} is there already, {found}; it is only compared", file=sys.stderr)
        count = verify(checkpoint, copy, progress=True)
        print(f"{count} tensors of {folder} have the same bits as those of {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
