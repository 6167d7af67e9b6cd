"""The options of `python -m llama3_raw.chat`; without torch, so that --help answers at once."""

from __future__ import annotations

from ..cli.entry_point import ArgumentParser
from ..cli.options import (
    add_compile_option,
    add_draft_option,
    add_lookup_option,
    add_model_options,
    add_sampling_options,
    add_stop_token_option,
    add_template_option,
    positive_int,
)
from ..cli.shown import CHAT_CONTEXT

COMMANDS = {
    "/reset": "forget the conversation, but not the system message",
    "/system [TEXT]": "set the system message; without TEXT, remove it",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "continue a saved conversation",
    "/stats": "show tokens, speed and memory",
    "/exit": "end the chat, as Ctrl-D does",
    "/help": "show this list",
}


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.chat`."""
    commands = "\n".join(f"  {usage:<16}{meaning}" for usage, meaning in COMMANDS.items())
    parser = ArgumentParser(
        prog="python -m llama3_raw.chat",
        description="Talk to an Instruct model. Its answers go to stdout, everything else to stderr. If stdin is not a "
        "terminal, each of its lines is a question or a command.",
        epilog=f"commands in the chat:\n{commands}\n\nCtrl-C stops an answer.",
    )
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", default="", metavar="TEXT", help="the system message (default: none)")
    group.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help=f"tokens in the window (default: the model's context, at most {CHAT_CONTEXT} to save memory); when it "
        "is full, the oldest turns are dropped",
    )
    group.add_argument(
        "--max-new-tokens", type=positive_int, metavar="N", help="stop an answer after N tokens (default: no limit)"
    )
    add_template_option(group)
    add_stop_token_option(group)
    add_lookup_option(group)
    add_draft_option(group)
    add_compile_option(group)
    add_sampling_options(parser)
    parser.set_defaults(temperature=0.6, top_p=0.9)  # as in Meta's example_chat_completion.py
    add_model_options(parser)
    return parser
