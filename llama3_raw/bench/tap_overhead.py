"""What seeing inside costs: model.py beside itself without taps, and a trace of every tensor beside the plain pass."""

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

LENGTH = 17  # tokens of the prompt
_PASSES = 200  # without work, of a few milliseconds each


@dataclass(frozen=True)
class Cost:
    """How many times as long a pass takes as a plain one beside it: in each round, and the median."""

    ratios: list[float]
    ratio: float
    plain_seconds: float  # median


@dataclass(frozen=True)
class TapFigures:
    """What `measure_taps` found."""

    default_tap_prompt: Cost  # the default tap, against no call of a tap at all
    default_tap_token: Cost  # the same for one token behind the prompt
    default_tap_seconds: float  # what its calls take in such a pass, found where there is nothing else to do
    trace: Cost  # a trace of every tensor of the prompt, against the pass alone, by the exact operations
    trace_bytes: int
    threads: int


class _WithoutTaps(ast.NodeTransformer):
    """Makes x of every tap(name, x), and tap of every scoped(tap, prefix)."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        kept = {"tap": 1, "scoped": 0}.get(node.func.id) if isinstance(node.func, ast.Name) else None
        return node if kept is None else node.args[kept]


def model_without_taps() -> ModuleType:
    """model.py as it would be if nobody ever looked inside, as a module beside it."""
    tree = ast.fix_missing_locations(_WithoutTaps().visit(ast.parse(inspect.getsource(model_module))))
    module = ModuleType(f"{model_module.__name__}_without_taps")
    module.__package__ = model_module.__package__
    exec(compile(tree, str(model_module.__file__), "exec"), vars(module))
    return module


def measure_taps(model: Model, ops: Ops, rounds: int) -> TapFigures:
    """Measures a prompt of 17 tokens, and one token behind it.

    In each round every pass is beside the plain one that it is compared with, and either comes first in turn. ops: what
    the default tap is measured with; the faster they are, the more it shows.
    """
    weights, params = model.weights, model.params
    device = weights.tok_embeddings.device
    ids = random_ids(model, LENGTH)
    prompt, token = torch.tensor(ids, device=device), torch.tensor(ids[:1], device=device)
    cache = KVCache.allocate(params, max_seq_len=LENGTH + 1, like=weights)
    forward_without_taps: Callable[..., Tensor] = model_without_taps().forward
    kept = trace(model, ids)  # known from now on: its size, and that the memory holds it

    def over_the_prompt(forward: Callable[..., Tensor]) -> Tensor:
        return forward(weights, params, prompt, cache=cache, logits_at=-1, ops=ops)

    def over_the_token(forward: Callable[..., Tensor], ops: Ops = ops) -> Tensor:
        return forward(weights, params, token, cache=cache, start=LENGTH, logits_at=-1, ops=ops)

    # each with what it is compared with
    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = [
        (lambda: over_the_prompt(forward), lambda: over_the_prompt(forward_without_taps)),
        (lambda: over_the_token(forward), lambda: over_the_token(forward_without_taps)),
        (lambda: trace(model, ids)["logits"], lambda: forward(weights, params, prompt, ops=REFERENCE)),
    ]
    seconds: list[list[tuple[float, float]]] = [[] for _ in pairs]
    with torch.no_grad():
        for watched, plain in pairs:  # once before it counts: pages come in and threads start
            assert torch.equal(watched(), plain()), "to look on should change nothing"
        for number in tqdm(range(rounds), desc="measuring", leave=False):
            for (watched, plain), times in zip(pairs, seconds, strict=True):
                times.append(_in_turn(watched, plain, number))
        no_work = _no_work(model)
        alone = [
            _in_turn(lambda: over_the_token(forward, no_work), lambda: over_the_token(forward_without_taps, no_work), i)
            for i in range(_PASSES)
        ]
    at_the_prompt, at_the_token, traced = map(_cost, seconds)
    return TapFigures(
        default_tap_prompt=at_the_prompt,
        default_tap_token=at_the_token,
        default_tap_seconds=statistics.median(took - plain_took for took, plain_took in alone),
        trace=traced,
        trace_bytes=kept.nbytes,
        threads=torch.get_num_threads(),
    )


def _no_work(model: Model) -> Ops:
    """Operations for one token that compute nothing, so that the rest of a pass shows."""
    params = model.params
    zeros = model.weights.norm.new_zeros(1, max(params.vocab_size, params.hidden_dim, params.dim))
    return Ops(
        embed=lambda tokens, table: zeros[:, : params.dim],
        linear=lambda x, weight: zeros[:, : weight.shape[0]],
        attend=lambda q, keys, values, start, tap: q,
    )


def _in_turn(watched: Callable[[], Tensor], plain: Callable[[], Tensor], number: int) -> tuple[float, float]:
    """The seconds of both, of which either comes first in turn."""
    if number % 2:
        plain_took, took = _seconds(plain), _seconds(watched)
    else:
        took, plain_took = _seconds(watched), _seconds(plain)
    return took, plain_took


def _seconds(compute: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    compute().flatten()[0].item()  # waits for a GPU to be done
    return time.perf_counter() - start


def _cost(times: list[tuple[float, float]]) -> Cost:
    ratios = [took / plain_took for took, plain_took in times]
    return Cost(ratios, statistics.median(ratios), statistics.median(plain_took for _, plain_took in times))
