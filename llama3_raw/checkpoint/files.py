"""Finding the params, the weights and the tokenizer in a model folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError, in_short
from ..params import Params
from ..system.files import read_small_file
from ..tokenizer import Tokenizer

_META_SAFETENSORS = "consolidated.safetensors"


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """Return the params file and the weight files of a model folder. Raises UserError if they are missing.

    Weights in the folder itself come before those in original/, which are the base of a fine-tune.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    for found in _models_in(folder):
        return found
    for part in folder.glob("*.part"):
        raise UserError(f"{part}: the download is not complete; run python -m llama3_raw.download again to continue")
    raise UserError(
        f"{folder}: no model here; it should hold params.json and consolidated.00.pth (Meta's files, also in a "
        "subfolder original/), or config.json and *.safetensors (Hugging Face's)"
    )


def choice_of_files(folder: Path) -> str | None:
    """Return which of several models in a folder `find_files` chose, as text; None if there is only one."""
    models: list[Path] = []
    with contextlib.suppress(UserError):  # of a damaged model that was not chosen
        models += (weight_files[0].relative_to(folder) for _, weight_files in _models_in(folder))
    return f"{models[0]}, not {' or '.join(map(str, models[1:]))}" if len(models) > 1 else None


def _models_in(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the params file and the weight files of each model in a folder, the one to prefer first."""
    yield from _meta_files(folder)
    config = folder / "config.json"
    shards = _safetensors_files(folder) if config.exists() else []
    if shards:
        yield config, shards
    yield from _meta_files(folder / "original")


def _meta_files(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the models with a params.json: Meta's format as .pth or .safetensors, and int8."""
    if not (folder / "params.json").exists():
        return
    checkpoints = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    _check_numbers(checkpoints)
    for files in (checkpoints, sorted(folder.glob(_META_SAFETENSORS)), sorted(folder.glob("int8.*.safetensors"))):
        if files:
            yield folder / "params.json", files


def _check_numbers(checkpoints: Sequence[Path]) -> None:
    """Raise UserError unless Meta's shards are numbered from 00 without gaps."""
    for number, file in enumerate(checkpoints):
        if file.name != f"consolidated.{number:02}.pth":
            raise UserError(
                f"{file.parent}: consolidated.{number:02}.pth is missing, but {file.name} is there; download the rest"
            )


def _safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files that the index names; without one, model.safetensors or else all of them.

    Others are no part of the model: an adapter, the state of an optimizer, a variant in another dtype.
    """
    files = sorted(set(folder.glob("*.safetensors")) - {folder / _META_SAFETENSORS})
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        return [single] if single in files else files
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
