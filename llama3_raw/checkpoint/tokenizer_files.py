"""A tokenizer for other programs: the tokenizer.json of Hugging Face's folders, the vocabulary of a GGUF file.

And the way back to a tokenizer.model.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import tiktoken

from ..errors import UserError
from ..tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from .gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, GgufVocabulary
from .tokenizer_json import BYTE_CHARACTERS, bos_processor

LLAMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""The dialog format of Llama 3 (chat/dialog.py) as a chat template, in Jinja."""

# special tokens that a dialog or a text needs at their place; the others may be numbered reserved tokens
_NEEDED = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_RESERVED = re.compile(r"<\|reserved_special_token_[0-9]+\|>")


_CHARACTERS = dict(enumerate(BYTE_CHARACTERS))  # for str.translate


def byte_text(token: bytes) -> str:
    """Return the bytes of a token with a character for each, as tokenizer.json and GGUF files have them."""
    return token.decode("latin-1").translate(_CHARACTERS)


def merges_of(ranks: Mapping[bytes, int]) -> list[str]:
    """Return every way to make a token of two others, as "left right", in the order of the ranks.

    Those of one token are in the order of their parts' ranks. (TikTokenConverter in transformers'
    convert_slow_tokenizer.py)
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [f"{byte_text(left)} {byte_text(right)}" for left, right in pairs]
    return merges


def is_llama3(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer splits and merges as one of tokenizer.model does."""
    return isinstance(tokenizer.encoding, tiktoken.Encoding)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json that gives the same tokens, for one of which `has_llama3_tokens` holds."""
    bos = tokenizer.special_tokens["<|begin_of_text|>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": name,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": True,
            }
            for name, token in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "Sequence", "processors": [byte_level, bos_processor("<|begin_of_text|>", bos)]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {byte_text(token): rank for token, rank in tokenizer.ranks.items()},
            "merges": merges_of(tokenizer.ranks),
        },
    }


def tokenizer_files(tokenizer: Tokenizer, max_seq_len: int, chat_template: str | None) -> dict[str, dict[str, Any]]:
    """Return the files with which AutoTokenizer of transformers makes the same tokenizer: name -> content.

    For a tokenizer of which `has_llama3_tokens` holds.
    """
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # LlamaForCausalLM knows no token types
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": config,
        "special_tokens_map.json": names,
    }


def has_llama3_tokens(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer.model gives the same tokens: `is_llama3`, with its 256 special tokens and no others.

    The reserved ones may have other numbers, which differ between Llama 3, Llama 3.1 and Meta's code.
    """
    n_ranks, n_special = len(tokenizer.ranks), len(SPECIAL_TOKENS)
    by_id = {token: name for name, token in tokenizer.special_tokens.items()}
    return (
        is_llama3(tokenizer)
        and tokenizer.bos_id is not None  # a tokenizer.model always means a begin-of-text
        and not tokenizer.added_tokens
        and sorted(tokenizer.ranks.values()) == list(range(n_ranks))
        and sorted(by_id) == list(range(n_ranks, n_ranks + n_special))
        and all(
            by_id[token] == name or (name not in _NEEDED and _RESERVED.fullmatch(by_id[token]) is not None)
            for token, name in enumerate(SPECIAL_TOKENS, start=n_ranks)
        )
    )


def tokenizer_model(tokenizer: Tokenizer) -> str:
    """Return the text of a tokenizer.model, for a tokenizer of which `has_llama3_tokens` holds."""
    ranks = tokenizer.ranks
    return "".join(
        f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in sorted(ranks, key=ranks.__getitem__)
    )


def gguf_vocabulary(
    tokenizer: Tokenizer, n_tokens: int, chat_template: str | None, stop_ids: frozenset[int] | None
) -> GgufVocabulary:
    """Return the vocabulary of a GGUF file with which llama.cpp makes the same tokens.

    n_tokens: the rows of the embeddings. stop_ids: the tokens that end a text by the model's files. Raises UserError
    for a tokenizer that does not split and merge as Llama 3's does.
    """
    if not is_llama3(tokenizer):
        raise UserError(
            f"{tokenizer.path}: splits or merges a text in another way than Llama 3's tokenizer, and no other can be "
            "written into a GGUF file here; use llama.cpp's convert_hf_to_gguf.py"
        )
    kinds = {
        **{token: (byte_text(content), NORMAL) for content, token in tokenizer.ranks.items()},
        **{token: (name, CONTROL) for name, token in tokenizer.special_tokens.items()},
        **{token: (name, USER_DEFINED) for name, token in tokenizer.added_tokens.items()},
    }
    entries = [kinds.get(token, (f"<|unused_{token}|>", UNUSED)) for token in range(n_tokens)]
    eos_id = min(stop_ids) if stop_ids and tokenizer.eos_id not in stop_ids else tokenizer.eos_id
    return GgufVocabulary(
        model="gpt2",
        pre="llama-bpe",
        tokens=[text for text, _ in entries],
        types=[kind for _, kind in entries],
        merges=merges_of(tokenizer.ranks),
        bos_id=tokenizer.special_tokens.get("<|begin_of_text|>", tokenizer.bos_id),
        eos_id=eos_id,
        eot_id=tokenizer.eot_id,
        eom_id=tokenizer.eom_id,
        add_bos=tokenizer.bos_id is not None,
        chat_template=chat_template,
    )
