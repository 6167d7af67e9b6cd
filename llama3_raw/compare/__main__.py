"""python -m llama3_raw.compare --with B: the first tensor at which B diverges from the exact operations.

B is another implementation, other weights, another dtype, other operations, or tensors in a file. Each step is also
compared alone, computed from B's own tensors: the first that differs has the bug.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.entry_point import answer_help
from .parser import build_parser

answer_help(__name__, build_parser)

from ..checkpoint.gguf_reading import is_gguf
from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import RunShape
from ..cli.models import DTYPES_BY_NAME, ChosenModel, choose_model, chosen_ids, load_model
from ..cli.options import read_prompt
from ..errors import UserError, in_short
from ..params import Params
from ..quantization.matrix import FORMATS
from ..tracing.names import FIRST, named_tensors
from ..tracing.record import Origin, Trace, load_trace, shape_difference, trace
from ..tracing.taps import Patterns, check_names
from ..weights import Model
from .comparison import Comparison, Step, compare, of_any_layer, shared_tensors
from .difference import TOP_K
from .references import check_hf, check_meta, trace_hf, trace_meta


class Other(NamedTuple):
    """What --with names, before it runs."""

    name: str
    run: Callable[[], Trace]
    origin: Origin | None = None  # of a file, which may be of other weights or another prompt by mistake
    params: Params | None = None  # if they may differ from the model's
    format: str | None = None  # of its matrices, if they are quantized


def choose_other(options: Namespace, chosen: ChosenModel, ids: Sequence[int]) -> Other:
    """Return the other run that --with names, checked without reading its weights. Raises UserError."""
    name: str = options.other
    file = Path(name)
    if (file.is_file() and not is_gguf(file)) or file.suffix == ".safetensors":
        loaded = load_trace(file)
        shared_tensors(loaded, named_tensors(chosen.checkpoint.params))
        return Other(name, lambda: loaded, loaded.origin, loaded.origin.params if loaded.origin else None)
    if name in ("hf", "meta"):
        _check_reference(name, chosen)
        return Other(name, lambda: _run_implementation(trace_hf if name == "hf" else trace_meta, chosen, ids))
    changes: dict[str, Any] = {"tokenizer": None}
    if name in DTYPES_BY_NAME:
        changes |= {"dtype": name, "quantize": None}
    elif name in FORMATS:
        changes |= {"quantize": name}
    elif name != "fast":
        changes |= {"weights": name, "adapter": None, "format": None}
    with_changes = Namespace(**{**vars(options), **changes})
    others = choose_model(with_changes, needs_tokenizer=False, named_by="--with")
    unlike = shape_difference(others.checkpoint.params, chosen.checkpoint.params)
    if unlike:
        raise UserError(f"--with {name}: is another model, with {unlike}; compare models of the same shape")
    return Other(
        name,
        lambda: _run_own(others, ids, reference=name != "fast"),
        params=others.checkpoint.params,
        format=others.quantize or others.checkpoint.format,
    )


def _check_reference(name: str, chosen: ChosenModel) -> None:
    """Raise UserError if transformers' or Meta's code cannot run the model as it was chosen."""
    if chosen.checkpoint.format:
        raise UserError(
            f"--with {name}: does not support this {chosen.checkpoint.format} format; give the folder with the "
            "original weights"
        )
    if chosen.max_ram is not None:
        raise UserError(f"--with {name}: needs all weights in memory; leave --max-ram out")
    if chosen.gpu_layers is not None:
        raise UserError(f"--with {name}: needs all weights on one device; leave --gpu-layers out")
    if name == "hf":
        check_hf("--with hf")
    else:
        check_meta(chosen.checkpoint.params, "--with meta")


def _run_own(chosen: ChosenModel, ids: Sequence[int], reference: bool) -> Trace:
    model, ops, _ = load_model(chosen, RunShape.of_one_pass(len(ids)), reference)
    return trace(model, ids, ops=ops, device="cpu", progress=True)


def _run_implementation(trace_it: Callable[..., Trace], chosen: ChosenModel, ids: Sequence[int]) -> Trace:
    model, _, _ = load_model(chosen._replace(quantize=None), RunShape.of_one_pass(len(ids)), reference=True)
    return trace_it(model, ids, progress=True)


def show(comparison: Comparison, other: str, patterns: Sequence[str] = ()) -> None:
    """Print a table (one line for each layer, or each tensor that matches a pattern), the verdict, and JSON."""
    wanted = Patterns(patterns)
    names = {name for name in comparison.made if wanted.matching(name)}
    lines = [[step] for step in comparison.steps if step.name in names] if patterns else _by_layer(comparison.steps)
    width = max([9, *(len(steps[0].name) for steps in lines)]) if patterns else 9
    at = 2 if patterns else 21
    print(f"{'':{width}}{'end to end':>27}{'':{at}}{'each step alone':>22}")
    figures, place = f"{'relative':>9}{'rounding':>9}", "" if patterns else f"  {'at':<19}"
    print(f"{'':{width}}{'absolute':>9}{figures}{place}  {figures}{place}".rstrip())
    for steps in lines:
        absolute = max(step.whole.absolute for step in steps)
        whole = max(steps, key=lambda step: step.whole.relative)
        own = max(steps, key=lambda step: step.own.relative / step.rounding)
        label = steps[0].name if patterns else _layer_of(steps[0].name)
        both = f"{absolute:9.1e}{whole.whole.relative:9.1e}{whole.rounding_end_to_end:9.1e}{_at(whole, place)}"
        each = f"{own.own.relative:9.1e}{own.rounding:9.1e}{_at(own, place).rstrip()}{' *' if own.diverges else ''}"
        print(f"{label:{width}}{both}  {each}")
    if comparison.diverged:
        print("* more than rounding explains")
    if comparison.logits:
        logits = comparison.logits
        print(f"{'logits':<36}{'mean':>12}{'last':>12}")
        print(f"{f'top {TOP_K} tokens in common':<36}{logits.top_k:12.1%}{logits.top_k_last:12.1%}")
        last = "yes" if logits.same_likeliest_last else "no"
        print(f"{'same most likely token':<36}{logits.same_likeliest:12.1%}{last:>12}")
        print(f"{'KL divergence, nats':<36}{logits.kl:12.2e}{logits.kl_last:12.2e}")
    print(comparison.verdict(other))
    print(json.dumps(comparison.to_json()))


def _at(step: Step, place: str) -> str:
    """Return the name within its layer, if the table has a column for it."""
    short = re.sub(r"layers\.\d+\.", "", step.name)
    return f"  {short:<{len(place) - 2}}" if place else ""


def _layer_of(name: str) -> str:
    if name.startswith("layers."):
        return f"layer {name.split('.')[1]}"
    return "embedding" if name == FIRST else name


def _by_layer(steps: Sequence[Step]) -> list[list[Step]]:
    layers: dict[str, list[Step]] = {}
    for step in steps:
        layers.setdefault(_layer_of(step.name), []).append(step)
    return list(layers.values())


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
    options = build_parser().parse_args(arguments)
    prompt = read_prompt(options.prompt, "python -m llama3_raw.compare --with B")
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    ids = chosen_ids(chosen, prompt, are_ids=options.ids, special=options.special)
    names = options.names or []
    check_names(chosen.checkpoint.params, *names)
    other = choose_other(options, chosen, ids)
    tensors = other.run()  # frees B's weights before ours are loaded
    model, ops, which = load_model(chosen, RunShape.of_one_pass(len(ids)), reference=True)
    if other.origin:
        other.origin.check(model, ids, other.name)
    print(f"llama3_raw: {which}, with {other.name}", file=sys.stderr)
    comparison = compare(
        model,
        ids,
        tensors,
        tolerance=options.tolerance,
        rounding=DTYPES_BY_NAME.get(options.rounding),
        ops=ops,
        progress=True,
    )
    for line in (*_other_numbers(model, other), *_left_out(comparison, other.name)):
        print(f"llama3_raw: {line}", file=sys.stderr)
    show(comparison, other.name, names)
    return 0 if comparison.agree else 1


if __name__ == "__main__":
    sys.exit(main())
