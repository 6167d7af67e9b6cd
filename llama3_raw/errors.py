"""`UserError`, the one error for a user's mistake."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


class UserError(Exception):
    """A request that cannot be fulfilled. The message is one line: the file or argument, the reason and the way out.

    argument: the function argument that is wrong, or that is the way out; None if there is none. `{argument}` in the
    message stands for it; without that, the message begins with it. A command shows the option instead.
    """

    def __init__(self, message: str, *, argument: str | None = None):
        self.argument = argument
        self._template = message if argument is None or "{argument}" in message else f"{{argument}} {message}"
        super().__init__(self.naming(argument or ""))

    def naming(self, name: str) -> str:
        """Return the message with this name for the argument."""
        return self._template.replace("{argument}", name) if self.argument else self._template


def needed_package(name: str, needed_by: str, extra: str = "bench") -> ModuleType:
    """Import an optional package, one of an extra in pyproject.toml. Raises UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        is_checkout = (Path(__file__).parents[1] / "pyproject.toml").exists()
        everything = f"pip install -e '.[{extra}]'" if is_checkout else f"pip install 'llama3_raw[{extra}]'"
        raise UserError(
            f"{needed_by} needs the package {name} ({in_short(error)}); pip install {name}, or everything that {extra} "
            f"can use: {everything}"
        ) from error


def in_short(what: object) -> str:
    """Return a value or another library's error as part of a message: on one line, short, never empty."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"
