"""`llama3-raw NAME …` is `python -m llama3_raw.NAME …`; `llama3-raw PROMPT` is `python -m llama3_raw PROMPT`."""

from __future__ import annotations

import sys
from importlib import import_module

from .cli.commands import COMMANDS


def main() -> int:
    """Run the command named by the first argument, or else the main command, and return the exit status.

    `llama3-raw -- chat` has "chat" as its prompt.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        return int(import_module("llama3_raw.__main__").main(sys.argv[1:]))
    command = import_module(f"llama3_raw.{name}")
    if hasattr(command, "__path__"):  # a package
        command = import_module(f"llama3_raw.{name}.__main__")
    return int(command.main(sys.argv[2:]))
