"""Serve a model: OpenAI's API, and a live page to look inside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..backends.cpu import MAX_DECODE_ROWS
from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..cli.memory_plan import RunShape
from ..cli.models import choose_model, load_model
from ..cli.options import add_model_options, add_template_option, positive_int
from ..errors import needed_package

_DEFAULT_CONTEXT = 4096


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.serve`."""
    parser = ArgumentParser(prog="python -m llama3_raw.serve", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", type=not_empty, metavar="ADDRESS", help="(default: %(default)s)")
    parser.add_argument(
        "--port", default=8000, type=int, metavar="N", help="0: any that is free (default: %(default)s)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--rows", type=positive_int, default=MAX_DECODE_ROWS, metavar="N")
    parser.add_argument("--context", type=positive_int, metavar="N")
    add_template_option(parser)
    add_model_options(parser)
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    uvicorn = needed_package("uvicorn", "the server", "serve")
    needed_package("starlette", "the server", "serve")
    from .app import build_app
    from .engine import Engine
    from .guard import Settings

    chosen = choose_model(options)
    context = options.context or min(_DEFAULT_CONTEXT, chosen.checkpoint.params.max_seq_len)
    shape = RunShape(prompt=context, text=context, least=1, rows=options.rows)
    model, ops, which = load_model(chosen, shape)
    print(f"llama3_raw: {which}", file=sys.stderr)
    engine = Engine(model, ops, name=chosen.folder.path.name, rows=options.rows, context=context)
    app = build_app(engine, Settings())
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
