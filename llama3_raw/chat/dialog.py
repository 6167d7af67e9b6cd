"""Meta's dialog format, and dialogs in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ..errors import UserError
from ..quantization.matrix import embed, tensors_of
from ..system.files import atomic_write
from ..tokenizer import Tokenizer
from ..weights import Model

BEGIN_OF_TEXT = "<|begin_of_text|>"
FORMAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


class Message(NamedTuple):
    """A message of a dialog. role: system, user or assistant."""

    role: str
    content: str


class Exchange(NamedTuple):
    """A question, its answer, and, in Llama 3's format, the tokens of both, the answer's as they were generated."""

    question: str
    answer: str
    ids: list[int]


def as_messages(system: str, exchanges: Sequence[Exchange]) -> list[Message]:
    """Return the messages of a dialog. system: the first one's content; "" is none."""
    messages = [Message("system", system)] if system else []
    for exchange in exchanges:
        messages += [Message("user", exchange.question), Message("assistant", exchange.answer)]
    return messages


class DialogFormat(Protocol):
    """How a dialog becomes tokens: Llama 3's format, or a template of the model's own."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer besides the model's own."""

    def dialog(self, system: str, exchanges: Sequence[Exchange]) -> list[int]:
        """Return the tokens of a dialog so far."""

    def prompt(self, system: str, exchanges: Sequence[Exchange], question: str) -> list[int]:
        """Return the tokens of a dialog, a question, and the beginning of the answer."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of messages, and of the beginning of the answer."""


class Llama3Format:
    """Llama 3's own dialog format."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises UserError for a tokenizer without the tokens of the format."""
        for name in (BEGIN_OF_TEXT, *FORMAT_TOKENS):
            if name not in tokenizer.special_tokens:
                raise UserError(
                    f"{tokenizer.path}: has no {name}, which Llama 3's dialogs need, and no chat template; give the "
                    "model's own as {argument}",
                    argument="template",
                )
        self._tokenizer = tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """<|eot_id|> and <|eom_id|>."""
        return frozenset(id for id in (self._tokenizer.eot_id, self._tokenizer.eom_id) if id is not None)

    def dialog(self, system: str, exchanges: Sequence[Exchange]) -> list[int]:
        """Return the tokens of a dialog so far."""
        begin = self._tokenizer.special_tokens[BEGIN_OF_TEXT]
        ids = [begin, *(encode_message(self._tokenizer, Message("system", system)) if system else ())]
        for exchange in exchanges:
            ids += exchange.ids
        return ids

    def prompt(self, system: str, exchanges: Sequence[Exchange], question: str) -> list[int]:
        """Return the tokens of a dialog, a question, and the header of the answer."""
        asked = encode_message(self._tokenizer, Message("user", question))
        return [*self.dialog(system, exchanges), *asked, *encode_header(self._tokenizer, "assistant")]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of messages, and of the header of the answer."""
        return encode_dialog(self._tokenizer, messages)


def encode_header(tokenizer: Tokenizer, role: str) -> list[int]:
    """Return the tokens before the content of a message."""
    start, end = (tokenizer.special_tokens[f"<|{side}_header_id|>"] for side in ("start", "end"))
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Return the tokens of header, content and <|eot_id|>. Names of special tokens in the content are plain text.

    Space around the content is stripped, as in Meta's llama3 repository (ChatFormat in llama/tokenizer.py) and in the
    template of the models on Hugging Face; the later llama-models keeps it.
    """
    header = encode_header(tokenizer, message.role)
    return [*header, *tokenizer.encode(message.content.strip()), tokenizer.special_tokens["<|eot_id|>"]]


def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the prompt for the next answer: the dialog, then the assistant's header. (ChatFormat.encode_dialog_prompt)

    The template of Llama 3.1 on Hugging Face also adds a system message with dates. Meta's code does not, and neither
    does this.
    """
    ids = [tokenizer.special_tokens[BEGIN_OF_TEXT]]
    for message in messages:
        ids += encode_message(tokenizer, message)
    return ids + encode_header(tokenizer, "assistant")


def is_base_model(model: Model) -> bool:
    """Whether the model was never trained on this format: whether the format's tokens are embedded like unused ones.

    The embeddings of tokens that training never saw keep their initial values, or move all together if they are tied to
    the output (in Llama 3 8B they are close to zero: github.com/meta-llama/llama3/issues/77). Meta's files have no
    other sign: a base and an Instruct model differ only in the weights, and a folder may have any name.
    """
    assert model.tokenizer is not None
    if any(name not in model.tokenizer.special_tokens for name in FORMAT_TOKENS):
        return False
    embeddings, special = model.weights.tok_embeddings, model.tokenizer.special_tokens
    reserved = sorted(token for name, token in special.items() if name.startswith("<|reserved_special_token_"))
    if len(reserved) < 100:
        return False
    rows = torch.arange(embeddings.shape[0], device=tensors_of(embeddings)[0].device)
    unused = embed(rows[reserved[-100:]], embeddings).float()  # [100, dim]
    format_ids = [special[name] for name in FORMAT_TOKENS]
    centre = unused.mean(dim=0)
    farthest_unused = (unused - centre).norm(dim=-1).max()
    distances = (embed(rows[format_ids], embeddings).float() - centre).norm(dim=-1)  # [3]
    return bool((distances <= 2 * farthest_unused).all())


def read_dialog(file: Path) -> list[Message]:
    """Read a dialog, [{"role": …, "content": …}, …] in JSON: at most one system message, then user and assistant.

    Raises UserError if the file cannot be read, or is not such a dialog with an answer to every question.
    """
    try:
        if not file.is_file():  # reading a pipe or a terminal would wait
            raise UserError(f"{file}: {'is not a file' if file.exists() else 'there is no such file'}; check its name")
        content = json.loads(file.read_bytes())
        if not isinstance(content, list):
            raise TypeError(f"is a {type(content).__name__}")
        # encode: a lone surrogate ("\ud800") is valid JSON, but not text
        messages = [Message(entry["role"], entry["content"].encode().decode()) for entry in content]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{file}: not a dialog, [{{"role": "user", "content": "…"}}, …] in JSON ({error})') from error
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            number = i + 1 + len(messages) - len(turns)
            raise UserError(f"{file}: message {number} should have the role {expected!r}, has {message.role!r}")
    if len(turns) % 2:
        raise UserError(f"{file}: the last question has no answer; add one, or remove the question")
    return messages


def write_dialog(file: Path, messages: Sequence[Message]) -> None:
    """Write a dialog for `read_dialog`. Raises UserError, and keeps an existing file, if that is not a dialog."""
    content = json.dumps([message._asdict() for message in messages], ensure_ascii=False, indent=1)
    with atomic_write(file) as part:
        try:
            if file.exists():
                read_dialog(file)
        except UserError as error:
            raise UserError(f"{error}; not replaced, choose another name") from error
        part.write_text(content + "\n", encoding="utf-8")


def warn_of_base_model(model: Model) -> None:
    """Print a warning on stderr if the model, which is used for a chat, is a base model."""
    if is_base_model(model):
        print(
            "llama3_raw: warning: a base model, it seems, not trained to answer; use an Instruct model for a chat",
            file=sys.stderr,
        )
