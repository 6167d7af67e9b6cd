"""The forward pass over a few tokens as a CUDA graph: captured once, then replayed without a word from Python.

A pass of 8B is some hundreds of kernels of a few microseconds each; to launch them one by one takes longer than to run
them. A graph is launched at once. What it reads and writes stays where it was when it was captured: the weights, the
cache, and two tensors for the tokens and where they start, which are filled in before each replay.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import in_short
from ..model import KVCache, forward
from ..ops import Ops
from ..weights import Model, devices_of
from .cpu import FEW

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes a function -> one that does the same work on the same tensors, and gives the same tensor each time."""


def capture_graph(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Runs the function, which has its kernels compiled, and captures it on the current GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch wants no first time of anything in a capture
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def compiled_forward() -> Callable[..., Tensor]:
    """`forward` by torch.compile, which fuses what stands between the products: norms, rotations, SwiGLU.

    It is compiled when it is first called; torch keeps what it made on the disk, for the next process.
    """
    print("llama3_raw: compiling the pass over one token, once for this process", file=sys.stderr)
    return torch.compile(forward, fullgraph=True, dynamic=False)


class CudaGraphs:
    """Passes over up to FEW tokens of one text behind what its cache holds, without logits_at or a tap.

    Each is captured at its first use, where it is run for a trial: it writes what it would write anyhow.
    """

    def __init__(self, model: Model, cache: KVCache, ops: Ops, capture: Capture = capture_graph, compiled: bool = True):
        """compiled: whether the pass over one token is compiled before."""
        self.cache = cache
        self._model = model
        self._ops = ops
        self._capture = capture
        self._compiled = compiled
        device = cache.keys[0].device
        self._tokens = torch.zeros(FEW, dtype=torch.long, device=device)
        self._start = torch.zeros((), dtype=torch.long, device=device)
        self._replays: dict[int, Callable[[], Tensor]] = {}  # by the number of tokens, one or FEW
        for tensor in (*cache.keys, *cache.values):
            torch._dynamo.mark_dynamic(tensor, tensor.dim() - 3)  # or each length of a cache would be compiled anew

    @staticmethod
    def where_possible(model: Model, cache: KVCache, ops: Ops, compiled: bool = True) -> CudaGraphs | None:
        """None unless all of the model is on one GPU, and the operations are its fast ones.

        The exact ones are there to be stepped through; others read the whole cache where `start` is a tensor.
        """
        devices = devices_of(model.weights)
        is_possible = len(devices) == 1 and devices.pop().type == "cuda" and ops.can_capture
        return CudaGraphs(model, cache, ops, compiled=compiled) if is_possible else None

    def fit(self, n_tokens: int, start: int) -> bool:
        """Whether so many tokens from `start` on can be computed at once: a few take the room of FEW."""
        return n_tokens == 1 or (n_tokens <= FEW and start + FEW <= self.cache.max_seq_len)

    def are_ready(self, n_tokens: int) -> bool:
        """Whether so many tokens need no capture any more."""
        return _width(n_tokens) in self._replays

    @torch.no_grad()
    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        """tokens [T] on the device -> logits [T, vocab], which stay until the next call."""
        self._tokens[: len(tokens)] = tokens
        self._start.fill_(start)
        width = _width(len(tokens))
        if width not in self._replays:
            with torch.cuda.device_of(tokens):
                self._replays[width] = self._captured(width)
        return self._replays[width]()[: len(tokens)]

    def _captured(self, width: int) -> Callable[[], Tensor]:
        """The pass over `width` tokens as a graph; as it stands if it cannot be captured, which a line tells."""
        # compiling takes long, and pays where there are many passes
        run = (width == 1 and self._compiled and self._compiled_pass()) or self._pass(forward, width)
        try:
            return self._capture(run)
        except RuntimeError as error:  # of CUDA
            print(f"llama3_raw: no graph is captured ({in_short(error)}); continuing without", file=sys.stderr)
            return run

    def _pass(self, function: Callable[..., Tensor], width: int) -> Callable[[], Tensor]:
        weights, params, _ = self._model
        tokens = self._tokens[:width]
        return lambda: function(weights, params, tokens, cache=self.cache, start=self._start, ops=self._ops)

    def _compiled_pass(self) -> Callable[[], Tensor] | None:
        """The pass over a token, compiled; None if the compiler fails, which a line tells."""
        run = self._pass(compiled_forward(), 1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what could be compiled better
                run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise every kind there is
            print(f"llama3_raw: torch.compile fails ({in_short(error)}); continuing without", file=sys.stderr)
            return None
        return run


def _width(n_tokens: int) -> int:
    """Of the pass for so many: a few take as long as FEW, and a graph for each number would take room."""
    return 1 if n_tokens == 1 else FEW


def copy_to_host_async(values: Tensor) -> Callable[[], list[list[int]]]:
    """Send a small tensor of two dimensions to the CPU -> a function that waits for it.

    It does not wait for what the GPU was given since.
    """
    if values.device.type != "cuda":
        return values.tolist
    with torch.cuda.device_of(values):
        arrived, here = torch.cuda.Event(), torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        here.copy_(values, non_blocking=True)
        arrived.record()

    def wait() -> list[list[int]]:
        arrived.synchronize()
        return here.tolist()

    return wait
