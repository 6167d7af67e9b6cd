"""Taps: what sees the tensors of a forward pass by name, and may put others in their place.

`Patterns` are names as a user gives them; `patch` replaces tensors, `chain` makes one tap of several.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..model import REFERENCE
from ..ops import Ops, Tap
from ..params import Params
from ..weights import in_words
from .names import LAST, UNFUSED, named_tensors, within_layer


class Patterns:
    """Names as a user gives them, in which `*`, `?` and `[0-9]` stand for text as in a shell.

    A `*` at either end of a pattern, and a `**` anywhere, stands for any text, a `*` in between for text without a
    dot: "layers.0.*" is all of layer 0, "layers.*.residual" the output of each layer, "*.residual" that of its
    attention too.
    """

    def __init__(self, patterns: Sequence[str]):
        """Raises UserError for what is no str."""
        for pattern in patterns:
            if not isinstance(pattern, str):
                kind = type(pattern).__name__
                raise UserError(
                    f"a pattern should be a str such as 'layers.*.residual', is a {kind}; give each by itself"
                )
        self._regexes = {pattern: re.compile(_regex(pattern)) for pattern in patterns}
        self._unmet = dict.fromkeys(patterns)
        self._seen: dict[str, None] = {}

    def matching(self, name: str) -> list[str]:
        """The patterns that mean this name of a pass, in the order in which they were given.

        Raises UserError at the end of a pass in which one of them meant nothing, with the names nearest to it.
        """
        matching = [pattern for pattern, regex in self._regexes.items() if regex.fullmatch(name)]
        for pattern in matching:
            self._unmet.pop(pattern, None)
        self._seen[name] = None
        if name == LAST and self._unmet:
            raise UserError(_unknown(next(iter(self._unmet)), list(self._seen)))
        return matching


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*+|\?|\[!?\]?[^\]]*\])", pattern)
    for i, part in enumerate(parts):
        if part.startswith("*"):
            at_an_end = not any(parts[:i]) or not any(parts[i + 1 :])
            parts[i] = ".*" if at_an_end or len(part) > 1 else r"[^.]*"
        elif part == "?":
            parts[i] = r"[^.]"
        else:  # text, or a choice such as [0-9] and [!0]
            parts[i] = fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
    return "".join(parts)


def _unknown(pattern: str, names: Sequence[str]) -> str:
    """What to say of a pattern that means none of the names that a pass had."""
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    for hidden in (f"layers.{layer}.{name}" for layer in dict.fromkeys(layers) for name in UNFUSED):
        if hidden not in names and re.fullmatch(_regex(pattern), hidden):
            return (
                f"{pattern!r}: the fast operations make no attention scores; the exact ones do (llama3_raw.REFERENCE, "
                "the default)"
            )
    if "[" in pattern and "]" not in pattern.rpartition("[")[2]:
        return f"{pattern!r}: the [ has no ] behind it; [0-9] stands for a digit"
    every_layer = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    near = difflib.get_close_matches(pattern, every_layer if "*" in pattern else names, n=3, cutoff=0)
    return f"no tensor is named {pattern!r} in a pass of layers 0 to {max(layers)}; the nearest are {', '.join(near)}"


def chain(*taps: Tap) -> Tap:
    """One tap out of several: each gets the tensor that the one before it returned."""

    def chained(name: str, tensor: Tensor) -> Tensor:
        for tap in taps:
            tensor = tap(name, tensor)
        return tensor

    return chained


def patch(replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Tap:
    """A tap that puts function(tensor) in the place of each tensor that a name or pattern means.

    The pass goes on with it: for activation patching, ablating a head, steering. The shapes are those that model.py
    states. Where several patterns mean a name, their functions are applied one after the other.

    The tap raises UserError for a result that is no tensor of the same shape, dtype and device, and at the end of the
    pass for a pattern that means nothing.
    """
    patterns = Patterns(list(replacements))

    def patching(name: str, tensor: Tensor) -> Tensor:
        for pattern in patterns.matching(name):
            result = replacements[pattern](tensor)
            if not isinstance(result, Tensor) or _kind(result) != _kind(tensor):
                got = _kind(result) if isinstance(result, Tensor) else type(result).__name__
                raise UserError(f"the patch of {name} should return a tensor {_kind(tensor)}, returns {got}")
            tensor = result
        return tensor

    return patching


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {in_words(tensor.dtype)} on {tensor.device}"


def check_names(params: Params, *patterns: str) -> None:
    """Raises UserError where a pattern means nothing in a pass of such a model by the exact operations."""
    wanted = Patterns(patterns)

    def match(name: str, tensor: Tensor) -> Tensor:
        wanted.matching(name)
        return tensor

    pass_without_content(params, torch.bfloat16, 1, REFERENCE, match)


def pass_without_content(params: Params, dtype: torch.dtype, length: int, ops: Ops, tap: Tap) -> None:
    """Has the tap see what it would see in a pass of `length` tokens: all names, shapes and dtypes, without content.

    Not by running the model, where a breakpoint that is meant for the real pass would be met.
    """
    sizes = {"T": length, "n_heads": params.n_heads, "n_kv_heads": params.n_kv_heads, "head_dim": params.head_dim}
    sizes |= {"dim": params.dim, "hidden_dim": params.hidden_dim, "vocab_size": params.vocab_size}
    for name, tensor in named_tensors(params).items():
        if ops.has_scores or within_layer(name) not in UNFUSED:
            shape = [sizes[size] for size in tensor.shape.split()]
            tap(name, torch.empty(shape, dtype=torch.float32 if name == LAST else dtype, device="meta"))
