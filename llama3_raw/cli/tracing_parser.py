"""The options of `python -m llama3_raw.tracing`; without torch, so that --help answers at once."""

from __future__ import annotations

import argparse

from .entry_point import ArgumentParser, not_empty
from .options import add_model_options, add_prompt_options, positive_int
from .shown import DTYPES


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.tracing`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.tracing",
        description="Run one forward pass over a prompt and show or save its tensors, by name; or over a whole text.",
    )
    add_prompt_options(parser)
    group = parser.add_argument_group("tensors")
    group.add_argument(
        "--names",
        action="append",
        type=not_empty,
        metavar="PATTERN",
        help="tensors to trace, with * ? [0-9] as in a shell (repeatable; default: all): 'layers.0.*' is all of layer "
        "0, 'layers.*.residual' the output of each layer",
    )
    group.add_argument(
        "-o", "--output", type=not_empty, metavar="FILE", help="write the tensors as safetensors; with --text, a folder"
    )
    group.add_argument("--stats", action="store_true", help="print statistics of each tensor (default without -o)")
    group.add_argument("--last-position", action="store_true", help="keep the last token only")
    group.add_argument("--keep-dtype", choices=DTYPES, help="keep the tensors as this (default: as computed)")
    group.add_argument("--reference", action="store_true", help="use the exact operations: Meta's bits, but slower")
    group.add_argument("--fast", action="store_true", help=argparse.SUPPRESS)  # the default by now
    group = parser.add_argument_group("a whole text")
    group.add_argument(
        "--text", type=not_empty, metavar="FILE", help="instead of a prompt: collect the tensors of this text in -o"
    )
    group.add_argument("--context", type=positive_int, metavar="N", help="tokens of a window (default: 128)")
    group.add_argument("--batch", type=positive_int, metavar="N", help="windows of a pass (default: 16)")
    add_model_options(parser)
    return parser
