"""python -m llama3_raw.convert SOURCE TARGET: convert a model to another format, or another number of Meta's shards.

A few rows are converted at a time, so the model may be larger than the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from .cli.convert_parser import AnyFormat, build_parser
from .cli.entry_point import answer_help

answer_help(__name__, build_parser)

import torch
from torch import Tensor
from tqdm import tqdm

from .chat.dialog import FORMAT_TOKENS, is_base_model
from .checkpoint.checkpoint import Checkpoint, interleave_pairs, open_checkpoint, split_pairs
from .checkpoint.files import SMALL_FILES, FileFormat
from .checkpoint.gguf import TYPE_NAMES, GgufTensor, gguf_tensor, has_rows, rope_divisors, write_gguf_file
from .checkpoint.gguf_header import read_header
from .checkpoint.gguf_reading import is_gguf, read_gguf
from .checkpoint.gguf_vocabulary import as_tokenizer_json, read_vocabulary
from .checkpoint.sharding import SHARDED_DIMENSION, join, take
from .checkpoint.text import end_tokens, find_tokenizer
from .checkpoint.tokenizer_files import (
    LLAMA3_TEMPLATE,
    gguf_vocabulary,
    has_llama3_tokens,
    tokenizer_files,
    tokenizer_model,
)
from .checkpoint.writing import write_at, write_empty_checkpoint, write_empty_safetensors
from .cli.entry_point import command_line_tool
from .cli.models import find_model
from .errors import UserError
from .params import Params
from .system.files import atomic_folder, read_json
from .system.machine import set_threads
from .tokenizer import Tokenizer
from .weights import Model, TensorSpec, Weights, dtype_name

Format = Literal["meta", "hf"]
_MAX_SHARDS = 100  # numbered from 00 to 99
LARGEST_FILE = 5_000_000_000  # bytes of tensors in one safetensors file, unless a single tensor is larger
CHUNK = 1 << 22  # bytes of a tensor in memory at once
# files in Hugging Face's folders besides the weights
_HF_FILES = ("config.json", "tokenizer.json", *SMALL_FILES)


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

    shards: the number of Meta's files. The tokenizer's and other small files of either format are copied too; those
    of Hugging Face's that are missing are made. The folder gets its name when all files are complete. progress: show a
    bar on stderr. Raises UserError if the folder exists and is not empty, if it cannot be written, and if the format or
    the number of shards does not fit the model.
    """
    layout = _hf_files(checkpoint) if to == "hf" else _meta_files(checkpoint, shards)
    copies = _files_to_copy(source, to)
    texts = _hf_texts(source, checkpoint, layout) if to == "hf" else _meta_texts(checkpoint)
    write_empty = write_empty_safetensors if to == "hf" else write_empty_checkpoint
    n_bytes = sum(block.nbytes for blocks in layout.values() for block in blocks.values())
    with atomic_folder(folder, n_bytes) as unfinished, contextlib.ExitStack() as stack:
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        for file_to_copy in copies:
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
    _compare_params(copy.source, copy.params, checkpoint.params, way_out)
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


def _compare_params(source: str, actual: Params, expected: Params, way_out: str) -> None:
    """Raise UserError naming the first of the params that differs."""
    for field in fields(Params):
        values = getattr(actual, field.name), getattr(expected, field.name)
        if values[0] != values[1]:
            raise UserError(f"{source}: {field.name} is {values[0]}, not {values[1]}{way_out}")


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


def _files_to_copy(source: Path, to: Format) -> list[Path]:
    """Return the small files of a model folder that are copied unchanged.

    Beside tokenizer.json a tokenizer.model may be that of the base, which Meta's format would prefer.
    """
    names = [name for name in _HF_FILES if not (name == "config.json" and to == "hf")]
    files = [source / name for name in names if (source / name).exists()]
    if to == "hf" or (source / "params.json").exists() or not (source / "tokenizer.json").exists():
        tokenizers = [source / "tokenizer.model", source / "original" / "tokenizer.model"]
        files += [file for file in tokenizers if file.exists()][:1]
    return files


def _meta_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return params.json, that of the source if it has one, and a tokenizer.model that is made."""
    params_file = checkpoint.params_file
    try:
        same = params_file.name == "params.json"
        texts = {"params.json": params_file.read_text() if same else _json(checkpoint.params.to_meta())}
    except UserError as error:
        raise UserError(f"{params_file}: {error}; the model cannot be converted to Meta's format") from error
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is not None and has_llama3_tokens(tokenizer):
        texts["tokenizer.model"] = tokenizer_model(tokenizer)
    return texts | _texts_of_gguf(checkpoint, tokenizer)


def _hf_texts(source: Path, checkpoint: Checkpoint, files: dict[str, Blocks]) -> dict[str, str]:
    """Return config.json, an index of several files, and what of the tokenizer's files is made."""
    tokenizer = _tokenizer(checkpoint)
    texts = {"config.json": _own_config(source, checkpoint) or _json(_config(checkpoint, tokenizer))}
    if len(files) > 1:
        total = sum(block.nbytes for blocks in files.values() for block in blocks.values())
        weight_map = {name: file for file, blocks in files.items() for name in blocks}
        texts["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer is None or is_gguf(checkpoint.params_file):
        return texts | _texts_of_gguf(checkpoint, tokenizer)
    texts["generation_config.json"] = _json(_ends(checkpoint, tokenizer))
    if has_llama3_tokens(tokenizer) and not (source / "tokenizer.json").exists():
        template = None if (source / "chat_template.jinja").exists() else _chat_template(checkpoint, tokenizer)
        made = tokenizer_files(tokenizer, checkpoint.params.max_seq_len, template)
        texts |= {name: _json(content) for name, content in made.items()}
    return texts


def _texts_of_gguf(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the tokenizer of a GGUF file as Hugging Face's files, with its chat template and end tokens; else {}."""
    vocabulary = read_vocabulary(checkpoint.params_file, checkpoint.metadata) if checkpoint.metadata else None
    if vocabulary is None or tokenizer is None:
        return {}
    names = vocabulary.special_names
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    contents = {
        "tokenizer.json": as_tokenizer_json(vocabulary),
        "tokenizer_config.json": config,
        "special_tokens_map.json": names,
        "generation_config.json": _ends(checkpoint, tokenizer),
    }
    return {name: _json(content) for name, content in contents.items()}


def _config(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return a new config.json, for LlamaForCausalLM.from_pretrained (transformers 4, 5)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **checkpoint.params.to_hf(),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": checkpoint.tied,
        "torch_dtype": dtype_name(checkpoint.dtype),
        **_ends(checkpoint, tokenizer),
    }


def _ends(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the tokens that begin and end a text, as config.json and generation_config.json have them."""
    stop_ids = sorted(end_tokens(checkpoint, tokenizer))
    return {"bos_token_id": tokenizer and tokenizer.bos_id, "eos_token_id": stop_ids or None}


def _own_config(source: Path, checkpoint: Checkpoint) -> str | None:
    """Return the source's config.json, if it describes the same model, with only what must change."""
    file = source / "config.json"
    try:
        content = read_json(file)
        if Params.from_hf(content) != checkpoint.params:
            return None
    except UserError:  # none, a damaged one, or one for weights that are quantized
        return None
    changed = dict(content)
    if content.get("tie_word_embeddings", False) != checkpoint.tied:
        changed["tie_word_embeddings"] = checkpoint.tied
    changed |= {key: dtype_name(checkpoint.dtype) for key in ("torch_dtype", "dtype") if content.get(key)}
    return file.read_text(encoding="utf-8") if changed == content else _json(changed)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return the source's tokenizer; None if there is none, or one that only other programs can use."""
    try:
        return find_tokenizer(checkpoint)
    except UserError:
        return None


def _chat_template(checkpoint: Checkpoint, tokenizer: Tokenizer) -> str | None:
    """Return the source's chat template, or else Llama 3's, unless the model was not trained on its tokens."""
    special = tokenizer.special_tokens
    if tokenizer.chat_template is not None or not special.keys() >= set(FORMAT_TOKENS):
        return tokenizer.chat_template
    spec = next(spec for spec in checkpoint.shards if spec.field == "tok_embeddings")
    embeddings = torch.zeros(spec.shape, dtype=checkpoint.shards[spec][0].dtype)  # untouched pages take no memory
    for first, rows in _rows(checkpoint, spec, "meta"):
        if first + len(rows) > min(special.values()):
            embeddings[first : first + len(rows)] = rows
    weights = Weights(embeddings, (), embeddings, embeddings)
    return None if is_base_model(Model(weights, checkpoint.params, tokenizer)) else LLAMA3_TEMPLATE


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def convert_to_gguf(
    source: Path, checkpoint: Checkpoint, file: Path, kind: str | None = None, progress: bool = False
) -> None:
    """Write the checkpoint of the model folder `source` to a GGUF file, with its tokenizer.

    kind: the type of the matrices, F32, F16, BF16 or Q8_0; None keeps each as stored. Norms are in fp32. Raises
    UserError if the file cannot be written, if the values do not fit into the type, and without a tokenizer.
    """
    try:
        tokenizer = find_tokenizer(checkpoint)
    except UserError as error:
        raise UserError(error.naming(f"tokenizer.json or tokenizer.model in {source}")) from error
    if tokenizer is None:
        raise UserError(f"{source}: there is no tokenizer, which belongs into a GGUF file; add tokenizer.model")
    template = _chat_template(checkpoint, tokenizer)
    vocabulary = gguf_vocabulary(tokenizer, checkpoint.params.vocab_size, template, checkpoint.stop_ids)
    lost = end_tokens(checkpoint, tokenizer) - vocabulary.stop_ids
    if lost:
        names = ", ".join(tokenizer.name(token) for token in sorted(lost))
        print(f"llama3_raw: warning: {file}: a GGUF file cannot say that {names} end a text, too", file=sys.stderr)
    name = source.resolve().name
    write_gguf_file(file, checkpoint.params, _gguf_tensors(checkpoint, kind), vocabulary, name, progress)


def verify_gguf(checkpoint: Checkpoint, file: Path, kind: str | None = None, progress: bool = False) -> int:
    """Compare every tensor of a GGUF file with what `convert_to_gguf` writes, bit by bit. Return their number.

    Raises UserError naming the first difference: a param, or a row of a tensor.
    """
    way_out = f"; it is not what {checkpoint.source} becomes, remove it and convert that again"
    _compare_params(str(file), read_gguf(file).params, checkpoint.params, way_out)
    header, tensors = read_header(file), _gguf_tensors(checkpoint, kind)
    if header.tensors.keys() != {tensor.name for tensor in tensors}:
        raise UserError(f"{file}: only one of the two has a separate output matrix{way_out}")
    with _bar(f"comparing {file}", sum(tensor.nbytes for tensor in tensors), progress) as bar:
        for tensor in tensors:
            mapped, first = header.map(tensor.name), 0
            for rows in tensor.encoded():
                if not has_rows(mapped, slice(first, first + len(rows)), rows):
                    last = first + len(rows) - 1
                    raise UserError(f"{file}: tensor {tensor.name} differs, in rows {first} to {last}{way_out}")
                first += len(rows)
                bar.update(rows.nbytes)
    return len(tensors)


def _gguf_tensors(checkpoint: Checkpoint, kind: str | None) -> list[GgufTensor]:
    """Return the tensors of a GGUF file. kind: as in `convert_to_gguf`."""

    def rows_of(spec: TensorSpec) -> Callable[[], Iterator[Tensor]]:
        return lambda: (rows for _, rows in _rows(checkpoint, spec, "meta"))

    tensors = [
        gguf_tensor(spec, kind or TYPE_NAMES[shards[0].dtype], rows_of(spec))
        for spec, shards in checkpoint.shards.items()
    ]
    return tensors + rope_divisors(checkpoint.params)


def open_source(folder: Path, file_format: FileFormat | None = None) -> Checkpoint:
    """Open a checkpoint to convert. Raises UserError as `open_checkpoint` does, if quantized, and for mixed dtypes."""
    checkpoint = open_checkpoint(folder, file_format)
    if checkpoint.blocks:
        raise UserError(f"{folder}: is in blocks, which no other format has; get the model in bf16")
    if checkpoint.format:
        raise UserError(
            f"{folder}: is in {checkpoint.format}, which no other format has; convert the model before quantization"
        )
    for spec, shards in checkpoint.shards.items():
        if any(shard.dtype != shards[0].dtype for shard in shards):
            raise UserError(f"{folder}: the shards have {spec.meta_name} in several dtypes; keep those of one model")
    return checkpoint


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    set_threads(None)
    source, target = find_model(options.source, "SOURCE").path, Path(options.target)
    if target.exists() and target.samefile(source):
        raise UserError(f"{target}: is SOURCE itself; name another TARGET")
    checkpoint = open_source(source, options.format)
    if checkpoint.choice and not options.format:
        print(f"llama3_raw: SOURCE is {checkpoint.choice}; --format takes the other", file=sys.stderr)
    to: AnyFormat = options.to or _default_format(target, options.shards, checkpoint)
    _check_options(options, to)
    if to == "gguf":
        return _run_gguf(source, checkpoint, target, options)
    if to == _format(checkpoint) == "hf":
        raise UserError(f"--to hf: {source} is in Hugging Face's format already; leave it out, or give --to meta")
    return _run(source, checkpoint, target, to, options)


def _default_format(target: Path, shards: int | None, checkpoint: Checkpoint) -> AnyFormat:
    if target.suffix == ".gguf":
        return "gguf"
    return "meta" if shards or checkpoint.hf else "hf"


def _check_options(options: argparse.Namespace, to: AnyFormat) -> None:
    """Raise UserError for an option that does not fit the format."""
    if to != "meta" and options.shards:
        raise UserError(f"--shards {options.shards}: is only for Meta's format; leave it out, or give --to meta")
    if to != "gguf" and options.outtype:
        raise UserError(f"--outtype {options.outtype}: is only for a GGUF file; leave it out, or give --to gguf")
    if (to == "gguf") != (Path(options.target).suffix == ".gguf"):
        raise UserError(
            f"{options.target}: the name of a GGUF file ends in .gguf, and that of a folder does not; change it, or "
            f"--to {to}"
        )


def _run(source: Path, checkpoint: Checkpoint, folder: Path, to: Format, options: argparse.Namespace) -> int:
    """Convert to a folder, and verify it."""
    exists = folder.is_dir() and any(folder.iterdir())
    wanted = _format_name(to, options.shards or 1)
    if not (exists and options.verify):
        convert(source, checkpoint, folder, to, options.shards or 1, progress=True)
        print(f"llama3_raw: wrote {folder}, {wanted}; run it with --weights {folder}", file=sys.stderr)
        needed = ("tokenizer.json",) if to == "hf" else ("tokenizer.json", "tokenizer.model")
        if not any((folder / name).exists() for name in needed):
            print(
                f"llama3_raw: warning: {folder} has no {' or '.join(needed)}, because {source} has no tokenizer of "
                "Llama 3's kind that fits the model",
                file=sys.stderr,
            )
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


def _run_gguf(source: Path, checkpoint: Checkpoint, file: Path, options: argparse.Namespace) -> int:
    """Convert to a GGUF file, and verify it."""
    kind, exists = options.outtype and options.outtype.upper(), file.exists()
    if exists and not options.verify:
        raise UserError(f"{file}: already exists; name another file, or remove it first")
    if exists:
        print(f"llama3_raw: {file} exists already; it is only compared", file=sys.stderr)
    else:
        convert_to_gguf(source, checkpoint, file, kind, progress=True)
        print(f"llama3_raw: wrote {file}; run it with --weights {file}, or with llama.cpp", file=sys.stderr)
    if options.verify:
        count = verify_gguf(checkpoint, file, kind, progress=True)
        print(f"{count} tensors of {file} have the bits that those of {source} become")
    return 0


if __name__ == "__main__":
    sys.exit(main())
