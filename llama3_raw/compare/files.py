"""Tensors of another run from a file: safetensors, NumPy's .npz or PyTorch's .pt."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..system.files import read_beginning
from ..tracing.record import load_trace

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")


def load_tensors(file: Path) -> Mapping[str, Any]:
    """Return the tensors of a file by their names in it; those in dicts and lists by "outer.inner".

    A saved trace is returned as a `Trace`. A file of PyTorch is read without running code from it. Raises UserError if
    the file is missing or of another format.
    """
    if file.suffix == ".npz":
        read_beginning(file)
        try:
            with open(file, "rb") as opened, numpy.load(opened, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError) as error:
            raise UserError(
                f"{file}: cannot be read as arrays ({in_short(error)}); write it with numpy.savez"
            ) from error
    if file.suffix in (".pt", ".pth", ".bin"):
        read_beginning(file)
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise UserError(
                f"{file}: has more than tensors in dicts and lists, or is damaged; write it with "
                "torch.save({name: tensor, …}, file)"
            ) from error
        tensors = dict(_named(loaded, ""))
        if not tensors or "" in tensors:
            raise UserError(f"{file}: has no tensors with names; write it with torch.save({{name: tensor, …}}, file)")
        return tensors
    return load_trace(file)


def _named(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in dicts and lists, by their keys and numbers joined with dots."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(inner, f"{name}.{key}" if name else str(key))


def as_tensor(name: str, given: Any) -> Tensor:
    """Return a tensor or array of floats as a tensor. Raises UserError for anything else.

    NumPy has no bfloat16: an array of JAX's is one of ml_dtypes, or in a file of 2 bytes without a type.
    """
    try:
        if not isinstance(given, Tensor):
            array = numpy.asarray(given)
            is_bfloat16 = array.dtype.name == "bfloat16" or array.dtype == numpy.dtype("V2")
            given = torch.tensor(array.view(numpy.int16)).view(torch.bfloat16) if is_bfloat16 else torch.tensor(array)
        tensor: Tensor = given.detach()
        if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return tensor
    except (TypeError, ValueError):
        pass
    kind = getattr(given, "dtype", type(given).__name__)
    raise UserError(f"the tensor {name} to compare with is {kind}; it should be of floats in 16 or 32 bits")
