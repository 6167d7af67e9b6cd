"""The options that decide how a model is loaded and run for an evaluation; without lm-eval, which may be missing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..cli.options import add_model_options, positive_int
from ..cli.shown import TEXTS_AT_ONCE

if TYPE_CHECKING:
    from ..cli.memory_plan import RunShape
    from ..cli.models import ChosenModel

ROW_TOKENS = 2048  # of the cache, per text of a batch; a batch of longer texts has fewer of them


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how a model is loaded and run for an evaluation."""
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=TEXTS_AT_ONCE,
        metavar="N",
        help="texts at a time (default: %(default)s)",
    )
    parser.add_argument("--context", type=positive_int, metavar="N", help="at most N tokens, prompt included")
    parser.add_argument("--reference", action="store_true", help="use the exact operations: Meta's bits, but slower")
    add_model_options(parser)


def run_shape(options: argparse.Namespace, chosen: ChosenModel) -> RunShape:
    """Return the shape of a run whose texts are not known yet."""
    from ..cli.memory_plan import RunShape  # not above: it imports torch

    length = min(options.context or chosen.checkpoint.params.max_seq_len, ROW_TOKENS)
    return RunShape(prompt=length, text=length, least=length, rows=options.batch_size)
