"""Measure how well a model predicts a text. Figures go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse

from .entry_point import ArgumentParser
from .options import add_model_options, positive_int
from .shown import LLAMA_CPP_CONTEXT, PERPLEXITY_CONTEXT, WINDOWS


def add_windows_option(parser: ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --windows."""
    parser.add_argument(
        "--windows",
        choices=WINDOWS,
        default="sliding",
        metavar="KIND",
        help=f"sliding, or llama.cpp: score the second half of windows of {LLAMA_CPP_CONTEXT} (default: sliding)",
    )


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.perplexity`."""
    parser = ArgumentParser(prog="python -m llama3_raw.perplexity", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a text in UTF-8; - reads stdin")
    parser.add_argument("--ids", action="store_true", help="FILE holds token ids; needs no tokenizer, and adds no BOS")
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help=f"tokens in a window (default: the model's context, at most {PERPLEXITY_CONTEXT:,})",
    )
    parser.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="tokens from one window to the next (default: half of --context)",
    )
    add_windows_option(parser)
    parser.add_argument("--reference", action="store_true", help="use the exact operations: Meta's bits, but slower")
    add_model_options(parser)
    return parser
