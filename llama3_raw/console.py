"""`llama3-raw NAME …` is `python -m llama3_raw.NAME …`; `llama3-raw PROMPT` is `python -m llama3_raw PROMPT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .cli.commands import COMMANDS
from .cli.entry_point import answer_help


def main() -> int:
    """Run the command named by the first argument, or else the main command, and return the exit status.

    `llama3-raw -- chat` has "chat" as its prompt.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        _answer_help("cli.main_parser", sys.argv[1:])
        return int(import_module("llama3_raw.__main__").main(sys.argv[1:]))
    if name != "download":  # it imports no torch
        _answer_help(
            f"cli.{name}_parser" if name in ("convert", "perplexity", "tracing") else f"{name}.parser", sys.argv[2:]
        )
    command = import_module(f"llama3_raw.{name}")
    if hasattr(command, "__path__"):  # a package
        command = import_module(f"llama3_raw.{name}.__main__")
    return int(command.main(sys.argv[2:]))


def _answer_help(parser: str, arguments: Sequence[str]) -> None:
    answer_help("__main__", import_module(f"llama3_raw.{parser}").build_parser, arguments)
