"""Taps, which see the tensors of a forward pass by name and may replace them.

`Patterns` matches names, `patch` replaces tensors, `chain` combines taps.
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
from ..weights import dtype_name
from .names import LAST, UNFUSED, named_tensors, within_layer


class Patterns:
    """Tap names with wildcards: `*`, `?` and `[0-9]` match text as in a shell.

    A `*` at either end of a pattern, or `**` anywhere, matches any text; a `*` in between matches text without a dot.
    "layers.0.*" is all of layer 0, "layers.*.residual" the output of each layer, and "*.residual" also matches each
    attention.residual.
    """

    def __init__(self, patterns: Sequence[str]):
        """Raise UserError for a pattern that is not a str."""
        for pattern in patterns:
            if not isinstance(pattern, str):
                kind = type(pattern).__name__
                raise UserError(
                    f"a pattern should be a str such as 'layers.*.residual', is a {kind}; give several one by one"
                )
        self._regexes = {pattern: re.compile(_regex(pattern)) for pattern in patterns}
        self._unmatched = dict.fromkeys(patterns)
        self._seen: dict[str, None] = {}

    def matching(self, name: str) -> list[str]:
        """Return the patterns that match this name of a pass, in the order in which they were given.

        Raises UserError at the end of a pass in which one of them matched nothing; it lists the nearest names.
        """
        matching = [pattern for pattern, regex in self._regexes.items() if regex.fullmatch(name)]
        for pattern in matching:
            self._unmatched.pop(pattern, None)
        self._seen[name] = None
        if name == LAST and self._unmatched:
            raise UserError(_no_match(next(iter(self._unmatched)), list(self._seen)))
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


def _no_match(pattern: str, names: Sequence[str]) -> str:
    """Return the message for a pattern that matches none of the names of a pass."""
    layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    for hidden in (f"layers.{layer}.{name}" for layer in dict.fromkeys(layers) for name in UNFUSED):
        if hidden not in names and re.fullmatch(_regex(pattern), hidden):
            return (
                f"{pattern!r}: the fast operations compute no attention scores; the exact ones do (the default of "
                "trace; elsewhere, ops=llama3_raw.REFERENCE)"
            )
    if "[" in pattern and "]" not in pattern.rpartition("[")[2]:
        return f"{pattern!r}: the [ has no ] after it; [0-9] matches a digit"
    every_layer = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    near = difflib.get_close_matches(pattern, every_layer if "*" in pattern else names, n=3, cutoff=0)
    return f"no tensor is named {pattern!r} in a pass of layers 0 to {max(layers)}; the nearest are {', '.join(near)}"


def chain(*taps: Tap) -> Tap:
    """Return one tap that calls several in order.

    Args:
        taps: each gets the tensor that the one before it returned.
    """

    def chained(name: str, tensor: Tensor) -> Tensor:
        for tap in taps:
            tensor = tap(name, tensor)
        return tensor

    return chained


def patch(replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Tap:
    """Return a tap that replaces tensors by name, for activation patching, ablation of a head, or steering.

    Args:
        replacements: for each tap name or pattern, a function of the tensor. The pass continues with its result. The
            shapes are those stated in model.py. If several patterns match a name, their functions run one after
            another.

    Raises:
        UserError: by the tap, if a result is not a tensor of the same shape, dtype and device, and at the end of a
            pass in which a pattern matched nothing. By `patch`, if a pattern is not a str.
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
    return f"{list(tensor.shape)} in {dtype_name(tensor.dtype)} on {tensor.device}"


def check_names(params: Params, *patterns: str) -> None:
    """Raise UserError if a pattern matches nothing in a pass of such a model with the exact operations."""
    wanted = Patterns(patterns)

    def match(name: str, tensor: Tensor) -> Tensor:
        wanted.matching(name)
        return tensor

    dry_run(params, torch.bfloat16, 1, REFERENCE, match)


def dry_run(params: Params, dtype: torch.dtype, length: int, ops: Ops, tap: Tap) -> None:
    """Call the tap as a pass over `length` tokens would: with all names, on meta tensors of the right shape and dtype.

    The model does not run: a breakpoint that is meant for the real pass would stop in it.
    """
    sizes = {"T": length, "n_heads": params.n_heads, "n_kv_heads": params.n_kv_heads, "head_dim": params.head_dim}
    sizes |= {"dim": params.dim, "hidden_dim": params.hidden_dim, "vocab_size": params.vocab_size}
    for name, tensor in named_tensors(params).items():
        if ops.has_scores or within_layer(name) not in UNFUSED:
            shape = [sizes[size] for size in tensor.shape.split()]
            tap(name, torch.empty(shape, dtype=torch.float32 if name == LAST else dtype, device="meta"))
