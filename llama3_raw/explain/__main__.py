"""python -m llama3_raw.explain: write an HTML page that follows a prompt from its text to the next token.

The page shows the numbers of this run. It is a single file and needs no network. `page.build_page` builds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..cli.memory_plan import RunShape
from ..cli.models import choose_model, chosen_ids, load_model
from ..cli.options import add_model_options, check_output, read_prompt
from ..errors import UserError, needed_package
from ..system.files import atomic_write
from ..tracing.record import check_trace


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


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    prompt = read_prompt(options.prompt, "python -m llama3_raw.explain")
    for package in ("jinja2", "matplotlib", "pygments", "regex"):
        needed_package(package, "the page", "explain")
    from .page import MAX_TOKENS, build_page  # imports these packages

    check_output("-o", options.output)
    chosen = choose_model(options)
    assert chosen.tokenizer is not None
    params = chosen.checkpoint.params
    for option, number, count in (
        ("--layer", options.layer, params.n_layers),
        ("--head", options.head, params.n_heads),
    ):
        if not 0 <= number < count:
            raise UserError(f"{option} {number}: the model has {count}, numbered 0 to {count - 1}")
    ids = chosen_ids(chosen, prompt)
    if len(ids) > MAX_TOKENS:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but a page shows at most {MAX_TOKENS}; give a shorter prompt"
        )
    check_trace(params, chosen.dtype or chosen.checkpoint.dtype, len(ids))
    model, ops, description = load_model(chosen, RunShape.of_one_pass(len(ids)), reference=True)
    print(f"llama3_raw: {description}", file=sys.stderr)
    folder = chosen.folder.path.resolve()
    if folder.parent.name == "snapshots":  # Hugging Face cache: models--org--repo/snapshots/HASH
        folder = folder.parent.parent
    html = build_page(model, folder.name, prompt, options.layer, options.head, ops=ops, progress=True)
    page = html.encode()
    with atomic_write(options.output) as part:
        part.write_bytes(page)
    print(f"llama3_raw: wrote {options.output} ({len(page) / 1e6:.1f} MB); open it in a browser", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
