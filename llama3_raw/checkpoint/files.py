"""Finding the files of a model: its params and weights, and which tokens end a text."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..errors import UserError, in_short
from ..quantization.matrix import FORMATS
from ..system.files import read_json, read_small_file
from .gguf_reading import is_gguf

FileFormat = Literal["original", "safetensors"]
"""Meta's files (params.json), or Hugging Face's (config.json)."""

Files = tuple[Path, list[Path]]
"""The params file and the weight files of a model; a GGUF file is both."""

SMALL_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that say which tokens end a text, and how a dialog is formatted."""

_META_SAFETENSORS = "consolidated.safetensors"
_TORCHTUNE = "meta_model_*.pt"
_LATER_PART = re.compile(r"-(?!00001-)[0-9]{5}-of-[0-9]{5}\.gguf$")  # of a split GGUF file


def find_models(path: Path, file_format: FileFormat | None = None) -> list[Files]:
    """Return the models in a folder, the one to prefer first, or the one in a GGUF file.

    Weights in the folder itself come before those in original/, which are the base of a fine-tune. A damaged model
    after the first is left out. file_format: take only Meta's or only Hugging Face's files. Raises UserError if there
    is none.
    """
    if is_gguf(path):
        if file_format is not None:
            raise UserError(f"{path}: is a single file; leave {{argument}} out", argument="format")
        return [(path, [path])]
    if not path.is_dir():
        reason = "not a folder, nor a GGUF file" if path.exists() else "there is no such folder or file"
        raise UserError(f"{path}: {reason}")
    models = (
        files
        for files in _models_in(path)
        if file_format is None or file_format == ("original" if files[0].name == "params.json" else "safetensors")
    )
    found = list(itertools.islice(models, 1))
    with contextlib.suppress(UserError):
        found += models
    if not found:
        raise _nothing_found(path, file_format)
    return found


def _models_in(folder: Path) -> Iterator[Files]:
    """Yield the params file and the weight files of each model in a folder, the one to prefer first."""
    yield from _meta_files(folder)
    config = folder / "config.json"
    if config.exists():
        for files in (_indexed_files(folder, "model", "safetensors"), _indexed_files(folder, "pytorch_model", "bin")):
            if files:
                yield config, files
    yield from _meta_files(folder / "original")
    gguf_files = [file for file in sorted(folder.glob("*.gguf")) if not _LATER_PART.search(file.name)]
    if len(gguf_files) > 1:
        raise UserError(
            f"{folder}: several models: {', '.join(file.name for file in gguf_files)}; name one of the files"
        )
    yield from ((file, [file]) for file in gguf_files)


def _meta_files(folder: Path) -> Iterator[Files]:
    """Yield the models with a params.json: Meta's format as .pth or .safetensors, torchtune's, int8 and int4."""
    if not (folder / "params.json").exists():
        return
    checkpoints = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    _check_numbers(checkpoints)
    tuned = sorted(folder.glob(_TORCHTUNE))
    if len(tuned) > 1 and not checkpoints:
        raise UserError(f"{folder}: several models: {', '.join(file.name for file in tuned)}; keep one of them there")
    for files in (
        checkpoints,
        sorted(folder.glob(_META_SAFETENSORS)),
        *(sorted(folder.glob(f"{name}.*.safetensors")) for name in FORMATS),
        tuned,
    ):
        if files:
            yield folder / "params.json", files


def _check_numbers(checkpoints: Sequence[Path]) -> None:
    """Raise UserError unless Meta's shards are numbered from 00 without gaps."""
    for number, file in enumerate(checkpoints):
        if file.name != f"consolidated.{number:02}.pth":
            raise UserError(
                f"{file.parent}: consolidated.{number:02}.pth is missing, but {file.name} is there; download the rest"
            )


def _indexed_files(folder: Path, stem: str, ending: str) -> list[Path]:
    """Return the weight files of save_pretrained: the single file, or those that the index names, or else all.

    Others are no part of the model: an adapter, the state of an optimizer, a variant in another dtype. (The order of
    _get_resolved_checkpoint_files in transformers' modeling_utils.py)
    """
    is_bin = ending == "bin"  # other programs use that ending too
    files = sorted(set(folder.glob(f"{stem}*.bin" if is_bin else f"*.{ending}")) - {folder / _META_SAFETENSORS})
    index, single = folder / f"{stem}.{ending}.index.json", folder / f"{stem}.{ending}"
    if single in files:
        return [single]
    if not index.exists():
        return [file for file in files if not file.name.startswith("adapter_")]
    try:
        named = set(json.loads(read_small_file(index))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        kind = "" if is_bin else "safetensors "
        raise UserError(f"{index}: not a {kind}index ({in_short(repr(error))}); download it again") from error
    for name in sorted(named - {file.name for file in files}, key=str):
        raise UserError(f"{index}: names {in_short(name)}, which is no *.{ending} in this folder; download it")
    return [file for file in files if file.name in named]


def _nothing_found(folder: Path, file_format: FileFormat | None) -> UserError:
    """Return the error for a folder without a model, with what is there instead and the way out."""
    for part in folder.glob("*.part"):
        return UserError(f"{part}: the download is not complete; run python -m llama3_raw.download again to continue")
    if file_format is not None:
        kind = "params.json with Meta's files" if file_format == "original" else "config.json with *.safetensors"
        return UserError(f"{folder}: there is no {kind} here; leave {{argument}} out", argument="format")
    if (folder / "adapter_config.json").exists():
        return UserError(
            f"{folder}: holds an adapter (adapter_config.json), but not the model that it changes; load that model, "
            "and give this folder as {argument}",
            argument="adapter",
        )
    for pattern, needed in (
        ("*.safetensors", "config.json"),
        ("pytorch_model*.bin", "config.json"),
        ("*.pt*", "params.json"),
    ):
        for file in sorted(folder.glob(pattern)):
            return UserError(f"{folder}: holds {file.name}, but no {needed}, which describes it; add that of the model")
    return UserError(
        f"{folder}: no model here; it should hold params.json and consolidated.00.pth (Meta's files, also in a "
        "subfolder original/), config.json and *.safetensors (Hugging Face's), or a *.gguf"
    )


def stop_ids_of(folder: Path) -> frozenset[int] | None:
    """Return the tokens that end a text by generation_config.json, or else config.json; None if neither says."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.exists():
            continue
        ids = read_json(file).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if any(token is not None and type(token) is not int for token in ids):
            raise UserError(f"{file}: eos_token_id should be token ids, is {in_short(ids)}; download it again")
        if any(token is not None for token in ids):
            return frozenset(token for token in ids if token is not None)
    return None
