"""The models with short names, and the files of a model."""

from __future__ import annotations

import difflib
import json
import re
import sys
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


def wanted_files(source: Source, file_format: str) -> list[RemoteFile]:
    """Return the files of a model in Meta's format ("original") or Hugging Face's ("safetensors"), the smallest first.

    Raises UserError if one is missing, or the index of the safetensors is malformed.
    """
    return _meta_files(source) if file_format == "original" else _hf_files(source)


def _required(source: Source, path: str, other_format: str) -> RemoteFile:
    file = source.find(path)
    if file is not None:
        return file
    if constants.is_offline_mode():
        raise UserError(
            f"{source}: HF_HUB_OFFLINE is set, and {path} is not in the Hugging Face cache; unset it, or check the "
            "files on the disk with --verify"
        )
    raise UserError(
        f"{source}: there is no {path}, or no such model at all; check the name, or try --format {other_format}"
    )


def _meta_files(source: Source) -> list[RemoteFile]:
    names = ("params.json", "tokenizer.model", "consolidated.00.pth")
    files = [_required(source, f"original/{name}", "safetensors") for name in names]
    for number in range(1, 100):
        shard = source.find(f"original/consolidated.{number:02}.pth")
        if shard is None:
            break
        files.append(shard)
    if constants.is_offline_mode():
        print(f"llama3_raw: HF_HUB_OFFLINE is set; using the {len(files)} files in the cache", file=sys.stderr)
    return files


def _hf_files(source: Source) -> list[RemoteFile]:
    files = [_required(source, path, "original") for path in ("config.json", "original/tokenizer.model")]
    index = source.find("model.safetensors.index.json")
    if index is None:
        return [*files, _required(source, "model.safetensors", "original")]
    try:
        content = _read(source, index)
        shards = sorted(set(json.loads(content)["weight_map"].values()))
        if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards):
            raise ValueError("it should name *.safetensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source}: {index.name} is not a safetensors index ({in_short(error)}); try --format original"
        ) from error
    return [*files, index, *(_required(source, shard, "original") for shard in shards)]


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
    return "\n".join([*lines, "or any org/repo with the same files"])


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
