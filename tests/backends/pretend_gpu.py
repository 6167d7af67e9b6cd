"""A fake GPU: tensors that report its device, are computed in RAM, and cannot be mixed with those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, APPLE_GPU, CPU = torch.device("cuda", 0), torch.device("mps", 0), torch.device("cpu")
_CROSSING = (Tensor.to, Tensor.cpu, Tensor.copy_, Tensor.__setitem__)  # these move tensors between devices


class OnGpu(Tensor):
    """A tensor on the fake GPU."""


class PretendGpu(TorchFunctionMode):
    """Within it, device="cuda" creates such tensors, .to moves them, and their results are on the GPU too.

    gpu: the device that they report, which may also be an Apple GPU.
    """

    def __init__(self, gpu: torch.device = GPU):
        super().__init__()
        self._gpu = gpu
        self.computes = False  # whether the operation that torch computes now is on the GPU

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = CPU if func is Tensor.cpu else kwargs.get("device")
        if func is Tensor.to:
            device = next((leaf for leaf in args if isinstance(leaf, str | torch.device)), device)
        if device is not None:
            on_gpu = torch.device(device).type == self._gpu.type
        elif func in _CROSSING:  # x.to(like), to.copy_(x)
            on_gpu = isinstance(tensors[-1 if func is Tensor.to else 0], OnGpu)
        else:
            on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
        if not on_gpu and not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is Tensor.device:
            return self._gpu
        devices = {isinstance(tensor, OnGpu) for tensor in tensors if tensor.dim()}  # scalars may be mixed with both
        if func not in _CROSSING and len(devices) == 2:
            raise RuntimeError(f"{func.__name__}: tensors on two devices")
        if "device" in kwargs:
            kwargs["device"] = CPU
        args = tuple(CPU if device is not None and leaf is device else leaf for leaf in args)
        args, kwargs = tree_map(lambda leaf: _as(Tensor, leaf), (args, kwargs))
        self.computes = on_gpu
        try:
            return tree_map(lambda leaf: _as(OnGpu if on_gpu else Tensor, leaf), func(*args, **kwargs))
        finally:
            self.computes = False


def _as(kind: type[Tensor], leaf: Any) -> Any:
    return leaf.as_subclass(kind) if isinstance(leaf, Tensor) and type(leaf) is not kind else leaf


def generators_on(gpu: torch.device) -> type[torch.Generator]:
    """Return a class in place of torch.Generator, whose generators say that they are on the fake GPU."""

    class Generator(torch.Generator):
        device = gpu

        def __new__(cls, device: torch.device | None = None) -> Generator:
            return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    return Generator


@contextmanager
def plain_staging(device: torch.device, largest: int) -> Iterator[Callable[[Tensor, torch.dtype | None], Tensor]]:
    """Like `staging.staging`, without the pinned memory that only a real GPU has."""
    yield lambda tensor, dtype: tensor.to(device, dtype=dtype)
