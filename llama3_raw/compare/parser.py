"""The options of `python -m llama3_raw.compare`; without torch, so that --help answers at once."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

from ..cli.entry_point import ArgumentParser, not_empty
from ..cli.options import add_model_options, add_prompt_options, positive_int
from ..cli.shown import DTYPES, QUANTIZED


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.compare`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.compare",
        description="Run a prompt with the exact operations, and find the first tensor at which another run diverges. "
        "Exit status 0: they agree; 1: they do not; 2: the comparison is not possible.",
    )
    add_prompt_options(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--with",
        dest="other",
        type=not_empty,
        metavar="B",
        help="tensors in a file (*.safetensors, *.npz, *.pt); a folder or name as for --weights; or the same weights "
        "in another dtype "
        f"({', '.join(DTYPES)}), with the fast operations (fast), quantized ({', '.join(QUANTIZED)}), in "
        "transformers (hf) or in Meta's code (meta)",
    )
    group.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="agree if no tensor has a larger relative difference (default: what rounding explains)",
    )
    group.add_argument(
        "--rounding",
        choices=DTYPES,
        metavar="DTYPE",
        help="expect the rounding of this dtype, if B was not computed in the dtype that it is saved in",
    )
    group.add_argument(
        "--generate",
        type=positive_int,
        metavar="N",
        help="compare greedy texts of N new tokens, with a cache, and the pass of the first token that differs",
    )
    group.add_argument(
        "--backward", action="store_true", help="compare the gradients of the mean next-token loss, by name"
    )
    group.add_argument(
        "--padding", choices=("left", "right"), help="the side on which the prompt of a file's tensors was padded"
    )
    group.add_argument("--html", type=not_empty, metavar="FILE", help="write the report as a page, too")
    group.add_argument("--json", type=not_empty, metavar="FILE", help="write the figures of every tensor as JSON, too")
    group.add_argument(
        "--names",
        action="append",
        type=not_empty,
        metavar="PATTERN",
        help="show one line for each matching tensor instead of each layer (repeatable)",
    )
    add_model_options(parser)
    return parser


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ArgumentTypeError(f"should be a number of 0 or more, such as 0.01, is {text!r}")
    return value
