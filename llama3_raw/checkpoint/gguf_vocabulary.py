"""The vocabulary in a GGUF file, and the tokenizer made from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, in_short
from ..tokenizer import SPLIT_PATTERN, Tokenizer
from .gguf_header import StringArray
from .tokenizer_json import bos_processor, tokenizer_from_json

_KEY = "tokenizer.ggml."

# types of tokens (llama_token_type in llama.h)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# control tokens that end a text, whichever ids the file names (special_eog_ids in llama.cpp's llama-vocab.cpp)
_ENDS = {"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "</s>"}


class GgufVocabulary(NamedTuple):
    """What a GGUF file says about its tokenizer, unchanged."""

    model: str  # gpt2: byte-level BPE; llama: SentencePiece
    pre: str  # the name of the pattern that splits a text, such as llama-bpe
    tokens: list[str]  # by id; in an ordinary token of gpt2 every byte is a character (bytes_to_unicode of GPT-2)
    types: list[int]  # by id
    merges: list[str]  # "left right", the most frequent first
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    add_bos: bool | None  # whether a text begins with bos_id; None: the file does not say
    chat_template: str | None

    @property
    def special_names(self) -> dict[str, str]:
        """bos_token and eos_token, as tokenizer_config.json has them."""
        special = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {name: self.tokens[token] for name, token in special.items() if token is not None}

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text or an answer."""
        named = {self.eos_id, self.eot_id, self.eom_id} - {None}
        by_text = {i for i, kind in enumerate(self.types) if kind == CONTROL and self.tokens[i] in _ENDS}
        return frozenset(token for token in named | by_text if token is not None)


def read_vocabulary(file: Path, metadata: Mapping[str, Any]) -> GgufVocabulary | None:
    """Return the vocabulary in the metadata of a file; None without one, or with write_gguf's placeholder for one.

    Raises UserError if it is damaged.
    """
    tokens = _strings(file, metadata, "tokens")
    if not tokens or all(token == f"t{number}" for number, token in enumerate(tokens)):
        return None
    types = metadata.get(_KEY + "token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(f"{file}: {_KEY}token_type should be {len(tokens)} numbers; download the file again")
    add_bos, template = metadata.get(_KEY + "add_bos_token"), metadata.get("tokenizer.chat_template")
    bos_id, eos_id, eot_id, eom_id = (
        _token_id(file, metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom")
    )
    return GgufVocabulary(
        model=str(metadata.get(_KEY + "model")),
        pre=str(metadata.get(_KEY + "pre", "default")),
        tokens=tokens,
        types=types,
        merges=_strings(file, metadata, "merges"),
        bos_id=bos_id,
        eos_id=eos_id,
        eot_id=eot_id,
        eom_id=eom_id,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=template if isinstance(template, str) else None,
    )


def stop_ids_in(metadata: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the tokens that end a text by the metadata of a file; None if it names none."""
    ids = (metadata.get(f"{_KEY}{name}_token_id") for name in ("eos", "eot", "eom"))
    return frozenset(token for token in ids if isinstance(token, int)) or None


def _strings(file: Path, metadata: Mapping[str, Any], name: str) -> list[str]:
    array = metadata.get(_KEY + name)
    if array is not None and not isinstance(array, StringArray):
        raise UserError(f"{file}: {_KEY}{name} should be texts, is {in_short(array)}; download the file again")
    return [] if array is None else array.read()


def _token_id(file: Path, metadata: Mapping[str, Any], name: str, n_tokens: int) -> int | None:
    """Return the id of a special token, or None if the file names none."""
    token = metadata.get(_KEY + name)
    if token is None:
        return None
    if not isinstance(token, int) or not 0 <= token < n_tokens:
        raise UserError(
            f"{file}: {_KEY}{name} = {in_short(token)} is not one of {n_tokens} tokens; download the file again"
        )
    return token


# how a text is split before bytes are merged, by tokenizer.ggml.pre: patterns that are applied one after the other
# (llm_tokenizer_bpe in llama.cpp's llama-vocab.cpp)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PATTERNS = {**dict.fromkeys(_LLAMA3_NAMES, (SPLIT_PATTERN,)), "gpt-2": (_GPT2,), "smollm": (r"\p{N}", _GPT2)}


def tokenizer_of_gguf(file: Path, metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer in the metadata of a file, or None without a vocabulary.

    Raises UserError if it is damaged, or if it is not byte-level BPE with a known pattern.
    """
    vocabulary = read_vocabulary(file, metadata)
    if vocabulary is None:
        return None
    if vocabulary.model != "gpt2" or vocabulary.pre not in _PATTERNS:
        key, value = ("model", vocabulary.model) if vocabulary.model != "gpt2" else ("pre", vocabulary.pre)
        what = {"llama": " (SentencePiece)", "default": " (an unknown pattern)"}.get(value, "")
        raise UserError(
            f"{file}: {_KEY}{key} = {in_short(repr(value))}{what} is not supported; use token ids, or give the model's "
            "tokenizer.json as {argument}",
            argument="tokenizer",
        )
    tokenizer = tokenizer_from_json(file, as_tokenizer_json(vocabulary), vocabulary.special_names)
    tokenizer.stop_ids = vocabulary.stop_ids
    return tokenizer


def as_tokenizer_json(vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the same tokens. Those that are unused have no entry in it."""
    patterns = _PATTERNS[vocabulary.pre]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = list(enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)))
    adds_bos = vocabulary.pre in _LLAMA3_NAMES if vocabulary.add_bos is None else vocabulary.add_bos
    bos_id = vocabulary.bos_id if adds_bos else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": text, **added, "special": kind == CONTROL}
            for token, (text, kind) in entries
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*({**split, "pattern": {"Regex": pattern}} for pattern in patterns), byte_level],
        },
        "post_processor": None if bos_id is None else bos_processor(vocabulary.tokens[bos_id], bos_id),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": vocabulary.pre in _LLAMA3_NAMES,  # whether a piece that is a token is that token
            "vocab": {text: token for token, (text, kind) in entries if kind != UNUSED},
            "merges": [merge.split(" ") for merge in vocabulary.merges],
        },
    }
