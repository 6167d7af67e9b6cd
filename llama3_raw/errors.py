"""The one error for what a user did wrong, and how it is shown: one line on stderr, exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol

FIRST_ONE_SPEAKS = 5.0  # seconds that the first of several processes has to say what is wrong, before another one does
_FOR_SEVERAL_PROCESSES: set[Callable[[Sequence[str]], int]] = set()


class UserError(Exception):
    """What the user asked for cannot be done. The message is one line that names the file or option and the way out."""


class ToldError(UserError):
    """A UserError that has been shown already."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are UserErrors: one line, without the usage text in front of it."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        hint = "; a value that begins with - goes behind a =" if message.endswith("expected one argument") else ""
        raise UserError(f"{message}{hint} (see {self.prog} --help)")


class EntryPoint(Protocol):
    """main(), which takes its arguments from sys.argv unless they are given; -> exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def command_line_tool(main: Callable[[Sequence[str]], int]) -> EntryPoint:
    """Turns main(arguments) -> exit status into a tool's entry point.

    UserError, and what the system refuses (OSError, memory), become one line on stderr and status 2 (a traceback with
    --debug), Ctrl-C ends with status 130, and a reader that closes stdout (`| head -1`) ends the tool without a word.
    """

    def entry_point(arguments: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        # a stream that was closed before the start is None, and print would take stdout for it
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        rank = int(os.environ.get("RANK") or 0) if number_of_processes() > 1 else 0
        if rank > 0:  # the first one speaks
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            if number_of_processes() > 1 and main not in _FOR_SEVERAL_PROCESSES:
                raise UserError("this tool runs as one process; start it without torchrun")
            status = main(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print("\nllama3_raw: stopped by Ctrl-C", file=sys.stderr)
            return 130
        except BrokenPipeError:
            _give_up_stdout()
            return 141
        except Exception as error:
            if "--debug" in arguments or not is_for_the_user(error):
                sys.stderr = sys.__stderr__  # a defect is shown whoever has it
                raise
            if isinstance(error, OSError) and error.filename is None:  # stdout itself, on a full disk say
                _give_up_stdout()
            line = error_line(error)
            if rank > 0 and not isinstance(error, ToldError):
                time.sleep(FIRST_ONE_SPEAKS)  # if the first one says so too, and ends, torchrun ends this one meanwhile
                line, sys.stderr = f"rank {rank}: {line}", sys.__stderr__
            if not isinstance(error, ToldError):
                print(f"llama3_raw: error: {line}", file=sys.stderr)
            return 2

    entry_point.__doc__ = main.__doc__
    return entry_point


def for_several_processes(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Marks the main of a tool that torchrun may start as several processes (see ranks.py)."""
    _FOR_SEVERAL_PROCESSES.add(main)
    return main


def number_of_processes() -> int:
    """How many processes torchrun has started to work together; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


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


def _give_up_stdout() -> None:
    """Python flushes stdout once more at exit; gives it somewhere to write. (docs.python.org, "Note on SIGPIPE")"""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def not_empty(text: str) -> str:
    """The type of options whose text must be there."""
    if not text:
        raise argparse.ArgumentTypeError("should not be empty")
    return text


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


def page_or_pointer(beginning: bytes) -> str | None:
    """What the first bytes of a model file show it to be where it is no such file, in words; else None."""
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # some pages begin with a byte order mark
    if text.startswith(b"<") and not text.startswith(b"<unk>"):
        return "an HTML page (a login or error page, say)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file it points to"
    return None


def read_beginning(path: Path) -> bytes:
    """The first bytes of a model file. Raises UserError where it is missing, empty, or a page or a pointer instead."""
    try:
        if path.exists() and not path.is_file():  # it would wait for a pipe
            raise UserError(f"{path}: is not a file; put the model's file in its place")
        with open(path, "rb") as file:
            beginning = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check its name and your rights to it") from error
    if not beginning:
        raise UserError(f"{path}: the file is empty; download it again")
    other = page_or_pointer(beginning)
    if other:
        way_out = "run `git lfs pull`" if "git-lfs" in other else "download the file itself"
        raise UserError(f"{path}: this is {other}; {way_out}")
    return beginning


def read_small_file(path: Path) -> bytes:
    """A whole file of a kind that is never large. Raises UserError as `read_beginning` does, and for 100 MB or more."""
    read_beginning(path)
    size = path.stat().st_size
    if size >= 100_000_000:
        raise UserError(f"{path}: has {size / 1e6:,.0f} MB, where a few should do; it must be another file")
    return path.read_bytes()


def in_short(what: object) -> str:
    """A value or another library's error as part of a message: on one line, not too long, never without words."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"
