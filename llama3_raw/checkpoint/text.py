"""What a checkpoint says about text: its tokenizer, its chat templates, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, in_short
from ..system.files import read_json, read_small_file
from ..tokenizer import Tokenizer
from .checkpoint import Checkpoint
from .gguf_reading import is_gguf, read_gguf
from .gguf_vocabulary import tokenizer_of_gguf
from .tokenizer_json import read_tokenizer, special_names

_TEMPLATE_KEY = "tokenizer.chat_template"  # in GGUF files


def find_tokenizer(checkpoint: Checkpoint, given: str | Path | None = None) -> Tokenizer | None:
    """Return the tokenizer `given`, or else that of the checkpoint, or else None; with the checkpoint's chat templates.

    In Hugging Face's format tokenizer.json comes before tokenizer.model, which may be that of the base. Rows of the
    embeddings without a token have one that is never encoded. Raises UserError if the model has fewer rows than tokens.
    """
    vocab_size = checkpoint.params.vocab_size
    tokenizer = read_named(Path(given)) if given else _own_tokenizer(checkpoint)
    if tokenizer is None:
        return None
    if not tokenizer.n_words <= vocab_size <= 2 * tokenizer.n_words:  # far more rows: of another model
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.n_words} tokens, but the model has {vocab_size}; "
            "give the model's tokenizer as {argument}",
            argument="tokenizer",
        )
    if tokenizer.n_words < vocab_size:
        tokenizer = tokenizer.padded(vocab_size)
    templates = _gguf_templates(checkpoint) if is_gguf(checkpoint.params_file) else templates_of(checkpoint.folder)
    if given and not templates:
        templates = templates_of(tokenizer.path.parent)
    tokenizer.chat_templates = templates
    return tokenizer


def read_named(path: Path) -> Tokenizer:
    """Read the tokenizer that a user names: a file, a GGUF file, or a folder with one of them."""
    found = _in_gguf(path) if is_gguf(path) else _in_folder(path, is_hf=True) if path.is_dir() else read_tokenizer(path)
    if found is None:
        raise UserError(
            f"{path}: there is no tokenizer in it; give a tokenizer.model or tokenizer.json as {{argument}}",
            argument="tokenizer",
        )
    return found


def _own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    if is_gguf(checkpoint.params_file):
        return tokenizer_of_gguf(checkpoint.params_file, checkpoint.metadata)
    return _in_folder(checkpoint.folder, is_hf=not (checkpoint.folder / "params.json").exists())


def _in_gguf(file: Path) -> Tokenizer | None:
    gguf = read_gguf(file)
    return tokenizer_of_gguf(gguf.file, gguf.metadata)


def _in_folder(folder: Path, is_hf: bool) -> Tokenizer | None:
    """Return the tokenizer of a folder, or None. is_hf: whether tokenizer.json comes first."""
    names = ("tokenizer.json", "tokenizer.model") if is_hf else ("tokenizer.model", "tokenizer.json")
    for name in (*names, "original/tokenizer.model"):
        if (folder / name).exists():
            tokenizer = read_tokenizer(folder / name)
            tokenizer.template_variables = {**tokenizer.template_variables, **special_names(folder)}
            return tokenizer
    return None


def end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the tokens that end a text: those of the model's files, or else of the tokenizer.

    A GGUF file names one or two; as in llama.cpp, those that end a text by their names in its tokenizer do so too.
    """
    of_tokenizer = tokenizer.stop_ids if tokenizer else frozenset[int]()
    if checkpoint.stop_ids is None:
        return of_tokenizer
    return checkpoint.stop_ids | of_tokenizer if is_gguf(checkpoint.params_file) else checkpoint.stop_ids


def templates_of(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder, in Jinja, by name; the usual one is called "default".

    They are in chat_template.jinja and additional_chat_templates/, or in tokenizer_config.json. (apply_chat_template in
    transformers' tokenization_utils_base.py)
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        more = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        files = {"default": file, **more}
        return {name: read_small_file(path).decode("utf-8", errors="replace") for name, path in files.items()}
    found: Any = read_json(config).get("chat_template") if config.exists() else None
    try:
        named = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else {"default": found}
    except (TypeError, KeyError) as error:
        raise UserError(f"{config}: chat_template should be named templates, is {in_short(found)}") from error
    return _checked(config, {name: text for name, text in named.items() if text is not None})


def _gguf_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the chat templates in the metadata of a GGUF file, by name."""
    named = {
        key.removeprefix(_TEMPLATE_KEY).removeprefix(".") or "default": text
        for key, text in checkpoint.metadata.items()
        if key == _TEMPLATE_KEY or key.startswith(f"{_TEMPLATE_KEY}.")
    }
    return _checked(checkpoint.params_file, named)


def _checked(file: Path, templates: Mapping[Any, Any]) -> dict[str, str]:
    """Return chat templates. Raises UserError unless they and their names are text."""
    for name, text in templates.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(f"{file}: chat_template should be text, is {in_short(text)}")
    return dict(templates)
