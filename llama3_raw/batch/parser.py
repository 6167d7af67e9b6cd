"""Complete a file of prompts, several at a time. PROMPTS and OUT have one JSON object per line.

Each result is saved when its text ends. After any interruption, the same command continues where it stopped, and OUT is
the same in the end.
"""

from __future__ import annotations

from ..cli.entry_point import ArgumentParser, not_empty
from ..cli.options import (
    add_model_options,
    add_sampling_options,
    add_stop_token_option,
    add_template_option,
    positive_int,
)
from ..cli.shown import MAX_DECODE_ROWS
from ..openai_api.fields import USED


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.batch`."""
    parser = ArgumentParser(prog="python -m llama3_raw.batch", description=__doc__)
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help=f"file with one JSON object per line; fields: id, messages, {', '.join(USED['completion'])}",
    )
    parser.add_argument("-o", "--output", required=True, type=not_empty, metavar="OUT", help="the file to write")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=MAX_DECODE_ROWS,
        metavar="N",
        help="texts at a time (default: %(default)s, the most that a CPU computes for the cost of a few)",
    )
    group = parser.add_argument_group("text, for fields that a line leaves out")
    group.add_argument(
        "--max-new-tokens", type=positive_int, default=256, metavar="N", help="max_tokens (default: %(default)s)"
    )
    group.add_argument(
        "--stop", action="append", default=[], type=not_empty, metavar="TEXT", help="stop before TEXT (repeatable)"
    )
    parser.add_argument(
        "--tp",
        type=positive_int,
        metavar="N",
        help="under torchrun: every N processes share one copy of the model, and the copies take different prompts "
        "(default: one copy)",
    )
    parser.add_argument("--context", type=positive_int, metavar="N", help="at most N tokens, prompt included")
    add_stop_token_option(group)
    add_template_option(group)
    add_sampling_options(parser)
    add_model_options(parser)
    parser.add_argument("--reference", action="store_true", help="use the exact operations: Meta's bits, but slower")
    return parser
