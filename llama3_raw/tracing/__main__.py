"""python -m llama3_raw.tracing: the tensors of one forward pass, by name, as a table or a file."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choose import showing
from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..cli.memory_plan import RunShape
from ..cli.models import choose_model, chosen_ids, load_model
from ..cli.options import DTYPES_BY_NAME, add_model_options, add_prompt_options, check_output, read_prompt
from ..model import REFERENCE
from ..weights import dtype_name
from .record import Trace, check_trace, trace


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


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.tracing`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.tracing",
        description="Run one forward pass over a prompt and show or save its tensors, by name.",
    )
    add_prompt_options(parser)
    group = parser.add_argument_group("tensors")
    group.add_argument(
        "--names",
        action="append",
        type=not_empty,
        metavar="PATTERN",
        help="tensors to trace, with * ? [0-9] as in a shell (repeatable; default: all): 'layers.0.*' is all of layer "
        "0, 'layers.*.residual' the output of each layer",
    )
    group.add_argument("-o", "--output", type=not_empty, metavar="FILE", help="write the tensors as safetensors")
    group.add_argument("--stats", action="store_true", help="print statistics of each tensor (default without -o)")
    group.add_argument("--last-position", action="store_true", help="keep the last token only")
    group.add_argument("--keep-dtype", choices=DTYPES_BY_NAME, help="keep the tensors as this (default: as computed)")
    group.add_argument("--reference", action="store_true", help="use the exact operations: Meta's bits, but slower")
    group.add_argument("--fast", action="store_true", help=argparse.SUPPRESS)  # the default by now
    add_model_options(parser)
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
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
