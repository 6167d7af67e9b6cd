"""python -m llama3_raw.explain: a page that goes with a prompt from its text to the next token, with the real numbers.

One file of HTML that needs no network; page.py makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..cli.memory_plan import Lengths
from ..cli.models import choose_model, chosen_ids, load_model
from ..cli.options import add_model_options, check_output, read_prompt
from ..errors import UserError, needed_package
from ..system.files import atomic_write
from ..tracing.record import check_trace


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.explain`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.explain",
        description="Writes a page that goes with a prompt from its text to the next token, with all the numbers of "
        "this run. One file, to open in any browser.",
    )
    parser.add_argument("prompt", nargs="?", help="the text; - reads it from stdin")
    parser.add_argument(
        "-o", "--output", type=not_empty, default="page.html", metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--layer", type=int, default=0, metavar="N", help="whose steps are shown (default: %(default)s)"
    )
    parser.add_argument("--head", type=int, default=0, metavar="N", help="whose steps are shown (default: %(default)s)")
    add_model_options(parser)
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(arguments)
    prompt = read_prompt(options.prompt, "python -m llama3_raw.explain")
    for package in ("jinja2", "matplotlib", "pygments", "regex"):
        needed_package(package, "the page", "explain")
    from .page import MOST_TOKENS, build_page  # which imports them

    check_output("-o", options.output)
    chosen = choose_model(options)
    assert chosen.tokenizer is not None
    params = chosen.checkpoint.params
    for option, number, most in (("--layer", options.layer, params.n_layers), ("--head", options.head, params.n_heads)):
        if not 0 <= number < most:
            raise UserError(f"{option} {number}: the model has {most}, from 0 to {most - 1}")
    ids = chosen_ids(chosen, prompt)
    if len(ids) > MOST_TOKENS:
        raise UserError(f"the prompt has {len(ids)} tokens, a page shows {MOST_TOKENS} at most; give a shorter one")
    check_trace(params, chosen.dtype or chosen.checkpoint.dtype, len(ids))
    model, ops, which = load_model(chosen, Lengths.of_one_pass(len(ids)), reference=True)
    print(f"llama3_raw: {which}", file=sys.stderr)
    folder = chosen.folder.path.resolve()
    if folder.parent.name == "snapshots":  # of the Hugging Face cache: models--org--repo/snapshots/HASH
        folder = folder.parent.parent
    html = build_page(model, folder.name, prompt, options.layer, options.head, ops=ops, progress=True)
    page = html.encode()
    with atomic_write(options.output) as part:
        part.write_bytes(page)
    print(f"llama3_raw: {options.output}: {len(page) / 1e6:.1f} MB; open it in a browser", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
