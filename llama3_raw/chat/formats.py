"""Which dialog format a model has, and which tokens end its answers."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UserError
from ..system.files import read_small_file
from ..tokenizer import Tokenizer
from .dialog import DialogFormat, Llama3Format, Message
from .template import ChatTemplate

LLAMA3 = "llama3"


def format_of(tokenizer: Tokenizer, template: str | None = None) -> DialogFormat:
    """Return Llama 3's dialog format, or the chat template of the model.

    template: "llama3", the name of one of the tokenizer's templates, or a file with a Jinja template; None takes the
    tokenizer's, unless it is Llama 3's. Raises UserError if it cannot be used, and if the tokenizer has neither a
    template nor the tokens of Llama 3's format.
    """
    named = tokenizer.chat_templates
    if template == LLAMA3 or (template is None and not named):
        return Llama3Format(tokenizer)
    if template is None and "default" not in named:
        raise UserError(
            f"{tokenizer.path}: its chat templates are {', '.join(named)}; name one as {{argument}}",
            argument="template",
        )
    name = template or "default"
    if name not in named:
        return ChatTemplate(read_small_file(Path(name)).decode("utf-8", errors="replace"), tokenizer, name)
    called = "" if name == "default" else f" {name}"
    own = ChatTemplate(named[name], tokenizer, f"the chat template{called} of {tokenizer.path}")
    return Llama3Format(tokenizer) if _is_llama3(own, tokenizer) else own


def _is_llama3(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a template formats a dialog as Llama 3's does, with a system message and without."""
    try:
        llama3 = Llama3Format(tokenizer)
        messages = [Message("user", " 1 + 1?"), Message("assistant", "2"), Message("user", "Why?")]
        dialogs = (messages, [Message("system", "Be brief. "), *messages])
        return all(template.encode(dialog) == llama3.encode(dialog) for dialog in dialogs)
    except UserError:
        return False


def note_format(dialog_format: DialogFormat) -> None:
    """Print which chat template is used on stderr, unless it is Llama 3's."""
    if isinstance(dialog_format, ChatTemplate):
        print(f"llama3_raw: dialogs are formatted by {dialog_format.source}", file=sys.stderr)
