"""Measure what a model knows, and what a compression costs. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from ..cli.entry_point import ArgumentParser, not_empty
from ..cli.options import positive_int
from ..cli.perplexity_parser import add_windows_option
from .options import add_engine_options

MODES = """\
one of these:
  --tasks NAMES               benchmarks of lm-evaluation-harness
  --compare-to WEIGHTS TEXT   perplexity and KL divergence next to another model
  --score FILE                how probable given continuations of prompts are
  lm_eval ARGUMENTS           lm-eval's own command line, where this engine is --model llama3_raw"""


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.evaluate`."""
    parser = ArgumentParser(prog="python -m llama3_raw.evaluate", description=f"{__doc__}\n\n{MODES}")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a file in UTF-8, for --compare-to; - reads stdin")
    parser.add_argument("--tasks", type=not_empty, metavar="NAMES", help="names of tasks, separated by commas")
    parser.add_argument(
        "--compare-to", type=not_empty, metavar="WEIGHTS", help="the model that --weights is compared to"
    )
    parser.add_argument(
        "--score",
        type=not_empty,
        metavar="FILE",
        help='lines of {"prompt": …, "continuations": [… , …]}, in text or token ids; - reads stdin',
    )
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "-o", "--output", type=not_empty, metavar="OUT", help="write lm-eval's results as JSON; resumable"
    )
    group.add_argument("--limit", type=positive_int, metavar="N", help="only the first N documents of each task")
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    group.add_argument(
        "--include-path", type=not_empty, metavar="FOLDER", help="a folder with tasks of your own (YAML)"
    )
    group.add_argument(
        "--chat", action="store_true", help="put the questions in the dialog format, for Instruct models"
    )
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    group = parser.add_argument_group("comparison")
    group.add_argument("--stride", type=positive_int, metavar="N", help="as of the command perplexity")
    add_windows_option(group)
    add_engine_options(parser)
    return parser
