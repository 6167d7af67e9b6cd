"""Measure what taps and traces cost: model.py compared with a copy without taps, and a trace with a plain pass."""

from __future__ import annotations

import ast
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from tqdm import tqdm

from .. import model as model_module
from ..model import REFERENCE, KVCache, forward
from ..ops import Ops
from ..tracing.record import trace
from ..weights import Model
from .engines import random_ids

LENGTH = 17  # tokens in the prompt
_PASSES = 200  # passes that compute nothing, a few milliseconds each


@dataclass(frozen=True)
class Cost:
    """The time of a pass divided by that of a plain pass next to it: in each round, and the median."""

    ratios: list[float]
    ratio: float
    plain_seconds: float  # median


@dataclass(frozen=True)
class TapFigures:
    """The result of `measure_taps`."""

    default_tap_prompt: Cost  # the default tap, compared with no call of a tap
    default_tap_token: Cost  # the same for one token after the prompt
    default_tap_seconds: float  # for its calls in such a pass, measured in passes that compute nothing
    trace: Cost  # a trace of every tensor of the prompt, compared with the pass alone, by the exact operations
    trace_bytes: int
    threads: int


class _WithoutTaps(ast.NodeTransformer):
    """Replace every tap(name, x) by x, and every scoped(tap, prefix) by tap."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        index = {"tap": 1, "scoped": 0}.get(node.func.id) if isinstance(node.func, ast.Name) else None
        return node if index is None else node.args[index]


def model_without_taps() -> ModuleType:
    """Return a copy of the module model.py from which every tap is removed."""
    tree = ast.fix_missing_locations(_WithoutTaps().visit(ast.parse(inspect.getsource(model_module))))
    module = ModuleType(f"{model_module.__name__}_without_taps")
    module.__package__ = model_module.__package__
    exec(compile(tree, str(model_module.__file__), "exec"), vars(module))
    return module


def measure_taps(model: Model, ops: Ops, rounds: int) -> TapFigures:
    """Measure a prompt of 17 tokens, and one token after it.

    In each round every pass runs next to the plain one that it is compared with, and they take turns to be the first.
    ops: the operations to measure the default tap with. The faster they are, the larger its share.
    """
    weights, params = model.weights, model.params
    device = weights.norm.device
    ids = random_ids(model, LENGTH)
    prompt, token = torch.tensor(ids, device=device), torch.tensor(ids[:1], device=device)
    cache = KVCache.allocate(params, max_seq_len=LENGTH + 1, like=weights)
    forward_without_taps: Callable[..., Tensor] = model_without_taps().forward
    full_trace = trace(model, ids, ops=REFERENCE)  # for its size, and to know that it fits into memory

    def over_prompt(forward: Callable[..., Tensor]) -> Tensor:
        return forward(weights, params, prompt, cache=cache, logits_at=-1, ops=ops)

    def over_token(forward: Callable[..., Tensor], ops: Ops = ops) -> Tensor:
        return forward(weights, params, token, cache=cache, start=LENGTH, logits_at=-1, ops=ops)

    # each pass, and the plain pass that it is compared with
    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = [
        (lambda: over_prompt(forward), lambda: over_prompt(forward_without_taps)),
        (lambda: over_token(forward), lambda: over_token(forward_without_taps)),
        (lambda: trace(model, ids, ops=REFERENCE)["logits"], lambda: forward(weights, params, prompt, ops=REFERENCE)),
    ]
    seconds: list[list[tuple[float, float]]] = [[] for _ in pairs]
    with torch.no_grad():
        for tapped, plain in pairs:  # a warm-up: loads pages and starts threads
            assert torch.equal(tapped(), plain()), "a tap should change nothing"
        for number in tqdm(range(rounds), desc="measuring", leave=False):
            for (tapped, plain), times in zip(pairs, seconds, strict=True):
                times.append(_time_both(tapped, plain, number))
        empty = _empty_ops(model)
        empty_seconds = [
            _time_both(lambda: over_token(forward, empty), lambda: over_token(forward_without_taps, empty), i)
            for i in range(_PASSES)
        ]
    prompt_cost, token_cost, trace_cost = map(_cost, seconds)
    return TapFigures(
        default_tap_prompt=prompt_cost,
        default_tap_token=token_cost,
        default_tap_seconds=statistics.median(tapped - plain for tapped, plain in empty_seconds),
        trace=trace_cost,
        trace_bytes=full_trace.nbytes,
        threads=torch.get_num_threads(),
    )


def _empty_ops(model: Model) -> Ops:
    """Return operations for one token that compute nothing, so that the rest of a pass can be timed."""
    params = model.params
    zeros = model.weights.norm.new_zeros(1, max(params.vocab_size, params.hidden_dim, params.dim))
    return Ops(
        embed=lambda tokens, table: zeros[:, : params.dim],
        linear=lambda x, weight: zeros[:, : weight.shape[0]],
        attend=lambda q, keys, values, start, tap: q,
    )


def _time_both(tapped: Callable[[], Tensor], plain: Callable[[], Tensor], number: int) -> tuple[float, float]:
    """Return the seconds of both passes. Odd numbers run the plain one first."""
    if number % 2:
        plain_seconds, tapped_seconds = _seconds(plain), _seconds(tapped)
    else:
        tapped_seconds, plain_seconds = _seconds(tapped), _seconds(plain)
    return tapped_seconds, plain_seconds


def _seconds(compute: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    compute().flatten()[0].item()  # waits for a GPU
    return time.perf_counter() - start


def _cost(times: list[tuple[float, float]]) -> Cost:
    ratios = [tapped / plain for tapped, plain in times]
    return Cost(ratios, statistics.median(ratios), statistics.median(plain for _, plain in times))
