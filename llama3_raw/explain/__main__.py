"""python -m llama3_raw.explain: write an HTML page that follows a prompt from its text to the next token.

The page shows the numbers of this run. It is a single file and needs no network. `page.build_page` builds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..cli.entry_point import answer_help
from .parser import build_parser

answer_help(__name__, build_parser)

from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import RunShape
from ..cli.models import choose_model, chosen_ids, load_model
from ..cli.options import check_output, read_prompt
from ..errors import UserError, needed_package
from ..system.files import atomic_write
from ..tracing.record import check_trace


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
