"""The models with short names, and the files of a model."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

from huggingface_hub import constants

from ..errors import UserError, in_short
from .sources import Interrupted, RemoteFile, Source


class CatalogEntry(NamedTuple):
    """A model with a short name."""

    repo: str
    gigabytes: float  # size of all its files, in units of 1e9 bytes


# two bytes per parameter (llama_models.sku_list has the shapes)
MODELS = {
    "8b": CatalogEntry("meta-llama/Meta-Llama-3-8B", 16.1),
    "8b-instruct": CatalogEntry("meta-llama/Meta-Llama-3-8B-Instruct", 16.1),
    "70b": CatalogEntry("meta-llama/Meta-Llama-3-70B", 141.1),
    "70b-instruct": CatalogEntry("meta-llama/Meta-Llama-3-70B-Instruct", 141.1),
    "3.1-8b": CatalogEntry("meta-llama/Llama-3.1-8B", 16.1),
    "3.1-8b-instruct": CatalogEntry("meta-llama/Llama-3.1-8B-Instruct", 16.1),
    "3.1-70b": CatalogEntry("meta-llama/Llama-3.1-70B", 141.1),
    "3.1-70b-instruct": CatalogEntry("meta-llama/Llama-3.1-70B-Instruct", 141.1),
    "3.2-1b": CatalogEntry("meta-llama/Llama-3.2-1B", 2.5),
    "3.2-1b-instruct": CatalogEntry("meta-llama/Llama-3.2-1B-Instruct", 2.5),
    "3.2-3b": CatalogEntry("meta-llama/Llama-3.2-3B", 6.4),
    "3.2-3b-instruct": CatalogEntry("meta-llama/Llama-3.2-3B-Instruct", 6.4),
    "3.3-70b-instruct": CatalogEntry("meta-llama/Llama-3.3-70B-Instruct", 141.1),
}


class _Layout(NamedTuple):
    """A way to store a model in a repository."""

    format: str  # a value of --format
    looked_for: str  # its files, as an error names them
    find: Callable[[Source], list[RemoteFile]]  # returns its files, or none if it has no weights or no config


_HF_SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def wanted_files(source: Source, repo: str, file_format: str | None = None) -> list[RemoteFile]:
    """Return the files of a model, the small ones first.

    file_format: Meta's ("original") or Hugging Face's ("safetensors"). None: for meta-llama/* Meta's files in
    original/ come first; elsewhere original/ comes last, because a fine-tune may have its base there. Raises UserError
    if there is no such model, or its index is malformed.
    """
    layouts = [layout for layout in _layouts(repo) if file_format in (None, layout.format)]
    for layout in layouts:
        files = layout.find(source)
        if not files:
            continue
        if not any(file.name in ("tokenizer.model", "tokenizer.json") for file in files):
            print(f"llama3_raw: {source} has no tokenizer; give --tokenizer FILE to run it on text", file=sys.stderr)
        if constants.is_offline_mode():
            print(f"llama3_raw: HF_HUB_OFFLINE is set; using the {len(files)} files in the cache", file=sys.stderr)
        return files
    looked_for = f"model that this can load (looked for {'; '.join(layout.looked_for for layout in layouts)})"
    raise _missing(source, looked_for, "leave --format out to take what there is" if file_format else None)


def _layouts(repo: str) -> list[_Layout]:
    """Return the ways in which the repository may store its model, the one to prefer first."""
    original = _Layout(
        "original",
        "original/params.json with original/consolidated.00.pth",
        functools.partial(_meta_files, folder="original/"),
    )
    meta = _Layout(
        "original",
        "params.json with consolidated.00.pth or consolidated.safetensors",
        functools.partial(_meta_files, folder=""),
    )
    hf = _Layout("safetensors", "config.json with model.safetensors or pytorch_model.bin", _hf_files)
    return [original, hf, meta] if repo.startswith("meta-llama/") else [hf, meta, original]


def gguf_files(source: Source, path: str) -> list[RemoteFile]:
    """Return a GGUF file, or all parts of one that is split. Raises UserError if it is not there."""
    if not path.endswith(".gguf"):
        raise UserError(f"--file {path}: should be a *.gguf; for other formats leave --file out")
    part = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path)
    parts = [f"{part[1]}-{number:05}-of-{part[2]}.gguf" for number in range(1, int(part[2]) + 1)] if part else []
    return [_required(source, path) for path in parts or [path]]


def _required(source: Source, path: str, way_out: str | None = None) -> RemoteFile:
    file = source.find(path)
    if file is None:
        raise _missing(source, path, way_out)
    return file


def _missing(source: Source, looked_for: str, way_out: str | None = None) -> UserError:
    """Return an error that says what was looked for, and what is there instead."""
    if constants.is_offline_mode():
        return UserError(
            f"{source}: HF_HUB_OFFLINE is set, and the Hugging Face cache has no {looked_for}; unset it, or check the "
            "files on the disk with --verify"
        )
    names = source.names()
    gguf = [name for name in names if re.fullmatch(r".*(?<!-of-\d{5})\.gguf|.*-00001-of-\d{5}\.gguf", name)]
    if gguf:
        way_out = f"choose one of its GGUF files with --file: {', '.join(gguf)}"
    elif way_out is None and "adapter_config.json" in names:
        way_out = (
            "it has an adapter (LoRA), not a whole model; fetch it with `hf download`, and run its base model with "
            "--adapter FOLDER"
        )
    elif way_out is None:
        way_out = f"it has {in_short(', '.join(names))}" if names else "check the name"
    return UserError(f"{source}: there is no {looked_for}; {way_out}")


def _meta_files(source: Source, folder: str) -> list[RemoteFile]:
    """Return Meta's files in a folder of the repository, "original/" or "", or none if there are none."""
    params = source.find(f"{folder}params.json")
    if params is None:
        return []
    tokenizer = _those_of(source, f"{folder}tokenizer.model")
    numbered = (source.find(f"{folder}consolidated.{number:02}.pth") for number in range(100))
    shards = [shard for shard in itertools.takewhile(bool, numbered) if shard]
    shards = shards or _those_of(source, f"{folder}consolidated.safetensors")
    return [params, *tokenizer, *shards] if shards else []


def _hf_files(source: Source) -> list[RemoteFile]:
    """Return Hugging Face's files at the root, or none if there are none."""
    config = source.find("config.json")
    weights = (_indexed(source, "model.safetensors") or _indexed(source, "pytorch_model.bin")) if config else []
    if not config or not weights:
        return []
    tokenizer = _those_of(source, "tokenizer.json", "tokenizer.model") or _those_of(source, "original/tokenizer.model")
    return [config, *_those_of(source, *_HF_SETTINGS), *tokenizer, *weights]


def _those_of(source: Source, *paths: str) -> list[RemoteFile]:
    """Return those of the files that are there."""
    return [file for path in paths if (file := source.find(path))]


def _indexed(source: Source, single: str) -> list[RemoteFile]:
    """Return the index and the files that it names, or without one the `single` file, or none."""
    index = source.find(f"{single}.index.json")
    if index is None:
        return _those_of(source, single)
    ending = single.rpartition(".")[2]
    try:
        content = _read(source, index)
        names = sorted(set(json.loads(content)["weight_map"].values()))
        if not names or not all(re.fullmatch(rf"[\w.-]+\.{ending}", name) for name in names):
            raise ValueError(f"it should name *.{ending}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source}: {index.name} is not an index of weights ({in_short(error)}); get the model from elsewhere"
        ) from error
    way_out = f"{index.name} names it, so the upload is not complete; get the model from elsewhere"
    return [index, *(_required(source, name, way_out) for name in names)]


def _read(source: Source, file: RemoteFile) -> bytes:
    """Return the content of a small file."""
    copy = source.local_copy(file)
    if copy is not None:
        return copy.read_bytes()
    try:
        with source.open(file, 0, None) as stream:
            return b"".join(stream.chunks)
    except Interrupted as interruption:
        raise UserError(f"{file.name}: {interruption}; run the same command again") from interruption


def describe_models() -> str:
    """Return the table that --list prints."""
    lines = [f"{name:<20}{entry.gigabytes:>7.1f} GB  {entry.repo}" for name, entry in MODELS.items()]
    return "\n".join([*lines, "or any org/repo with a Llama model"])


def repository_of(model: str) -> str:
    """Return org/repo for the value of --model. Raises UserError for an unknown short name."""
    if model.lower() in MODELS:
        return MODELS[model.lower()].repo
    if "/" in model:
        return model
    close = difflib.get_close_matches(model.lower(), MODELS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"--model {model}: there is no such short name; {hint}--list shows them, and any org/repo works too"
    )
