"""Train a tokenizer: byte-pair encoding learned from a text, in the format of Meta's tokenizer.model."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from llama3_raw import Tokenizer, UserError
from llama3_raw.errors import needed_package
from llama3_raw.system.files import atomic_write
from llama3_raw.tokenizer import SPLIT_PATTERN


def train_tokenizer(texts: Sequence[str], n_ranks: int, file: Path) -> Tokenizer:
    """Learn byte-pair merges from the texts and write them in the format of Meta's tokenizer.model.

    n_ranks: the number of tokens, the 256 single bytes included. Raises UserError if the texts give fewer.
    """
    needed_package("tokenizers", "training a tokenizer", "examples")
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=True)
    trainable.train_from_iterator(texts, trainer)
    merged = sorted(trainable.get_vocab().items(), key=lambda entry: entry[1])
    # ByteLevel writes each byte as a printable character: printable bytes as themselves, others from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(to_byte[character] for character in token) for token, _ in merged if len(token) > 1]
    if len(tokens) < n_ranks:
        raise UserError(
            f"the text gives {len(tokens)} tokens, but vocab_size needs {n_ranks}; give more text, or --params with "
            "a smaller vocab_size"
        )
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    with atomic_write(file) as part:
        part.write_bytes(lines)
    return Tokenizer(file)
