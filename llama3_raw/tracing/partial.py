"""A part of a forward pass: from a layer on, and up to the last tensor that a tap wants."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from torch import Tensor

from ..errors import UserError
from ..ops import UNFUSED, Ops, Tap, wants
from ..params import Params
from ..weights import Model, dtype_name
from .names import FIRST, LAST, named_tensors, within_layer
from .taps import check_patterns


class _Enough(Exception):
    """The last wanted tensor was seen."""


def names_of_pass(params: Params, ops: Ops, first: int | None = None) -> list[str]:
    """Return the names that a tap sees, in order; of a pass that begins with layer `first`, those from it on."""
    names = [name for name in named_tensors(params) if ops.has_scores or within_layer(name) not in UNFUSED]
    return names if first is None else names[names.index(f"layers.{first}.attention_norm") :]


def needed_names(names: list[str], tap: Tap) -> list[str]:
    """Return the names of a pass up to the last one that the tap wants. Raises UserError as `check_patterns` does."""
    check_patterns(tap, names)
    wanted = [place for place, name in enumerate(names) if wants(tap, name)]
    return names[: wanted[-1] + 1]


@contextlib.contextmanager
def ending_after(last: str) -> Iterator[Tap]:
    """Yield the tap that ends the pass in the block after the tensor of this name: the block ends there, too."""

    def end(name: str, tensor: Tensor) -> Tensor:
        if name == last != LAST:
            raise _Enough
        return tensor

    with contextlib.suppress(_Enough):
        yield end


def from_layer(first: int, residual: Tensor, tap: Tap) -> Tap:
    """Return the tap for a pass of the layers from `first` on: the pass begins with the residual, and names fit."""

    def renaming(name: str, tensor: Tensor) -> Tensor:
        if name == FIRST:
            return residual
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            name = f"layers.{int(layer) + first}.{rest}"
        return tap(name, tensor)

    return renaming


def check_start(start_at: str | None, residual: Tensor | None, model: Model, shape: tuple[int, ...]) -> int | None:
    """Return the layer of `start_at`, or None without one.

    shape: of the tokens. Raises UserError if there is no such layer, or the residual is not what it gets.
    """
    if start_at is None:
        if residual is not None:
            raise UserError("belongs to start_at; give start_at='layers.N' with it", argument="residual")
        return None
    n_layers, norm = model.params.n_layers, model.weights.norm
    matched = re.fullmatch(r"layers\.(\d+)", str(start_at))
    if matched is None or int(matched[1]) >= n_layers:
        raise UserError(f"should be 'layers.N', N from 0 to {n_layers - 1}, is {start_at!r}", argument="start_at")
    expected = f"{[*shape, model.params.dim]} in {dtype_name(norm.dtype)} on {norm.device}"
    got = "None"
    if residual is not None:
        got = f"{list(residual.shape)} in {dtype_name(residual.dtype)} on {residual.device}"
    if got != expected:
        raise UserError(f"should be the input of {start_at}, {expected}, is {got}", argument="residual")
    return int(matched[1])
