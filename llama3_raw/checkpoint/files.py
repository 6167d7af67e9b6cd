"""Which files of a folder are its params, its weights and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, in_short
from ..params import Params
from ..system.files import read_small_file
from ..tokenizer import Tokenizer


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The params file and the weight files of a model folder. Raises UserError if they are not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    for place in (folder, folder / "original"):
        checkpoints = sorted(place.glob("consolidated.[0-9][0-9].pth"))
        if checkpoints and (place / "params.json").exists():
            _check_numbers(checkpoints)
            return place / "params.json", checkpoints
    quantized = sorted(folder.glob("int8.*.safetensors"))
    if quantized and (folder / "params.json").exists():
        return folder / "params.json", quantized
    config = folder / "config.json"
    shards = _safetensors_files(folder) if config.exists() else []
    if shards:
        return config, shards
    for part in folder.glob("*.part"):
        raise UserError(f"{part}: the download is not complete; run python -m llama3_raw.download again to go on")
    raise UserError(
        f"{folder}: no model here; it should hold params.json and consolidated.00.pth (Meta's files, also in a folder "
        "original/), or config.json and *.safetensors (Hugging Face's)"
    )


def _check_numbers(checkpoints: Sequence[Path]) -> None:
    """Raise UserError unless Meta's shards are numbered from 00 on."""
    for number, file in enumerate(checkpoints):
        if file.name != f"consolidated.{number:02}.pth":
            raise UserError(
                f"{file.parent}: consolidated.{number:02}.pth is missing, but {file.name} is there; download the rest"
            )


def _safetensors_files(folder: Path) -> list[Path]:
    """Those that the index names; all of them if there is none."""
    files, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if not index.exists():
        return files
    try:
        named = set(json.loads(read_small_file(index))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a safetensors index ({in_short(repr(error))}); download it again") from error
    for name in sorted(named - {file.name for file in files}, key=str):
        raise UserError(f"{index}: names {in_short(name)}, which is no *.safetensors in its folder; download it")
    return [file for file in files if file.name in named]


def find_tokenizer(folder: Path, given: str | Path | None, params: Params) -> Tokenizer | None:
    """The tokenizer `given`, else that of the folder, else None. Raises UserError where it does not fit the params."""
    candidates = [Path(given)] if given else [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]
    for file in candidates:
        if given or file.exists():
            tokenizer = Tokenizer(file)
            if tokenizer.n_words != params.vocab_size:
                raise UserError(
                    f"{file}: has {tokenizer.n_words} tokens, but the model has {params.vocab_size}; "
                    "give the one that belongs to it as {argument}",
                    argument="tokenizer",
                )
            return tokenizer
    return None
