"""Serve a model: OpenAI's API, and a page to look inside it, at http://127.0.0.1:8000/."""

from __future__ import annotations

import argparse
from urllib.parse import urlsplit

from ..cli.entry_point import ArgumentParser, not_empty
from ..cli.options import add_model_options, add_stop_token_option, add_template_option, byte_size, positive_int
from ..cli.shown import MAX_DECODE_ROWS

DEFAULT_CONTEXT = 4096  # tokens of a text
KEY_VARIABLE = "LLAMA3_RAW_API_KEY"


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.serve`."""
    parser = ArgumentParser(prog="python -m llama3_raw.serve", description=__doc__)
    parser.add_argument("--open", action="store_true", help="open the page in the browser, and print its URL")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        type=not_empty,
        metavar="ADDRESS",
        help="where to listen; any but the default needs --api-key, 0.0.0.0 is for everybody in the network "
        "(default: %(default)s)",
    )
    parser.add_argument("--port", default=8000, type=_port, metavar="N", help="0: a free one (default: %(default)s)")
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--api-key", type=not_empty, metavar="KEY", help=f"what requests must know (default: ${KEY_VARIABLE}, or none)"
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        type=not_empty,
        metavar="NAME",
        help="answer to this name, too, besides localhost and addresses (repeatable)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        type=_origin,
        metavar="ORIGIN",
        help="let pages of e.g. https://example.org ask (repeatable)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--rows",
        type=positive_int,
        metavar="N",
        help=f"texts in the batch (default: {MAX_DECODE_ROWS}, or as many as fit into memory)",
    )
    group.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help=f"tokens of a text, prompt included (default: the model's context, at most {DEFAULT_CONTEXT})",
    )
    group.add_argument(
        "--queue", type=positive_int, default=256, metavar="N", help="texts that may wait (default: %(default)s)"
    )
    group.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="S", help="seconds for an answer (default: %(default)g)"
    )
    group.add_argument(
        "--max-body", type=byte_size, default=4_000_000, metavar="SIZE", help="of a request (default: 4MB)"
    )
    group.add_argument(
        "--grace",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds for running answers after SIGTERM or Ctrl-C (default: %(default)g)",
    )
    group = parser.add_argument_group("text")
    add_stop_token_option(group)
    add_template_option(group)
    add_model_options(parser)
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"should be from 0 to 65535, is {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"should be seconds above 0, is {text}")
    return value


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"should be such as https://example.org, without a path, is {text!r}")
    return text
