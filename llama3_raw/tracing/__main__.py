"""python -m llama3_raw.tracing: the tensors of one forward pass, by name, as a table or a file."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..cli.entry_point import answer_help
from ..cli.tracing_parser import build_parser

answer_help(__name__, build_parser)

import torch
from torch import Tensor

from ..backends.choose import showing
from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import RunShape
from ..cli.models import DTYPES_BY_NAME, choose_model, chosen_ids, load_model
from ..cli.options import (
    check_context,
    check_output,
    parse_ids,
    read_prompt,
    read_text,
)
from ..errors import UserError
from ..model import REFERENCE
from ..weights import dtype_name
from .collect import collect
from .record import Trace, check_trace, trace
from .taps import check_names


class Statistics(NamedTuple):
    """Statistics of a tensor, over its finite values (masked scores are -inf)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float
    min: float
    max: float
    non_finite: float  # the share of values that are not finite

    @staticmethod
    def of(tensor: Tensor) -> Statistics:
        """Return the statistics: NaN if no value is finite; std is the population's (divided by n)."""
        finite = tensor[tensor.isfinite()].cpu().double()  # Apple GPUs have no float64
        share = 1 - finite.numel() / max(1, tensor.numel())
        low, high = finite.aminmax() if finite.numel() else (math.nan, math.nan)
        std = finite.std(correction=0) if finite.numel() else math.nan  # torch would warn
        return Statistics(tuple(tensor.shape), tensor.dtype, *map(float, (finite.mean(), std, low, high, share)))


def show(tensors: Mapping[str, Tensor]) -> None:
    """Print a line of statistics for each tensor."""
    width = max(map(len, tensors))
    print(f"{'name':<{width}}  {'shape':<16} {'dtype':<9}" + "".join(f"{name:>11}" for name in Statistics._fields[2:]))
    for name, tensor in tensors.items():
        shape, dtype, *figures, non_finite = Statistics.of(tensor)
        shown = "".join(f"{figure:11.4g}" for figure in figures)
        print(f"{name:<{width}}  {list(shape)!s:<16} {dtype_name(dtype):<9}{shown}{non_finite:11.1%}")


def collect_text(options: argparse.Namespace) -> int:
    """Collect the tensors of a text file, and return the exit status."""
    if options.prompt or options.last_position or options.stats or not options.output:
        raise UserError("--text FILE goes with -o FOLDER, not with a prompt, --last-position or --stats")
    context, batch = options.context or 128, options.batch or 16
    text = read_text(options.text)
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    check_context(context, chosen.checkpoint.params.max_seq_len)
    if options.ids:
        ids = parse_ids(text, options.text)
    else:
        assert chosen.tokenizer is not None  # checked by choose_model
        ids = chosen.tokenizer.encode(text, bos=True, allow_special=options.special)
    names = options.names or ["*"]
    check_names(chosen.checkpoint.params, *names)
    shape = RunShape.of_one_pass(context * batch)
    model, ops, which = load_model(chosen, shape, reference=options.reference)
    print(f"llama3_raw: {which}", file=sys.stderr)
    settings: dict[str, Any] = {"context": context, "batch": batch, "dtype": options.keep_dtype}
    collected = collect(model, ids, *names, to=options.output, ops=ops, **settings)
    print(f"llama3_raw: {options.output}: {collected}", file=sys.stderr)
    return 0


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    if options.text:
        return collect_text(options)
    if options.context or options.batch:
        raise UserError("--context and --batch go with --text FILE")
    prompt = read_prompt(options.prompt, "python -m llama3_raw.tracing")
    if options.output:
        check_output("-o", options.output)
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    ids = chosen_ids(chosen, prompt, are_ids=options.ids, special=options.special)
    names = options.names or ["*"]
    settings: dict[str, Any] = {"dtype": DTYPES_BY_NAME.get(options.keep_dtype), "last_position": options.last_position}
    # before the weights are read, which may take a while
    compute_dtype, exact = chosen.dtype or chosen.checkpoint.dtype, REFERENCE if options.reference else None
    check_trace(chosen.checkpoint.params, compute_dtype, len(ids), *names, **settings, ops=exact)
    model, ops, which = load_model(chosen, RunShape.of_one_pass(len(ids)), reference=options.reference)
    print(f"llama3_raw: {which}", file=sys.stderr)
    ops = showing(ops, Trace(*names), range(model.params.n_layers))
    kept = trace(model, ids, *names, **settings, ops=ops, device="cpu", progress=True)
    if options.stats or not options.output:
        show(kept)
    if options.output:
        kept.save(options.output)
        print(f"llama3_raw: {options.output}: {len(kept)} tensors, {kept.nbytes:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
