"""Meta's dialog format as plain functions, and dialogs in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..system.files import atomic_write
from ..tokenizer import Tokenizer
from ..weights import Model


class Message(NamedTuple):
    """What one side of a dialog says. role: system, user or assistant."""

    role: str
    content: str


def encode_header(tokenizer: Tokenizer, role: str) -> list[int]:
    """The tokens before what a role says."""
    start, end = (tokenizer.special_tokens[f"<|{side}_header_id|>"] for side in ("start", "end"))
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Header, content, <|eot_id|>. Names of special tokens in the content are plain text.

    The content goes without the space around it, as in Meta's llama3 repository (ChatFormat in llama/tokenizer.py) and
    in the template of the models on Hugging Face; the later llama-models leaves the space there.
    """
    header = encode_header(tokenizer, message.role)
    return [*header, *tokenizer.encode(message.content.strip()), tokenizer.eot_id]


def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A dialog -> the prompt to which the model gives the next answer: it ends with the assistant's header.

    (encode_dialog_prompt in ChatFormat. The template of Llama 3.1 on Hugging Face also makes up a system message with
    dates; Meta's code does not, nor does this.)
    """
    ids = [tokenizer.bos_id]
    for message in messages:
        ids += encode_message(tokenizer, message)
    return ids + encode_header(tokenizer, "assistant")


def is_base_model(model: Model) -> bool:
    """Whether the model has never been trained on this format: whether its tokens are embedded like unused ones.

    Rows of tokens that training never met stay where they began, or move all together where embeddings are tied (in
    Llama 3 8B they are next to zero: github.com/meta-llama/llama3/issues/77). Nothing else tells in Meta's files: those
    of a base and of an Instruct model differ in the weights alone, and a folder may have any name.
    """
    assert model.tokenizer is not None
    embeddings, special = model.weights.tok_embeddings, model.tokenizer.special_tokens
    unused = embeddings[-100:].float()  # [100, dim]: reserved in every Llama 3
    format_ids = [special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")]
    centre = unused.mean(dim=0)
    farthest_unused = (unused - centre).norm(dim=-1).max()
    distances = (embeddings[format_ids].float() - centre).norm(dim=-1)  # [3]
    return bool((distances <= 2 * farthest_unused).all())


def read_dialog(file: Path) -> list[Message]:
    """[{"role": …, "content": …}, …] in JSON -> the messages: maybe one of the system, then user and assistant in turn.

    Raises UserError naming what is wrong.
    """
    try:
        if not file.is_file():  # it would wait for a pipe or a terminal
            raise UserError(f"{file}: {'is not a file' if file.exists() else 'there is no such file'}; check its name")
        content = json.loads(file.read_bytes())
        if not isinstance(content, list):
            raise TypeError(f"is a {type(content).__name__}")
        # encode: half a character ("\ud800") is valid JSON, but no text
        messages = [Message(entry["role"], entry["content"].encode().decode()) for entry in content]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{file}: not a dialog, [{{"role": "user", "content": "…"}}, …] in JSON ({error})') from error
    said = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(said):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            place = i + 1 + len(messages) - len(said)
            raise UserError(f"{file}: message {place} should have the role {expected!r}, has {message.role!r}")
    if len(said) % 2:
        raise UserError(f"{file}: the last question has no answer; add one, or take the question out")
    return messages


def write_dialog(file: Path, messages: Sequence[Message]) -> None:
    """Write what `read_dialog` reads. Raises UserError, and leaves what is there, if that is no dialog."""
    content = json.dumps([message._asdict() for message in messages], ensure_ascii=False, indent=1)
    with atomic_write(file) as part:
        try:
            if file.exists():
                read_dialog(file)
        except UserError as error:
            raise UserError(f"{error}; not replaced, choose another name") from error
        part.write_text(content + "\n", encoding="utf-8")


def warn_of_base_model(model: Model) -> None:
    """Print a line on stderr if the model, of which a chat is asked, is a base model."""
    if is_base_model(model):
        print(
            "llama3_raw: warning: a base model, it seems, not trained to answer; choose an Instruct model for a chat",
            file=sys.stderr,
        )
