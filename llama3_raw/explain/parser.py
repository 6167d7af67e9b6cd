"""The options of `python -m llama3_raw.explain`; without torch, so that --help answers at once."""

from __future__ import annotations

from ..cli.entry_point import ArgumentParser, not_empty
from ..cli.options import add_model_options


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.explain`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.explain",
        description="Write an HTML page that follows a prompt from its text to the next token, with the numbers of "
        "this run.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to follow; - reads it from stdin")
    parser.add_argument(
        "-o",
        "--output",
        type=not_empty,
        default="page.html",
        metavar="FILE",
        help="the file to write (default: %(default)s)",
    )
    for option, noun in (("--layer", "layer"), ("--head", "attention head")):
        parser.add_argument(
            option, type=int, default=0, metavar="N", help=f"the {noun} to show step by step (default: %(default)s)"
        )
    add_model_options(parser)
    return parser
