"""What makes a main() a command: one line for what a user did wrong, exit status 2, and no traceback."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from ..errors import UserError, in_short
from ..system.processes import PeerLost, rank, world_size

_FIRST_ONE_SPEAKS = 5.0  # seconds that the first of several processes has to say what is wrong, before another one does

_FOR_SEVERAL_PROCESSES: set[Callable[[Sequence[str]], int]] = set()


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
        if rank() > 0:  # the first one speaks
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            if world_size() > 1 and main not in _FOR_SEVERAL_PROCESSES:
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
        except PeerLost:
            return 1
        except Exception as error:
            if "--debug" in arguments or not is_for_the_user(error):
                sys.stderr = sys.__stderr__  # a defect is shown whoever has it
                raise
            _tell(error)
            return 2

    entry_point.__doc__ = main.__doc__
    return entry_point


def _tell(error: Exception) -> None:
    """Print an error that a user can mend, in one line on stderr."""
    if isinstance(error, OSError) and error.filename is None:  # stdout itself, on a full disk say
        _give_up_stdout()
    line = describe(error)
    if rank() > 0:
        time.sleep(_FIRST_ONE_SPEAKS)  # if the first one says so too, torchrun ends this one meanwhile
        line, sys.stderr = f"rank {rank()}: {line}", sys.__stderr__
    print(f"llama3_raw: error: {line}", file=sys.stderr)


def is_for_the_user(error: Exception) -> bool:
    """Whether an error is one that a user can mend, and not a defect of the program."""
    return _is_out_of_memory(error) or isinstance(error, (UserError, OSError))


def describe(error: Exception) -> str:
    """An error for the user in one line. The argument of a function is shown as the option that it comes from."""
    message = str(error)
    if isinstance(error, UserError) and error.argument:
        message = error.naming(f"--{error.argument.replace('_', '-')}")
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


def for_several_processes(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Marks the main of a tool that torchrun may start as several processes (see system/process_groups.py)."""
    _FOR_SEVERAL_PROCESSES.add(main)
    return main


def _give_up_stdout() -> None:
    """Python flushes stdout once more at exit; gives it somewhere to write. (docs.python.org, "Note on SIGPIPE")"""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def not_empty(text: str) -> str:
    """The type of options whose text must be there."""
    if not text:
        raise argparse.ArgumentTypeError("should not be empty")
    return text
