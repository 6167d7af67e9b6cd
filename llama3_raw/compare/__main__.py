"""python -m llama3_raw.compare --with B: the first tensor at which B diverges from the exact operations.

B is another implementation, other weights, another dtype, other operations, or tensors in a file. Each step is also
compared alone, computed from B's own tensors: the first that differs has the bug.
"""

from __future__ import annotations

import difflib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..cli.entry_point import answer_help
from .parser import build_parser

answer_help(__name__, build_parser)

import torch
from tqdm import tqdm

from ..checkpoint.text import read_named
from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import RunShape
from ..cli.models import DTYPES_BY_NAME, ChosenModel, choose_model, chosen_ids, load_model
from ..cli.options import check_output, read_prompt
from ..errors import UserError, in_short
from ..tokenizer import Tokenizer
from ..tracing.taps import check_names
from ..weights import Model, dtype_name
from .comparison import Comparison, compare
from .forms import of_any_layer
from .generation import TextComparison, compare_texts, first_difference, greedy
from .gradients import compare_gradients
from .others import Other, Tensors, by_layer, choose_other, continue_other
from .report import figures_of_steps, save_html, save_json, show
from .rounding import coarser
from .tokenizers import compare_tokenizers


def _other_numbers(model: Model, other: Other) -> Iterator[str]:
    """Yield a line for each of the params that differ although all shapes are equal, and for weights of 4 bits."""
    for field in ("norm_eps", "rope_theta", "rope_scaling"):
        ours, theirs = getattr(model.params, field), getattr(other.params or model.params, field)
        if ours != theirs:
            hidden = " (16 bits may hide the effect; --dtype float32 shows it)"
            in_16_bits = model.weights.norm.dtype.itemsize == 2
            yield f"{other.name} has {field} {theirs}, not {ours}{hidden if in_16_bits else ''}"
    if other.format == "int4":
        yield (
            f"{other.name} has weights of 4 bits, which differ by more than the rounding of a computation; judge it by "
            "the KL divergence, or give --tolerance"
        )


def _left_out(comparison: Comparison, other: str) -> Iterator[str]:
    """Yield lines with the names that only one side has."""
    for name in comparison.unknown[:5]:
        near = difflib.get_close_matches(name, comparison.made, n=3, cutoff=0)
        yield f"{other}: no tensor of a pass is named {in_short(name)!r}; the nearest are {', '.join(near)}; left out"
    if len(comparison.unknown) > 5:
        yield f"{other}: {len(comparison.unknown) - 5} more names that no pass has"
    missing = dict.fromkeys(map(of_any_layer, comparison.missing))
    if missing:
        names = ", ".join(list(missing)[:3]) + (", …" if len(missing) > 3 else "")
        yield f"{other} does not have {names}: a difference there shows at the next tensor that it has"


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not options.other and not options.tokenizer:
        parser.error("the following arguments are required: --with (or --tokenizer, to compare two tokenizers)")
    if options.generate and options.backward:
        parser.error("--generate compares texts, --backward one pass; give one of them")
    for option, file in (("--html", options.html), ("--json", options.json)):
        if file:
            check_output(option, file)
    if options.html and options.json and Path(options.html).resolve() == Path(options.json).resolve():
        parser.error("--html and --json name the same file; give two")
    prompt = read_prompt(options.prompt, "python -m llama3_raw.compare --with B")
    if not options.other:
        return _compare_tokenizers(options, prompt)
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    ids = chosen_ids(chosen, prompt, are_ids=options.ids, special=options.special)
    names = options.names or []
    check_names(chosen.checkpoint.params, *names)
    other = choose_other(options, chosen, ids)
    found = _compare_texts(options, chosen, ids, other) if options.generate else None
    comparison = found.tensors if found else _compare_pass(options, chosen, ids, other)
    for line in _left_out(comparison, other.name):
        print(f"llama3_raw: {line}", file=sys.stderr)
    show(comparison, names)
    verdict = (found or comparison).verdict(other.name)
    figures = (found or comparison).to_json()
    print(verdict)
    print(json.dumps(figures))
    if options.json:
        save_json(options.json, {**figures, "steps": figures_of_steps(comparison)})
    if options.html:
        about = {"model": str(chosen.folder.path), "other run": other.name, "prompt": in_short(prompt)}
        about |= {"tokens": str(len(ids)), "rounding": dtype_name(comparison.dtype)}
        save_html(options.html, comparison, verdict, about)
    return 0 if figures["agree"] else 1


def _compare_pass(options: Namespace, chosen: ChosenModel, ids: Sequence[int], other: Other) -> Comparison:
    """Compare the tensors or gradients of a pass over the prompt."""
    tensors = other.run()  # frees B's weights before ours are loaded
    own, dtype = (chosen, None) if options.backward or not other.by_layer else by_layer(chosen)
    model, ops, which = load_model(own, RunShape.of_one_pass(len(ids)), reference=True)
    if other.origin:
        other.origin.check(model, ids, other.name)
    print(f"llama3_raw: {which}, with {other.name}", file=sys.stderr)
    for line in _other_numbers(model, other):
        print(f"llama3_raw: {line}", file=sys.stderr)
    rounding = _rounding(options, dtype or model.weights.norm.dtype, tensors, other)
    settings = {"tolerance": options.tolerance, "rounding": rounding, "padding": options.padding, "ops": ops}
    if options.backward:
        return compare_gradients(model, ids, tensors, **settings)
    return compare(model, ids, tensors, dtype=dtype, progress=True, **settings)


def _rounding(options: Namespace, own: torch.dtype, tensors: Tensors, other: Other) -> torch.dtype | None:
    """Return the dtype whose rounding to expect; None: what the tensors of a file show."""
    if options.rounding:
        return DTYPES_BY_NAME[options.rounding]
    if other.is_file:
        return own if options.dtype and own.itemsize == 2 else None  # a dtype that was asked for is kept
    return coarser(own, *(tensor.dtype for tensor in tensors.values()))  # of two runs of this program


def _compare_texts(options: Namespace, chosen: ChosenModel, ids: Sequence[int], other: Other) -> TextComparison:
    """Compare greedy texts after the prompt, and the pass of the first token that differs."""
    n: int = options.generate
    if other.is_file:
        raise UserError(
            f"--generate: {other.name} has the tensors of one pass; let your port generate, and compare the pass of "
            "the first token that differs: its tensors, with the whole text up to it as the prompt (--ids)"
        )
    shape = RunShape(prompt=len(ids), text=len(ids) + n, least=len(ids) + 1, scored=len(ids))
    model, ops, which = load_model(chosen, shape, reference=True)
    print(f"llama3_raw: {which}, with {other.name}", file=sys.stderr)
    for line in _other_numbers(model, other):
        print(f"llama3_raw: {line}", file=sys.stderr)
    ours = greedy(model, ids, n, ops)
    if not ours:
        raise UserError("--generate: the text ends at once; give another prompt")
    others = tqdm(continue_other(options, chosen, ids, n), total=n, desc="tokens", leave=False, delay=1)
    theirs, tensors = first_difference(ours, others)
    rounding = _rounding(options, model.weights.norm.dtype, tensors, other)
    return compare_texts(model, ids, ours, theirs, tensors, tolerance=options.tolerance, rounding=rounding, ops=ops)


def _compare_tokenizers(options: Namespace, text: str) -> int:
    """Compare the model's own tokenizer with --tokenizer on the text."""
    default = build_parser().get_default
    for name in ("ids", "html", "generate", "backward", "padding", "tolerance", "rounding", "names"):
        if getattr(options, name) is not default(name):
            raise UserError(f"--{name}: two tokenizers are compared on a text; leave it out, or give --with, too")
    other: str = options.tokenizer
    chosen = choose_model(Namespace(**{**vars(options), "tokenizer": None}))
    ours, theirs = chosen.tokenizer, read_named(Path(other))
    assert isinstance(ours, Tokenizer)  # checked by choose_model
    print(f"llama3_raw: {ours.path}, with {other}", file=sys.stderr)
    cuts = compare_tokenizers(text, ours, theirs, allow_special=options.special)
    print(cuts.verdict(ours, theirs, other))
    print(json.dumps(cuts.to_json()))
    if options.json:
        save_json(options.json, cuts.to_json() | {"differences": [piece._asdict() for piece in cuts.pieces]})
    return 0 if cuts.agree else 1


if __name__ == "__main__":
    sys.exit(main())
