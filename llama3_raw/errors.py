"""The one error for what a user did wrong."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """What the user asked for cannot be done. The message is one line that names the file or argument and the way out.

    argument: the function argument that is wrong, or that is the way out, if there is one. The message has {argument}
    in its place, or else begins with it, so that a command can show the option that it comes from.
    """

    def __init__(self, message: str, *, argument: str | None = None):
        self.argument = argument
        self._template = message if argument is None or "{argument}" in message else f"{{argument}} {message}"
        super().__init__(self.naming(argument or ""))

    def naming(self, name: str) -> str:
        """The message with this name for the argument."""
        return self._template.replace("{argument}", name) if self.argument else self._template


def needed_package(name: str, needed_by: str, extra: str = "bench") -> ModuleType:
    """The package, which is none of those that llama3_raw always brings, but one of an extra. (See pyproject.toml)

    Raises UserError where it is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs the package {name} ({in_short(error)}); pip install {name}, or all that {extra} can "
            f"use: pip install -e '.[{extra}]'"
        ) from error


def in_short(what: object) -> str:
    """A value or another library's error as part of a message: on one line, not too long, never without words."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"
