"""The options of `python -m llama3_raw`; without torch, so that --help answers at once."""

from __future__ import annotations

from ..system.version import VERSION
from .commands import COMMANDS
from .entry_point import ArgumentParser, not_empty
from .options import (
    add_compile_option,
    add_draft_option,
    add_lookup_option,
    add_model_options,
    add_sampling_options,
    add_special_option,
    add_stop_token_option,
    add_template_option,
    positive_int,
)

EXAMPLE = 'python -m llama3_raw --weights Meta-Llama-3-8B --stats "The capital of France is"'


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw`."""
    others = "\n".join(f"  {name:<12} {purpose}" for name, purpose in COMMANDS.items())
    parser = ArgumentParser(
        prog="python -m llama3_raw",
        usage="python -m llama3_raw [options] PROMPT",
        description="Continue a text with a Llama 3 model: the text goes to stdout, everything else to stderr.",
        epilog=f"example: {EXAMPLE}\n\nother commands, as python -m llama3_raw.NAME or llama3-raw NAME:\n{others}",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--version", action="version", version=f"llama3_raw {VERSION}")
    group = parser.add_argument_group("prompt and text")
    group.add_argument("--ids", action="store_true", help="read and print token ids; needs no tokenizer")
    group.add_argument("--chat", action="store_true", help="the prompt is a question for an Instruct model")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    add_template_option(group)
    add_special_option(group)
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="stop after N tokens (default: %(default)s)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT (repeatable)")
    add_stop_token_option(group)
    group.add_argument("--context", type=positive_int, metavar="N", help="at most N tokens, prompt included")
    add_lookup_option(group)
    add_draft_option(group)
    add_sampling_options(parser)
    add_compile_option(add_model_options(parser))
    parser.add_argument(
        "--save-quantized",
        type=not_empty,
        metavar="FOLDER",
        help="write the model to FOLDER, in int8 or as --quantize says",
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="FILE",
        help="with it: round int4 for this text (default: the model's own)",
    )
    group = parser.add_argument_group("inspection")
    group.add_argument("--reference", action="store_true", help="use the exact operations: Meta's bits, but slower")
    group.add_argument(
        "--break",
        dest="break_at",
        action="append",
        default=[],
        type=not_empty,
        metavar="NAME",
        help="stop in pdb after a tensor, e.g. 'layers.0.*' (repeatable)",
    )
    group.add_argument("--top", type=positive_int, metavar="N", help="show the N most likely tokens at each step")
    group.add_argument("--stats", choices=("text", "json"), metavar="json", help="report speed and memory on stderr")
    return parser
