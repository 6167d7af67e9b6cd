"""Finding the params, the weights and the tokenizer in a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, in_short
from ..params import Params
from ..system.files import read_small_file
from ..tokenizer import Tokenizer


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """Return the params file and the weight files of a model folder. Raises UserError if they are missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    for candidate in (folder, folder / "original"):
        checkpoints = sorted(candidate.glob("consolidated.[0-9][0-9].pth"))
        if checkpoints and (candidate / "params.json").exists():
            _check_numbers(checkpoints)
            return candidate / "params.json", checkpoints
    quantized = sorted(folder.glob("int8.*.safetensors"))
    if quantized and (folder / "params.json").exists():
        return folder / "params.json", quantized
    config = folder / "config.json"
    shards = _safetensors_files(folder) if config.exists() else []
    if shards:
        return config, shards
    for part in folder.glob("*.part"):
        raise UserError(f"{part}: the download is not complete; run python -m llama3_raw.download again to continue")
    raise UserError(
        f"{folder}: no model here; it should hold params.json and consolidated.00.pth (Meta's files, also in a "
        "subfolder original/), or config.json and *.safetensors (Hugging Face's)"
    )


def _check_numbers(checkpoints: Sequence[Path]) -> None:
    """Raise UserError unless Meta's shards are numbered from 00 without gaps."""
    for number, file in enumerate(checkpoints):
        if file.name != f"consolidated.{number:02}.pth":
            raise UserError(
                f"{file.parent}: consolidated.{number:02}.pth is missing, but {file.name} is there; download the rest"
            )


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files that the index names; without an index, all of them."""
    files, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if not index.exists():
        return files
    try:
        named = set(json.loads(read_small_file(index))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a safetensors index ({in_short(repr(error))}); download it again") from error
    for name in sorted(named - {file.name for file in files}, key=str):
        raise UserError(f"{index}: names {in_short(name)}, which is no *.safetensors in this folder; download it")
    return [file for file in files if file.name in named]


def find_tokenizer(folder: Path, given: str | Path | None, params: Params) -> Tokenizer | None:
    """Return the tokenizer `given`, or else that of the folder, or else None.

    Raises UserError if it does not fit the params.
    """
    candidates = [Path(given)] if given else [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]
    for file in candidates:
        if given or file.exists():
            tokenizer = Tokenizer(file)
            if tokenizer.n_words != params.vocab_size:
                raise UserError(
                    f"{file}: has {tokenizer.n_words} tokens, but the model has {params.vocab_size}; "
                    "give the model's tokenizer as {argument}",
                    argument="tokenizer",
                )
            return tokenizer
    return None
