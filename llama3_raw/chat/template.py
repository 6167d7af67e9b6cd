"""`ChatTemplate`: the dialog format of a model that brings its own, as a Jinja template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NoReturn

from ..errors import UserError, in_short
from ..tokenizer import Tokenizer
from .dialog import Exchange, Message, as_messages

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # that Unicode leaves to programs


class ChatTemplate:
    """A chat template, rendered as transformers' `apply_chat_template` does, in a sandbox.

    The names of special tokens in the template become these tokens; in a message they stay text. So do, in what is not
    an answer of the model, other added tokens that the template uses, as some delimiters are not marked as special.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, source: str = "the chat template"):
        """text: the Jinja template. source: what errors call it. Raises UserError if it is not a template."""
        self.source = source
        self._tokenizer = tokenizer
        self._text = text
        self._template = self._compiled(text)
        self._special = _any_of(tokenizer.special_tokens)
        self._delimiters = _any_of(name for name in tokenizer.added_tokens if name in text)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer besides the model's own: also <|eot_id|> after Llama 3's headers."""
        tokenizer = self._tokenizer
        has_headers = "<|start_header_id|>" in self._text
        ids = (tokenizer.eos_id, *((tokenizer.eot_id, tokenizer.eom_id) if has_headers else ()))
        return frozenset(token for token in ids if token is not None)

    def dialog(self, system: str, exchanges: Sequence[Exchange]) -> list[int]:
        """Return the tokens of a dialog so far."""
        messages = as_messages(system, exchanges)
        return self.encode(messages, with_header=False) if exchanges else []  # a template may refuse no question

    def prompt(self, system: str, exchanges: Sequence[Exchange], question: str) -> list[int]:
        """Return the tokens of a dialog, a question, and the beginning of the answer."""
        return self.encode([*as_messages(system, exchanges), Message("user", question)])

    def encode(self, messages: Sequence[Message], with_header: bool = True) -> list[int]:
        """Return the tokens of messages. with_header: then those that begin an answer (add_generation_prompt).

        Raises UserError if the template refuses the messages.
        """
        used = {*self._text, *"".join(message.content for message in messages)}
        mark, cut, *_ = (*(character for character in _NONCHARACTERS if character not in used), None, None)
        if mark is None or cut is None:
            raise UserError("a message holds Unicode's noncharacters U+FDD0 to U+FDEF; leave them out")
        # a character inside the name of a token keeps it apart from those of the template
        marked = []
        for role, content in messages:
            content = self._special.sub(lambda name: f"{name[0][0]}{mark}{name[0][1:]}", content)
            if role != "assistant":
                content = self._delimiters.sub(lambda name: f"{name[0][0]}{cut}{name[0][1:]}", content)
            marked.append({"role": role, "content": content})
        rendered = self._rendered(marked, with_header)
        ids: list[int] = []
        end = 0
        for name in (*self._special.finditer(rendered), None):
            for text in rendered[end : name.start() if name else None].replace(mark, "").split(cut):
                ids += self._tokenizer.encode(text)
            if name is not None:
                ids.append(self._tokenizer.special_tokens[name[0]])
                end = name.end()
        if not ids:
            raise UserError(f"{self.source} makes nothing of these messages; give {{argument}}", argument="template")
        return ids

    def _rendered(self, messages: list[dict[str, str]], with_header: bool) -> str:
        variables = {**self._tokenizer.template_variables, "add_generation_prompt": with_header}
        try:
            return str(self._template.render(messages=messages, tools=None, documents=None, **variables))
        except Exception as error:  # a template may fail in any way
            raise UserError(
                f"{self.source} cannot format these messages: {in_short(error)}; change them, or give {{argument}}",
                argument="template",
            ) from error

    def _compiled(self, text: str) -> Any:
        """Return the template in the environment that transformers gives it. (utils/chat_template_utils.py)"""
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(jinja2.ext.Extension):
            """{% generation %} marks what a model is trained on; its content stays."""

            tags = {"generation"}  # noqa: RUF012  # jinja2 expects a set

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        try:
            return environment.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(
                f"{self.source}: not a Jinja template ({in_short(error)}); give another as {{argument}}",
                argument="template",
            ) from error


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of these names, the longest first, as in tokenizers."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """Replace jinja2's filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _refuse(message: str) -> NoReturn:
    """raise_exception of a template."""
    raise ValueError(message)
