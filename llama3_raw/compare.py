"""python -m llama3_raw.compare --with B: where another run of the same model parts ways with this one.

B is another implementation, other weights, another dtype, other operations, or tensors in a file. Each step is looked
at by itself: with B's tensors going into it, is what comes out B's too? The first one where it is not has the bug.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.linalg import vector_norm

from .cli.entry_point import ArgumentParser, command_line_tool, not_empty
from .cli.memory_plan import Lengths
from .cli.models import ChosenModel, choose_model, chosen_ids, load_model
from .cli.options import DTYPES_BY_NAME, add_model_options, add_prompt_options, read_prompt
from .errors import UserError, in_short
from .implementations import check_hf, check_meta, trace_hf, trace_meta
from .model import REFERENCE, forward
from .ops import Ops, Tap
from .params import Params
from .tracing.record import Origin, Trace, check_trace, count_layers, load_trace, not_alike, tokens_of_one_prompt, trace
from .tracing.taps import FIRST, LAST, Patterns, chain, check_names
from .weights import Model, in_words

TOP_K = 10  # the likeliest tokens whose overlap is told

_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Ports hide scores by -1e9 or the most negative number as often as by -inf; softmax makes 0 of all of them.
_HIDDEN = -1e4

# What rounding does to each tensor is tried (`_rounding`); a step may differ by so many times that. Measured, at most,
# on three trained models (4, 6 and 30 layers) and prompts of 1 to 128 tokens, against transformers, the fast operations
# and other dtypes: 2.8 times in fp32, where sums are taken in other orders, 1.4 times in bf16 and fp16.
_TIMES, _TIMES_IN_16_BITS = 8.0, 2.5
# What adds up over the layers varies more: 3.7 and 2.4 times, so it may be twice that.
_TIMES_IN_ALL = 2.0


class Made(NamedTuple):
    """How model.py makes a tensor."""

    by: str  # its function
    of: tuple[str, ...]  # the tensors that go into it
    check: str  # what ports get wrong there, in words


_BEFORE = "what comes into the layer"
_OF_LAYER = {
    "attention_norm": Made("rms_norm", (_BEFORE,), "norm_eps, the mean square in fp32, attention_norm.weight"),
    "attention.q": Made("linear by wq", ("attention_norm",), "wq, its transpose, the order of its rows"),
    "attention.k": Made("linear by wk", ("attention_norm",), "wk, its transpose, the order of its rows"),
    "attention.v": Made("linear by wv", ("attention_norm",), "wv, its transpose"),
    "attention.q_rope": Made(
        "rope", ("attention.q",), "which values are a pair (neighbours here), rope_theta, rope_scaling, the positions"
    ),
    "attention.k_rope": Made(
        "rope", ("attention.k",), "which values are a pair (neighbours here), rope_theta, rope_scaling, the positions"
    ),
    "attention.scores": Made(
        "attend: q k / sqrt(head_dim), masked",
        ("attention.q_rope", "attention.k_rope"),
        "the mask, the scale, which query heads share a kv head (neighbours here)",
    ),
    "attention.probs": Made("attend: softmax", ("attention.scores",), "the softmax in fp32, over the keys"),
    "attention.heads": Made(
        "attend: probs v",
        ("attention.probs", "attention.v"),
        "which query heads share a kv head (neighbours here)",
    ),
    "attention.out": Made("linear by wo", ("attention.heads",), "wo, its transpose, the order of the heads"),
    "attention.residual": Made("layer: a sum", (_BEFORE, "attention.out"), "what is added: the input before the norm"),
    "ffn_norm": Made("rms_norm", ("attention.residual",), "norm_eps, the mean square in fp32, ffn_norm.weight"),
    "feed_forward.gate": Made("linear by w1", ("ffn_norm",), "w1 (not w3), its transpose"),
    "feed_forward.up": Made("linear by w3", ("ffn_norm",), "w3 (not w1), its transpose"),
    "feed_forward.hidden": Made(
        "swiglu: silu(gate) * up", ("feed_forward.gate", "feed_forward.up"), "silu is of the gate (w1) alone"
    ),
    "feed_forward.out": Made("linear by w2", ("feed_forward.hidden",), "w2, its transpose"),
    "residual": Made(
        "layer: a sum", ("attention.residual", "feed_forward.out"), "what is added: the sum before the norm"
    ),
}


def how_it_is_made(params: Params) -> dict[str, Made]:
    """Every name that a tap of `forward` sees in a pass of such a model, in order, with how it comes about."""
    made = {FIRST: Made("embed", (), "the token ids (and BOS), tok_embeddings")}
    before = FIRST
    for i in range(params.n_layers):
        for name, (by, of, check) in _OF_LAYER.items():
            inputs = tuple(before if it == _BEFORE else f"layers.{i}.{it}" for it in of)
            made[f"layers.{i}.{name}"] = Made(by, inputs, check)
        before = f"layers.{i}.residual"
    made["norm"] = Made("rms_norm", (before,), "norm_eps, the mean square in fp32, norm.weight")
    made[LAST] = Made("linear by output", ("norm",), "output (tok_embeddings where they are tied), its transpose")
    return made


class Difference(NamedTuple):
    """How far a tensor is from another. Both figures are infinite where they cannot be compared number by number."""

    absolute: float  # the largest |a - b|
    relative: float  # the largest |a - b| / |b| of a row, as lengths
    unlike: str | None = None  # in words, why they cannot


def difference(a: Tensor, b: Tensor) -> Difference:
    """How far a is from b, both [..., n], over the rows of the last dimension.

    Each row counts by itself, since trained models let the first token's values grow a thousandfold, beside which all
    others would be small. But one that is shorter than most is held against their median length: a few scores that
    happen to be near zero say nothing about how large rounding is. Compared on the CPU, which has fp64 for the lengths.
    """
    if a.shape != b.shape:
        return Difference(math.inf, math.inf, f"its shape is {list(b.shape)}, not {list(a.shape)}")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to("cpu", dtype), b.to("cpu", dtype)
    hidden = ((a == -torch.inf) & (b <= _HIDDEN)) | ((a <= _HIDDEN) & (b == -torch.inf))
    same = hidden | (a == b) | (a.isnan() & b.isnan())
    finite = a.isfinite() & b.isfinite() & ~hidden
    unlike = int((~same & ~finite).sum())
    if unlike:
        what = f"{unlike:,} of its {a.numel():,} values are infinite or no number on one side only"
        return Difference(math.inf, math.inf, what)
    apart = torch.where(finite, a - b, 0.0)
    # in fp64 the square of the most negative number of fp32, with which some hide scores, is still finite
    lengths = vector_norm(apart, dim=-1, dtype=torch.float64)  # [...]
    sizes = vector_norm(torch.where(finite, b, 0.0), dim=-1, dtype=torch.float64)
    relative = torch.where(lengths == 0, 0.0, lengths / sizes.clamp(min=sizes.median()))
    return Difference(float(apart.abs().max()), float(relative.max()))


class Step(NamedTuple):
    """A tensor of the pass, in both runs. What rounding explains is of the relative differences."""

    name: str
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]
    whole: Difference  # where each run goes on with its own tensors
    rounding_in_all: float
    own: Difference  # where the other run's tensors went into the step
    rounding: float

    @property
    def parts(self) -> bool:
        """Whether the step by itself differs by more than rounding."""
        return self.own.relative > self.rounding


class Logits(NamedTuple):
    """How alike two runs' next tokens are; KL is that of the other run's distribution from ours, in nats."""

    top_k: float  # the share of the other run's TOP_K likeliest tokens that are ours, mean over the positions
    top_k_last: float  # at the last position
    same_likeliest: float  # the share of positions with the same likeliest token
    same_likeliest_last: bool
    kl: float  # mean over the positions
    kl_last: float

    @staticmethod
    def of(ours: Tensor, theirs: Tensor) -> Logits:
        """The figures for logits [T, vocab_size]."""
        top_k, same, kl = [], [], []
        for a, b in zip(ours.split(64), theirs.split(64), strict=True):  # in fp64 they are large
            a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
            k = min(TOP_K, a.shape[-1])
            best_a, best_b = a.topk(k).indices, b.topk(k).indices  # [T, k]
            shared = (best_a.unsqueeze(-1) == best_b.unsqueeze(-2)).sum((-2, -1))
            top_k.append(shared.double() / k)
            same.append(a.argmax(-1) == b.argmax(-1))
            kl.append(torch.where(b == -torch.inf, 0.0, b.exp() * (b - a)).sum(-1))
        overlap, likeliest, nats = torch.cat(top_k), torch.cat(same), torch.cat(kl)  # each [T]
        return Logits(
            float(overlap.mean()),
            float(overlap[-1]),
            float(likeliest.double().mean()),
            bool(likeliest[-1]),
            float(nats.mean()),
            float(nats[-1]),
        )


class Comparison(NamedTuple):
    """What `compare` finds. The steps are in the order of the pass."""

    steps: tuple[Step, ...]
    missing: tuple[str, ...]  # tensors of the pass that the other run does not have
    unknown: tuple[str, ...]  # and those of the other run that no pass has
    logits: Logits | None  # None: the other run has none of the same shape
    dtype: torch.dtype  # whose rounding is allowed
    tolerance: float | None  # None: what rounding explains
    made: Mapping[str, Made]

    @property
    def parted(self) -> list[Step]:
        """The steps that by themselves differ by more than rounding; the first is where the two part ways."""
        return [step for step in self.steps if step.parts]

    @property
    def worst(self) -> Step:
        """Where the runs are furthest apart: beyond what rounding explains, or, with a tolerance, at all."""
        if self.tolerance is not None:
            return max(self.steps, key=lambda step: step.whole.relative)
        return max(self.steps, key=lambda step: step.whole.relative / step.rounding_in_all)

    @property
    def first_beyond_tolerance(self) -> Step | None:
        """The first tensor in which the runs are further apart than the tolerance; None: there is no such, or none."""
        if self.tolerance is None:
            return None
        return next((step for step in self.steps if step.whole.relative > self.tolerance), None)

    @property
    def agree(self) -> bool:
        """Whether no tensor of the runs differs by more than the tolerance, or than rounding where there is none."""
        if self.tolerance is not None:
            return self.first_beyond_tolerance is None
        return not self.parted and self.worst.whole.relative <= self.worst.rounding_in_all

    def verdict(self, other: str = "the other run") -> str:
        """Where the two part ways, in a few lines; `other` is what the other run is called."""
        if not self.parted and all(step.whole.relative == 0 for step in self.steps):
            return f"They are the same: all {len(self.steps)} tensors, value by value."
        worst, rounding = self.worst, f"rounding in {in_words(self.dtype)} explains"
        at_worst = f"{worst.whole.relative:.2g} of its size at {worst.name}"
        if self.tolerance is not None and self.agree:
            text = f"They agree within a tolerance of {self.tolerance:g}: the runs differ by at most {at_worst}."
            if self.parted:
                text += f"\nBy itself, the first step to differ is {self._first_place(other)}"
        elif self.parted:
            text = f"They part ways first at {self._first_place(other)}"
        elif self.agree:
            text = (
                f"They agree: no step by itself differs by more than {rounding}.\nTo the end, the runs come closest to "
                f"it with {at_worst}, where {worst.rounding_in_all:.2g} is explained."
            )
        elif self.tolerance is not None:
            text = f"They differ by up to {at_worst}, but no step by itself by more than {rounding}."
        else:
            text = (
                f"They drift apart: no step by itself differs by more than {rounding}.\nBut it adds up to {at_worst}, "
                f"where {worst.rounding_in_all:.2g} is explained."
            )
        beyond = self.first_beyond_tolerance
        if beyond is not None:
            text += f"\nThe first beyond the tolerance of {self.tolerance:g} is {beyond.name}, "
            text += f"{beyond.whole.relative:.2g} of its size off."
        return text

    def _first_place(self, other: str) -> str:
        first, *others = self.parted
        made = self.made[first.name]
        check, most = made.check, f"{first.own.absolute:.2g}"
        if first.own.unlike:
            differs = f"cannot be compared: in {other}, {first.own.unlike}"
            if first.shape != first.their_shape:
                check = "its layout, which should be that of model.py"
                if first.name == FIRST and first.shape[1:] == first.their_shape[-1:]:
                    check = "the tokens, of which one run has more (BOS?)"
        elif math.isinf(first.own.relative):
            differs = f"has rows that are all zeros in {other} and are not here ({most} at most)"
        else:
            size = f"{first.own.relative:.2g}"
            differs = (
                f"is {size} of its size off ({most} at most); rounding in {in_words(self.dtype)} explains "
                f"{first.rounding:.2g}"
            )
        text = f"{first.name} (in model.py, {made.by}).\nFrom the same input, it {differs}.\nLook at: {check}."
        unseen = self._unseen_before(first.name)
        if unseen:
            where = unseen[0] if len(unseen) == 1 else f"{unseen[0]} … {unseen[-1]}"
            text += f"\nIt may as well come from {where}, which {other} does not have."
        places = Counter(_of_any_layer(step.name) for step in others)
        if places:
            listed = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in places.items())
            text += f"\nBy themselves, these differ too: {listed}."
        return text

    def _unseen_before(self, name: str) -> list[str]:
        """The tensors between those that the other run has and this one, in the order of the pass."""
        missing, waiting = set(self.missing), [name]
        unseen: set[str] = set()
        while waiting:
            new = missing.intersection(self.made[waiting.pop()].of) - unseen
            unseen |= new
            waiting += new
        return [it for it in self.made if it in unseen]

    def to_json(self) -> dict[str, Any]:
        """The figures to print as JSON; what is infinite is None."""
        logits = self.logits and {key: _finite(value) for key, value in self.logits._asdict().items()}
        first, beyond, worst = next(iter(self.parted), None), self.first_beyond_tolerance, self.worst
        return {
            "agree": self.agree,
            "first": first and first.name,
            "first_beyond_tolerance": beyond and beyond.name,
            "made_by": first and self.made[first.name].by,
            "relative": first and _finite(first.own.relative),
            "absolute": first and _finite(first.own.absolute),
            "rounding": first and _finite(first.rounding),
            "parted": [step.name for step in self.parted],
            "worst": worst.name,
            "worst_relative": _finite(worst.whole.relative),
            "worst_rounding": _finite(worst.rounding_in_all),
            "tolerance": self.tolerance,
            "dtype": in_words(self.dtype),
            "tensors": len(self.steps),
            "missing": len(self.missing),
            "unknown": len(self.unknown),
            "logits": logits,
        }


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def compare(
    model: Model,
    ids: Sequence[int] | Tensor,
    other: Mapping[str, Tensor],
    *,
    tolerance: float | None = None,
    rounding: torch.dtype | None = None,
    ops: Ops = REFERENCE,
    progress: bool = False,
) -> Comparison:
    """Where another run over the prompt, ids [T], parts ways with the model's own.

    other: the tensors of that run, or arrays, as many as there are, by the names of a tap and in its layout; a batch
        dimension of 1 and heads joined into one dimension are understood, and scores may be hidden by any large
        negative number.
    tolerance: how far apart, relatively, any tensor of the two runs may be; None: as far as rounding explains, and
        each step by itself too.
    rounding: the dtype whose rounding is to be expected; None: the coarsest of the model and the tensors.
    progress: bars on stderr.

    The model runs two times and, for two rows each, two times more: alone; with the other's tensor put in the place of
    each that it has; and both with every tensor shaken by as much as rounding can do.

    Raises UserError where no name is one of a pass, for tensors that are not of floats in 16 bits or more or of the
    last position only, for a tolerance below 0, and for what `trace` raises it.
    """
    params = model.params
    ids = tokens_of_one_prompt(ids, params)
    if tolerance is not None and not tolerance >= 0:
        raise UserError(f"the tolerance should be a number of 0 or more, such as 0.01, is {tolerance}")
    if rounding is not None and rounding not in _COMPARABLE:
        raise UserError(f"the rounding should be that of a dtype such as torch.bfloat16, is {rounding!r}")
    made = how_it_is_made(params)
    shared = _shared(other, made)
    dtype = rounding or max((model.weights.norm.dtype, *(shared[name].dtype for name in shared)), key=_eps)
    # two rows take as much memory as somewhat more tokens, since scores grow with the square
    check_trace(params, model.weights.norm.dtype, math.ceil(1.5 * len(ids)), LAST, ops=ops)
    shapes: dict[str, tuple[int, ...]] = {}
    whole: dict[str, Difference] = {}
    own: dict[str, Difference] = {}
    logits: list[Logits] = []

    def look(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            shapes[name] = tuple(tensor.shape)
            shared[name] = _in_our_layout(shared[name], tensor.shape)
            whole[name] = difference(tensor, shared[name])
            if name == LAST and shared[name].shape == tensor.shape:
                logits.append(Logits.of(tensor.cpu(), shared[name].cpu()))
        return tensor

    def look_and_replace(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            own[name] = difference(tensor, shared[name])
        return _replaced(name, tensor, shared)

    def run(tap: Tap, rows: int | None = None) -> None:
        tokens = torch.tensor(ids if rows is None else [ids] * rows, device=model.weights.norm.device)
        with count_layers(params, progress) as count, torch.no_grad():
            forward(model.weights, params, tokens, ops=ops, tap=chain(tap, count))

    run(look)
    run(look_and_replace)
    times = _TIMES if _eps(dtype) <= _eps(torch.float32) else _TIMES_IN_16_BITS
    explained: list[dict[str, float]] = []
    for fed in (shared, {}):
        levels: dict[str, float] = {}
        run(_rounding(fed, _eps(dtype), levels), rows=2)
        explained.append({name: times * level for name, level in levels.items()})
    steps = tuple(
        Step(
            name,
            shapes[name],
            tuple(shared[name].shape),
            whole[name],
            _TIMES_IN_ALL * explained[1][name],
            own[name],
            explained[0][name],
        )
        for name in made
        if name in shared
    )
    return Comparison(
        steps=steps,
        missing=tuple(name for name in made if name not in shared),
        unknown=tuple(name for name in other if name not in made),
        logits=logits[0] if logits else None,
        dtype=dtype,
        tolerance=tolerance,
        made=made,
    )


def _shared(other: Mapping[str, Tensor], made: Mapping[str, Made]) -> dict[str, Tensor]:
    """Those of the other run's tensors that a pass has. Raises UserError where there is none, or one is no floats."""
    if isinstance(other, Trace) and other.last_position:
        raise UserError("the trace is of the last position only; trace all positions to compare (no --last-position)")
    shared = {name: _as_floats(name, other[name]) for name in other if name in made}
    if not shared:
        names = ", ".join(in_short(name) for name in list(other)[:3])
        raise UserError(
            f"none of the {len(other)} tensors to compare with has a name of this pass ({names or 'there are none'}); "
            f"it has {FIRST}, layers.0.attention_norm, layers.0.attention.q, … {LAST}: see the README's list"
        )
    return shared


def _as_floats(name: str, given: Any) -> Tensor:
    try:
        tensor = given if isinstance(given, Tensor) else torch.tensor(numpy.asarray(given))
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or tensor.dtype not in _COMPARABLE:
        kind = getattr(given, "dtype", type(given).__name__)
        raise UserError(f"the tensor {name} to compare with is {kind}; it should be of floats in 16 or 32 bits")
    return tensor


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _in_our_layout(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with a batch dimension of 1, or with its heads joined, without and apart; any other as it is."""
    for joined in (shape, torch.Size((*shape[:-2], shape[-2] * shape[-1]))):
        if tensor.shape in (joined, (1, *joined)):
            return tensor.reshape(shape)
    return tensor


def _replaced(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """The other run's tensor in the place of ours, where it has one of the same shape."""
    theirs = others.get(name)
    return tensor if theirs is None or theirs.shape != tensor.shape else theirs.to(tensor)


def _rounding(others: Mapping[str, Tensor], eps: float, levels: dict[str, float]) -> Tap:
    """A tap for two rows [2, T], the second with every tensor moved by up to eps; notes how far that moves the next.

    Both go on with the other run's tensor where there is one. So each step's own sensitivity is seen: a sum of two
    large opposite terms, say, passes on much more rounding than it makes.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def shake(name: str, rows: Tensor) -> Tensor:
        exact, shaken = rows
        levels[name] = difference(shaken, exact).relative + eps
        exact, shaken = _replaced(name, exact, others), _replaced(name, shaken, others)
        generator = generators.setdefault(rows.device, torch.Generator(rows.device).manual_seed(0))
        noise = torch.rand(shaken.shape, generator=generator, device=rows.device).mul_(2 * eps).add_(1 - eps)
        return torch.stack((exact, (shaken * noise).to(rows.dtype)))

    return shake


class Other(NamedTuple):
    """What --with means, before it is run."""

    name: str
    run: Callable[[], Trace]
    origin: Origin | None = None  # of a file, whose weights and prompt may be others by mistake
    params: Params | None = None  # where they may be others than the model's


def choose_other(options: Namespace, chosen: ChosenModel, ids: Sequence[int]) -> Other:
    """--with -> the other run, checked as far as can be without its weights. Raises UserError."""
    name: str = options.other
    file = Path(name)
    if file.is_file() or file.suffix == ".safetensors":
        loaded = load_trace(file)
        _shared(loaded, how_it_is_made(chosen.checkpoint.params))
        return Other(name, lambda: loaded, loaded.origin, loaded.origin.params if loaded.origin else None)
    if name in ("hf", "meta"):
        if chosen.checkpoint.scales:
            raise UserError(f"--with {name}: others know no such int8; give the folder with the weights as they were")
        if chosen.max_ram is not None:
            raise UserError(f"--with {name}: needs all weights in memory; leave --max-ram out")
        if chosen.gpu_layers is not None:
            raise UserError(f"--with {name}: needs all weights on one device; leave --gpu-layers out")
        if name == "hf":
            check_hf("--with hf")
        else:
            check_meta(chosen.checkpoint.params, "--with meta")
        return Other(name, lambda: _run_implementation(trace_hf if name == "hf" else trace_meta, chosen, ids))
    changes: dict[str, Any] = {"tokenizer": None}
    if name in DTYPES_BY_NAME:
        changes |= {"dtype": name, "quantize": None}
    elif name == "int8":
        changes |= {"quantize": "int8"}
    elif name != "fast":
        changes |= {"weights": name}
    with_changes = Namespace(**{**vars(options), **changes})
    others = choose_model(with_changes, needs_tokenizer=False, named_by="--with")
    unlike = not_alike(others.checkpoint.params, chosen.checkpoint.params)
    if unlike:
        raise UserError(f"--with {name}: is another model, with {unlike}; compare two of the same shape")
    return Other(name, lambda: _run_own(others, ids, reference=name != "fast"), params=others.checkpoint.params)


def _run_own(chosen: ChosenModel, ids: Sequence[int], reference: bool) -> Trace:
    model, ops, _ = load_model(chosen, Lengths.of_one_pass(len(ids)), reference)
    return trace(model, ids, ops=ops, device="cpu", progress=True)


def _run_implementation(trace_it: Callable[..., Trace], chosen: ChosenModel, ids: Sequence[int]) -> Trace:
    model, _, _ = load_model(chosen._replace(quantized=False), Lengths.of_one_pass(len(ids)), reference=True)
    return trace_it(model, ids, progress=True)


def show(comparison: Comparison, other: str, patterns: Sequence[str] = ()) -> None:
    """Prints a table (a line for each layer, or for each tensor that a pattern means), the verdict, and JSON."""
    wanted = Patterns(patterns)
    names = {name for name in comparison.made if wanted.matching(name)}
    lines = [[step] for step in comparison.steps if step.name in names] if patterns else _by_layer(comparison.steps)
    width = max([9, *(len(steps[0].name) for steps in lines)]) if patterns else 9
    at = 2 if patterns else 21
    print(f"{'':{width}}{'both runs, to the end':>27}{'':{at}}{'each step by itself':>22}")
    figures, place = f"{'relative':>9}{'rounding':>9}", "" if patterns else f"  {'at':<19}"
    print(f"{'':{width}}{'absolute':>9}{figures}{place}  {figures}{place}".rstrip())
    for steps in lines:
        absolute = max(step.whole.absolute for step in steps)
        whole = max(steps, key=lambda step: step.whole.relative)
        own = max(steps, key=lambda step: step.own.relative / step.rounding)
        label = steps[0].name if patterns else _layer_of(steps[0].name)
        both = f"{absolute:9.1e}{whole.whole.relative:9.1e}{whole.rounding_in_all:9.1e}{_at(whole, place)}"
        each = f"{own.own.relative:9.1e}{own.rounding:9.1e}{_at(own, place).rstrip()}{' *' if own.parts else ''}"
        print(f"{label:{width}}{both}  {each}")
    if comparison.parted:
        print("* more than rounding explains")
    if comparison.logits:
        logits = comparison.logits
        print(f"{'logits':<36}{'mean':>12}{'last':>12}")
        print(f"{f'likeliest {TOP_K} tokens in common':<36}{logits.top_k:12.1%}{logits.top_k_last:12.1%}")
        last = "yes" if logits.same_likeliest_last else "no"
        print(f"{'the likeliest token is the same':<36}{logits.same_likeliest:12.1%}{last:>12}")
        print(f"{'KL divergence, nats':<36}{logits.kl:12.2e}{logits.kl_last:12.2e}")
    print(comparison.verdict(other))
    print(json.dumps(comparison.to_json()))


def _at(step: Step, place: str) -> str:
    """The name within its layer, where the table has room for one."""
    short = re.sub(r"layers\.\d+\.", "", step.name)
    return f"  {short:<{len(place) - 2}}" if place else ""


def _of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


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
    """Lines that say what the two params.json have not in common, though all shapes are the same."""
    for field in ("norm_eps", "rope_theta", "rope_scaling"):
        ours, theirs = getattr(model.params, field), getattr(other.params or model.params, field)
        if ours != theirs:
            hidden = " (16 bits may hide what it does; --dtype float32 does not)"
            in_16_bits = model.weights.norm.dtype.itemsize == 2
            yield f"{other.name} has {field} {theirs}, not {ours}{hidden if in_16_bits else ''}"


def _left_out(comparison: Comparison, other: str) -> Iterator[str]:
    """Lines that say which names only one side has."""
    for name in comparison.unknown[:5]:
        near = difflib.get_close_matches(name, comparison.made, n=3, cutoff=0)
        yield f"{other}: no tensor of a pass is named {in_short(name)!r}; the nearest are {', '.join(near)}; left out"
    if len(comparison.unknown) > 5:
        yield f"{other}: and {len(comparison.unknown) - 5} more names that no pass has"
    missing = dict.fromkeys(map(_of_any_layer, comparison.missing))
    if missing:
        names = ", ".join(list(missing)[:3]) + (", …" if len(missing) > 3 else "")
        yield f"{other} does not have {names}: what differs there shows at the next one that it has"


def build_parser() -> ArgumentParser:
    """The options of `python -m llama3_raw.compare`."""
    parser = ArgumentParser(
        prog="python -m llama3_raw.compare",
        description="Runs a prompt through the model by the exact operations, and finds where another run of it parts "
        "ways. Exit status 0: they agree; 1: they do not; 2: it cannot be done.",
    )
    add_prompt_options(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--with",
        dest="other",
        required=True,
        type=not_empty,
        metavar="B",
        help="a folder or name as for --weights; a trace (FILE.safetensors); the same weights in another dtype "
        f"({', '.join(DTYPES_BY_NAME)}), by the fast operations (fast), rounded (int8), in transformers (hf) or in "
        "Meta's code (meta)",
    )
    group.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="agree if no tensor is further apart than this share of its size (default: what rounding explains, for "
        "each step by itself too)",
    )
    group.add_argument(
        "--rounding",
        choices=DTYPES_BY_NAME,
        help="expect the rounding of this dtype, where B was computed in another than it is saved in (default: the "
        "coarsest of the tensors)",
    )
    group.add_argument(
        "--names",
        action="append",
        type=not_empty,
        metavar="PATTERN",
        help="a line for each tensor that this means, as in llama3_raw.tracing, not for each layer (may be repeated)",
    )
    add_model_options(parser)
    return parser


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ArgumentTypeError(f"should be a number of 0 or more, such as 0.01, is {text!r}")
    return value


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Runs the tool; -> exit status."""
    options = build_parser().parse_args(arguments)
    prompt = read_prompt(options.prompt, "python -m llama3_raw.compare --with B")
    chosen = choose_model(options, needs_tokenizer=not options.ids)
    ids = chosen_ids(chosen, prompt, are_ids=options.ids, special=options.special)
    names = options.names or []
    check_names(chosen.checkpoint.params, *names)
    other = choose_other(options, chosen, ids)
    tensors = other.run()  # its weights are let go before ours come
    model, ops, which = load_model(chosen, Lengths.of_one_pass(len(ids)), reference=True)
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
