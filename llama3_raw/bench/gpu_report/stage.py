"""`Stage`: what a phase measures on, a GPU with 8B, or in a rehearsal this CPU with stand-ins."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor

from ...backends import cuda_graphs
from ...backends.cuda_graphs import Capture, CudaGraphs, capture_graph
from ...model import KVCache, forward
from ...ops import Ops
from ...weights import Model
from .. import synthetic
from ..engines import Engine, ThisEngine
from ..roofline import seconds_of
from ..synthetic import random_weights, synthetic_checkpoint

_ROUND = 0.01  # seconds
_TINY = {
    **{"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 64},
    **{"multiple_of": 32, "ffn_dim_multiplier": 0.3, "norm_eps": 1e-05, "rope_theta": 500000.0},
}


class Emit(Protocol):
    """Reports a result at once. is_detail: for the file only, not for the table."""

    def __call__(self, name: str, value: float | str, unit: str = "", is_detail: bool = False) -> None: ...


class Stage(NamedTuple):
    """The device, what is measured on it, and how often."""

    device: torch.device
    dtype: torch.dtype
    folder: Path  # of the report
    is_rehearsal: bool = False
    contexts: tuple[int, ...] = (17, 4096)
    prompts: tuple[int, ...] = (17, 256, 2048)
    new_tokens: int = 64
    rounds: int = 3
    batch: int = 16
    many_tokens: int = 10_000
    copy_bytes: int = 1 << 28
    product_width: int = 8192

    @property
    def longest(self) -> int:
        """The tokens that a cache holds."""
        return max(max(self.contexts) + self.new_tokens, max(self.prompts)) + 1

    @property
    def capture(self) -> Capture:
        """What captures a pass; in a rehearsal it is run again instead."""
        return (lambda function: function) if self.is_rehearsal else capture_graph

    def model(self, size: str = "8b", quantize: str | None = None) -> Model:
        """Create a model with random weights on the device."""
        checkpoint = synthetic_checkpoint(size)
        weights = random_weights(checkpoint, self.device, self.dtype, quantize=quantize)
        return Model(weights, checkpoint.params, None)

    def engine(self, model: Model, ops: Ops, compiled: bool = False) -> ThisEngine:
        """Return this engine with a cache for all that is measured."""
        return ThisEngine(model, self.longest, ops, compiled=compiled)

    def decode_rate(self, engine: Engine, context: int, new_tokens: int | None = None) -> float:
        """Return tokens/s, the median of the rounds after one to warm up, which compiles and captures.

        Raises RuntimeError if that fails: without a graph this engine would decode slowly under a wrong name.
        """
        count = new_tokens or self.new_tokens
        engine.decode(context, count)
        if isinstance(engine, ThisEngine) and engine.failures:
            raise RuntimeError("; ".join(engine.failures))
        return count / statistics.median(engine.decode(context, count) for _ in range(self.rounds))

    def microseconds(self, function: Callable[[], Tensor], repeats: int = 1) -> float:
        """Return the time of a captured function, the median of the rounds, divided by its repeats.

        A round replays it for _ROUND: starting and waiting take as long as some kernels, and the clock has to rise.
        """
        replay = self.capture(function)
        replay()
        count = 1 if self.is_rehearsal else math.ceil(_ROUND / seconds_of(replay, self.device))

        def replays() -> None:
            for _ in range(count):
                replay()

        replays()
        return 1e6 * statistics.median(seconds_of(replays, self.device) for _ in range(self.rounds)) / count / repeats


def gpu_stage(folder: Path) -> Stage:
    """Return the stage on the first GPU."""
    return Stage(torch.device("cuda"), torch.bfloat16, folder)


@contextlib.contextmanager
def rehearsal_stage(folder: Path) -> Iterator[Stage]:
    """Yield a stage on this CPU: kernels interpreted in fp16, models tiny, passes run instead of captured.

    Triton's interpreter must have been chosen before.
    """

    def where_possible(model: Model, cache: KVCache, ops: Ops, compiled: bool = False) -> CudaGraphs | None:
        capture: Capture = lambda function: function  # noqa: E731
        return CudaGraphs(model, cache, ops, capture, compiled) if ops.can_capture else None

    with (
        mock.patch.dict(synthetic.SYNTHETIC, dict.fromkeys(("8b", "1b"), (_TINY, False))),
        mock.patch.object(CudaGraphs, "where_possible", where_possible),
        mock.patch.object(cuda_graphs, "compiled_forward", _compiled_forward),
    ):
        yield Stage(
            *(torch.device("cpu"), torch.float16, folder),
            is_rehearsal=True,
            contexts=(3, 20),
            prompts=(3, 18, 30),
            new_tokens=2,
            rounds=1,
            batch=2,
            many_tokens=10,
            copy_bytes=1 << 20,
            product_width=64,
        )


def _compiled_forward() -> Callable[..., Tensor]:
    """Return `forward`, traced by torch.compile but not compiled."""
    return torch.compile(forward, fullgraph=True, dynamic=False, backend="eager")


def eager(ops: Ops) -> Ops:
    """Return the operations without graphs."""
    return ops._replace(can_capture=False)


def unfused(ops: Ops) -> Ops:
    """Return the operations with norms and rotations by torch."""
    return ops._replace(rms_norm=None, rope=None)
