"""Which files of a folder are its params, its weights and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError, in_short
from ..params import Params
from ..system.files import read_small_file
from ..tokenizer import Tokenizer


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
                    "give the one that belongs to it as {argument}",
                    argument="tokenizer",
                )
            return tokenizer
    return None
