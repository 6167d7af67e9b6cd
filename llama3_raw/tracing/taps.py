"""Taps, which see the tensors of a forward pass by name and may replace them.

`Patterns` matches names, `patch` replaces tensors, `chain` combines taps.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..ops import UNFUSED, Rows, Tap, announce, checked_result, no_tap, wants
from ..params import Params
from ..weights import dtype_name
from .names import LAST, named_tensors
from .positions import ThisPass, checked_positions, rows_at, spread, with_rows


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

    def match(self, name: str) -> bool:
        """Whether a pattern matches the name."""
        return any(regex.fullmatch(name) for regex in self._regexes.values())

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError if a pattern matches none of the names of a pass; it lists the nearest ones."""
        for pattern, regex in self._regexes.items():
            if not any(map(regex.fullmatch, names)):
                raise UserError(_no_match(pattern, names))

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
                f"{pattern!r}: the fast operations compute no attention scores; leave ops out, or give "
                "ops=llama3_raw.REFERENCE"
            )
    if "[" in pattern and "]" not in pattern.rpartition("[")[2]:
        return f"{pattern!r}: the [ has no ] after it; [0-9] matches a digit"
    every_layer = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    near = difflib.get_close_matches(pattern, every_layer if "*" in pattern else names, n=3, cutoff=0)
    where = f"a pass of layers {layers[0]} to {layers[-1]}"
    return f"no tensor is named {pattern!r} in {where}; the nearest are {', '.join(near)}"


class PatternTap:
    """A tap for the tensors whose names match its patterns: what `Trace`, `patch` and `break_at` have in common."""

    def __init__(self, patterns: Sequence[str]):
        self._patterns = Patterns(patterns)

    def wants(self, name: str) -> bool:
        """Whether the tap looks at the tensor of this name."""
        return self._patterns.match(name)

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError if a pattern matches none of the names of a pass."""
        self._patterns.check(names)


def check_patterns(tap: Tap, names: Sequence[str]) -> None:
    """Raise UserError if a pattern of the tap, if it has any, matches none of the names of a pass."""
    if isinstance(tap, (PatternTap, Chain)):
        tap.check(names)


class Chain:
    """Several taps as one: what `chain` returns."""

    def __init__(self, taps: Sequence[Tap]):
        self._taps = [tap for tap in taps if tap is not no_tap]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        for tap in self._taps:
            tensor = checked_result(tap, name, tap(name, tensor))
        return tensor

    def begin(self, rows: Rows | None) -> None:
        """Tell the taps which tokens the next pass computes."""
        for tap in self._taps:
            announce(tap, rows)

    def wants(self, name: str) -> bool:
        """Whether one of the taps looks at the tensor of this name."""
        return any(wants(tap, name) for tap in self._taps)

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError if a pattern of one of the taps matches none of the names of a pass."""
        for tap in self._taps:
            check_patterns(tap, names)


def chain(*taps: Tap) -> Chain:
    """Return one tap that calls several in order.

    Args:
        taps: each gets the tensor that the one before it returned.

    Raises:
        UserError: by the tap, if one of them does not return a tensor.
    """
    return Chain(taps)


_WithName = Callable[[Tensor, str], Tensor]
Replacement = Tensor | Callable[[Tensor], Tensor] | _WithName
"""What takes the place of a tensor: another one, or a function of the tensor, or of it and its name."""


class Patch(PatternTap):
    """The tap that `patch` returns."""

    def __init__(self, replacements: Mapping[str, Replacement], positions: list[int] | None):
        super().__init__(list(replacements))
        self._replacements = {pattern: _with_name(pattern, given) for pattern, given in replacements.items()}
        self._positions = positions

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        for pattern in self._patterns.matching(name):
            given = self._replacements[pattern]
            if self._positions is None:
                # a copy, as a function that changes it in place may come next
                tensor = _checked(name, tensor, given.clone() if isinstance(given, Tensor) else given(tensor, name))
            else:
                tensor = self._at_positions(given, name, tensor, self._positions)
        return tensor

    def _at_positions(self, given: Tensor | _WithName, name: str, tensor: Tensor, wanted: list[int]) -> Tensor:
        this = ThisPass.of_caller(name, tensor)
        if this.is_whole and max(wanted) >= this.length:
            raise UserError(f"{max(wanted)}: the text has only {this.length} tokens", argument="positions")
        positions, dimension = this.positions(name, tensor.device)
        is_wanted = torch.isin(positions, torch.tensor(wanted, device=tensor.device))
        if not is_wanted.any():
            return tensor
        if isinstance(given, Tensor):
            given = with_rows(given, name, tensor, this, wanted)
            result = rows_at(given, name, positions, wanted, dimension)
            with contextlib.suppress(RuntimeError):  # the shape is reported below
                result = result.expand_as(tensor)
        else:
            result = given(tensor.clone(), name)  # which it may change in place, at other positions too
        return torch.where(spread(is_wanted, tensor, dimension), _checked(name, tensor, result), tensor)


def patch(replacements: Mapping[str, Replacement], *, positions: int | Sequence[int] | Tensor | None = None) -> Patch:
    """Return a tap that replaces tensors by name, for activation patching, ablation of a head, or steering.

    Args:
        replacements: for each tap name or pattern, a tensor to put in the place of the one of the pass, or a function
            of that tensor, or of that tensor and its name. The pass continues with it. The shapes are those stated in
            model.py. If several patterns match a name, they replace it one after another.
        positions: replace these tokens of the text only, in whichever pass they are computed; the first token has
            position 0. A function gets the whole tensor of a pass that has one of them. A tensor has a row for each of
            the positions, or for each token of a text, or one for all; in scores and probs, rows are queries. One for
            all may lack the dimension T: one of the shape of the pass's tensor without T, with or without the batch,
            is that. None: every token.

    Raises:
        UserError: by the tap, if a result is not a tensor of the same shape, dtype and device, if a text that is
            computed in one pass has no such position, if it is unclear whether a tensor has the dimension T, and at
            the end of a pass in which a pattern matched nothing. By `patch`, if these are no mapping, a
            pattern is not a str, what should replace a tensor is neither a tensor nor a function, or the positions are
            not integers from 0 on.
    """
    if not isinstance(replacements, Mapping):
        kind = type(replacements).__name__
        raise UserError(f"should be a dict of what replaces each tensor by name, is a {kind}", argument="replacements")
    return Patch(replacements, None if positions is None else checked_positions(positions))


def _with_name(pattern: str, given: Replacement) -> Tensor | _WithName:
    """Return a tensor as it is, and a function as one of the tensor and its name.

    It gets the name if it has a second parameter that is called name, or has no default and is not keyword-only.
    """
    if isinstance(given, Tensor):
        return given
    if not callable(given):
        raise UserError(f"the patch of {pattern} should be a tensor or a function, is a {type(given).__name__}")
    function: Callable[..., Tensor] = given
    try:
        second = list(inspect.signature(function).parameters.values())[1:2]
    except (TypeError, ValueError):  # as of torch's own functions
        second = []
    if any(it.kind is it.KEYWORD_ONLY and it.name == "name" for it in second):
        return lambda tensor, name: function(tensor, name=name)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_name = any(it.kind in by_position and (it.name == "name" or it.default is it.empty) for it in second)
    return function if takes_name else lambda tensor, name: function(tensor)


def _checked(name: str, tensor: Tensor, result: Tensor) -> Tensor:
    if isinstance(result, Tensor) and _kind(result) == _kind(tensor):
        return result
    got = _kind(result) if isinstance(result, Tensor) else type(result).__name__
    raise UserError(f"the patch of {name} should return a tensor {_kind(tensor)}, returns {got}")


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {dtype_name(tensor.dtype)} on {tensor.device}"


def check_names(params: Params, *patterns: str) -> None:
    """Raise UserError if a pattern matches nothing in a pass of such a model with exact attention."""
    Patterns(patterns).check(list(named_tensors(params)))


def dry_run(params: Params, dtype: torch.dtype, shape: Sequence[int], names: Sequence[str], tap: Tap) -> None:
    """Call the tap as a pass over tokens of this shape would: at these names, on meta tensors of the right shape.

    The model does not run: a breakpoint that is meant for the real pass would stop in it.
    """
    *batch, length = shape
    sizes = {"T": length, "n_heads": params.n_heads, "n_kv_heads": params.n_kv_heads, "head_dim": params.head_dim}
    sizes |= {"dim": params.dim, "hidden_dim": params.hidden_dim, "vocab_size": params.vocab_size}
    tensors = named_tensors(params)
    for name in names:
        dimensions = [*batch, *(sizes[size] for size in tensors[name].shape.split())]
        tap(name, torch.empty(dimensions, dtype=torch.float32 if name == LAST else dtype, device="meta"))
