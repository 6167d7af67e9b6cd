"""The forward pass over a few tokens as a CUDA graph: captured once, then replayed without Python.

A pass of 8B is some hundreds of kernels of a few microseconds each; launching them one by one takes longer than running
them. A graph is launched at once. It reads and writes the memory that it was captured with: the weights, the cache, and
two tensors for the tokens and their start, which are filled before each replay.
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
from .cpu import MAX_DECODE_ROWS

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""capture(function) -> a function that repeats the work on the same tensors and returns the same tensor each time."""


def capture_graph(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run the function, so that its kernels are compiled, and capture it on the current GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch requires a warm-up before a capture
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except BaseException:
        torch.cuda.set_stream(current)  # torch leaves the capture's stream current if it cannot end the capture
        raise

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def compiled_forward() -> Callable[..., Tensor]:
    """Return `forward` with torch.compile, which fuses the operations between the products.

    It is compiled when first called, in up to minutes; torch keeps the result on the disk for the next process.
    """
    print("llama3_raw: compiling the pass over one token, once for this process", file=sys.stderr)
    return torch.compile(forward, fullgraph=True, dynamic=False)


class CudaGraphs:
    """Passes over up to MAX_DECODE_ROWS new tokens of the one text in a cache, without logits_at or a tap.

    Each is captured at its first use. The warm-up runs before that write to the cache only what the pass itself writes.
    """

    def __init__(
        self, model: Model, cache: KVCache, ops: Ops, capture: Capture = capture_graph, compiled: bool = False
    ):
        """compiled: whether to compile the pass over one token before it is captured."""
        self.cache = cache
        self.failures: list[str] = []  # what could not be compiled or captured, and why
        self._model = model
        self._ops = ops
        self._capture = capture
        self._compiled = compiled
        device = cache.keys[0].device
        self._tokens = torch.zeros(MAX_DECODE_ROWS, dtype=torch.long, device=device)
        self._start = torch.zeros((), dtype=torch.long, device=device)
        self._replays: dict[int, Callable[[], Tensor]] = {}  # by the number of tokens, one or MAX_DECODE_ROWS
        for tensor in (*cache.keys, *cache.values):
            torch._dynamo.mark_dynamic(tensor, tensor.dim() - 3)  # no new compilation for each cache length

    @staticmethod
    def where_possible(model: Model, cache: KVCache, ops: Ops, compiled: bool = False) -> CudaGraphs | None:
        """Return graphs if the whole model is on one GPU and the operations are its fast ones, or else None.

        The exact operations are meant for inspection; others read the whole cache if `start` is a tensor.
        """
        devices = devices_of(model.weights)
        is_possible = len(devices) == 1 and devices.pop().type == "cuda" and ops.can_capture
        return CudaGraphs(model, cache, ops, compiled=compiled) if is_possible else None

    def fit(self, n_tokens: int, start: int) -> bool:
        """Whether a graph can compute n_tokens from `start` on; more than one use the space of MAX_DECODE_ROWS."""
        return n_tokens == 1 or (n_tokens <= MAX_DECODE_ROWS and start + MAX_DECODE_ROWS <= self.cache.max_seq_len)

    def are_ready(self, n_tokens: int) -> bool:
        """Whether the graph for n_tokens is already captured."""
        return _width(n_tokens) in self._replays

    @torch.no_grad()
    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        """tokens [T] on the device -> logits [T, vocab], which the next call overwrites."""
        self._tokens[: len(tokens)] = tokens
        self._start.fill_(start)
        width = _width(len(tokens))
        if width not in self._replays:
            with torch.cuda.device_of(tokens):
                self._replays[width] = self._captured(width)
        return self._replays[width]()[: len(tokens)]

    def _captured(self, width: int) -> Callable[[], Tensor]:
        """Return the pass over `width` tokens as a graph, or without one, with a line on stderr, if capture fails."""
        # compiling takes long, and pays off only over many passes, so only the pass over one token is compiled
        run = (width == 1 and self._compiled and self._compiled_pass()) or self._pass(forward, width, self._ops)
        try:
            return self._capture(run)
        except RuntimeError as error:  # of CUDA
            self._report(f"no graph is captured ({in_short(error)})")
            return run

    def _pass(self, function: Callable[..., Tensor], width: int, ops: Ops) -> Callable[[], Tensor]:
        weights, params = self._model[:2]
        tokens = self._tokens[:width]
        return lambda: function(weights, params, tokens, cache=self.cache, start=self._start, ops=ops)

    def _compiled_pass(self) -> Callable[[], Tensor] | None:
        """Return the compiled pass over one token, or None, with a line on stderr, if the compiler fails."""
        fusible = self._ops._replace(rms_norm=None, rope=None)  # into their neighbours, unlike kernels of our own
        run = self._pass(compiled_forward(), 1, fusible)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # hints on performance
                run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise every kind of exception
            self._report(f"torch.compile fails ({in_short(error)})")
            return None
        return run

    def _report(self, failure: str) -> None:
        self.failures.append(failure)
        print(f"llama3_raw: {failure}; continuing without", file=sys.stderr)


def _width(n_tokens: int) -> int:
    """Return the width of the graph for n_tokens: few take as long as MAX_DECODE_ROWS, and each graph needs memory."""
    return 1 if n_tokens == 1 else MAX_DECODE_ROWS


def copy_to_host_async(values: Tensor) -> Callable[[], list[list[int]]]:
    """Start to copy a small tensor of two dimensions to the CPU. Return a function that waits for it.

    It does not wait for work that the GPU was given after the copy.
    """
    if values.device.type != "cuda":
        return values.tolist
    with torch.cuda.device_of(values):
        copied, on_host = torch.cuda.Event(), torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        copied.record()

    def wait() -> list[list[int]]:
        copied.synchronize()
        return on_host.tolist()

    return wait
