"""What every command's main() shares: its parser, and errors as one line on stderr with exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from ..errors import UserError, in_short
from ..system.processes import PeerLost, rank, world_size

_OTHERS_REPORT_FIRST = 5.0  # seconds to wait with an error that another process may report, so that it is shown once

_OPTIONS = {"max_seq_len": "--max-new-tokens or --context", "tensor_parallel": "--tp"}
"""Arguments of the library whose options have other names."""

_WITH_OTHER_PARSERS = {"lm_eval", "--estimate"}
"""Arguments with which a command hands the others to another parser."""

_FOR_SEVERAL_PROCESSES: set[Callable[[Sequence[str]], int]] = set()


class HelpFormatter(argparse.HelpFormatter):
    """Up to 100 columns, with most options on one line; paragraphs with indented lines keep their line breaks."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27, width=min(100, shutil.get_terminal_size((100, 24)).columns))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (part if "\n  " in part else textwrap.fill(part, width) for part in text.strip().split("\n\n"))
        return "\n\n".join(paragraphs)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises UserError with one line, without the usage text before it."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; write --option=VALUE for a value that begins with -"
        raise UserError(f"{message} (see {self.prog} --help)")


def answer_help(
    module: str, build_parser: Callable[[], argparse.ArgumentParser], arguments: Sequence[str] | None = None
) -> None:
    """Answer --help and --version, and exit, if `module` is the one that Python runs.

    It is called before the imports of torch, which take seconds. arguments: by default those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    names = {argument.partition("=")[0] for argument in arguments}
    if module != "__main__" or "WORLD_SIZE" in os.environ or names & _WITH_OTHER_PARSERS:
        return  # of several processes, only the first answers
    _replace_unknown_characters()
    if names & {"-h", "--help", "--version"}:
        with contextlib.suppress(UserError):  # main() reports it
            build_parser().parse_args(arguments)


def _replace_unknown_characters() -> None:
    """Let a console or pipe that cannot show a character get a "?"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class EntryPoint(Protocol):
    """main(): takes its arguments from sys.argv unless they are given, and returns the exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def command_line_tool(main: Callable[[Sequence[str]], int]) -> EntryPoint:
    """Turn main(arguments), which returns an exit status, into the entry point of a command.

    UserError, OSError and a lack of memory become one line on stderr and status 2 (with --debug, a traceback). Ctrl-C
    gives status 130. If the reader of stdout goes away (`| head -1`), the command ends silently with status 141.
    """

    def entry_point(arguments: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        # a stream that was closed before the start is None, and print would take stdout for it
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        _replace_unknown_characters()
        number = 0  # of this process
        try:
            number = rank()
            if number > 0:  # rank 0 reports
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            if world_size() > 1 and main not in _FOR_SEVERAL_PROCESSES:
                raise UserError("this tool runs as one process; start it without torchrun, or unset WORLD_SIZE")
            _check_utf8(arguments)
            status = main(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            print("\nllama3_raw: stopped by Ctrl-C", file=sys.stderr)
            return 130
        except BrokenPipeError:
            _give_up_stdout()
            return 141
        except PeerLost as error:
            if "--debug" in arguments:
                raise
            time.sleep(_OTHERS_REPORT_FIRST)  # if another process failed, torchrun ends this one meanwhile
            print(f"llama3_raw: error: the exchange with other processes failed: {in_short(error)}", file=sys.stderr)
            return 1
        except Exception as error:
            if "--debug" in arguments or not is_for_the_user(error):
                sys.stderr = sys.__stderr__  # a defect is shown on every rank
                raise
            _tell(error, number)
            return 2

    entry_point.__doc__ = main.__doc__
    return entry_point


def _check_utf8(arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that is not UTF-8, unless it is the name of a file, which may be any bytes."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if not (argument.startswith("--") and equals):
            option, value = before, argument
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:  # Python makes lone surrogates of such bytes
            if not os.path.lexists(value):
                what = option if option.startswith("--") else value
                raise UserError(f"{what}: not valid UTF-8; convert the text to UTF-8") from error


def _tell(error: Exception, rank: int) -> None:
    """Print an error that the user can fix, in one line on stderr. rank: of this process."""
    if isinstance(error, OSError) and error.filename is None:  # stdout itself, for example on a full disk
        _give_up_stdout()
    line = describe(error)
    if rank > 0:
        time.sleep(_OTHERS_REPORT_FIRST)  # if rank 0 reports it too, torchrun ends this process meanwhile
        line, sys.stderr = f"rank {rank}: {line}", sys.__stderr__
    print(f"llama3_raw: error: {line}", file=sys.stderr)


def is_for_the_user(error: Exception) -> bool:
    """Whether the user can fix an error, which is then not a defect of the program."""
    return _is_out_of_memory(error) or isinstance(error, (UserError, OSError))


def describe(error: Exception) -> str:
    """Return an error as one line. An argument of the library is shown as the option that sets it."""
    message = str(error)
    if isinstance(error, UserError) and error.argument:
        message = error.naming(_OPTIONS.get(error.argument, f"--{error.argument.replace('_', '-')}"))
    if _is_out_of_memory(error):
        message = f"out of memory ({in_short(error)}); lower --max-new-tokens or --context, or use fewer --layers"
    if isinstance(error, OSError):
        message = f"{in_short(error.filename or 'output')}: {error.strerror or error}"
    line = " ".join(message.split())
    # bytes of a damaged file must not reach the terminal as control characters
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported here, because download does without it
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def for_several_processes(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Mark the main of a command that torchrun may start in several processes (see system/process_groups.py)."""
    _FOR_SEVERAL_PROCESSES.add(main)
    return main


def _give_up_stdout() -> None:
    """Point stdout at os.devnull, because Python flushes it again at exit. (docs.python.org, "Note on SIGPIPE")"""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def not_empty(text: str) -> str:
    """Return the text; the type of options that may not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("should not be empty")
    return text
