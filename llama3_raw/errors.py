"""The one error for what a user did wrong."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


class UserError(Exception):
    """What the user asked for cannot be done. The message is one line that names the file or argument and the way out.

    argument: the argument that is wrong, if it is one. The message begins with it; a command shows it as its option.
    """

    def __init__(self, message: str, *, argument: str | None = None):
        super().__init__(message if argument is None else f"{argument} {message}")
        self.message = message
        self.argument = argument


def is_for_the_user(error: Exception) -> bool:
    """Whether an error is one that a user can mend, and not a defect of the program."""
    return _is_out_of_memory(error) or isinstance(error, (UserError, OSError))


def error_line(error: Exception) -> str:
    """An error for the user in one line."""
    message = str(error)
    if _is_out_of_memory(error):
        message = f"out of memory ({in_short(error)}); lower --max-new-tokens or --context, or use fewer --layers"
    if isinstance(error, OSError):
        message = f"{in_short(error.filename or 'output')}: {error.strerror or error}"
    line = " ".join(message.split())
    # a damaged file's bytes should not reach the terminal as control characters
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: a download need not wait for it
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


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
