"""Activation patching in batches: `sweep`, `path_patch`, and `ablation`, which makes the values to patch in.

Each row of a batch is the same prompt with another change. A pass begins at the first layer that any of its rows
changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from ..backends.choose import ops_for
from ..errors import UserError, in_short
from ..model import REFERENCE, forward
from ..ops import UNFUSED, Ops, Tap, accumulate_dtype, score_bytes
from ..params import Params
from ..system.machine import free_memory
from ..weights import Model, Weights
from .names import FIRST, named_tensors, token_dimension, within_layer
from .padding import integers, tokens_of_one_prompt
from .record import Trace, trace
from .taps import Patterns, chain

Axis = Literal["position", "head", "key"]
By = Axis | Literal["layer"] | tuple[Axis, ...] | list[Axis]
Metric = Callable[[Tensor], Tensor]  # logits [rows, T, vocab_size] -> one value a row, [rows]
End = str | tuple[str, int]  # of a path: a tap name, or a tap name and one of its heads
_SENDERS = ("tok_embeddings", "attention.heads", "attention.out", "feed_forward.out")  # are added to the stream
_RECEIVERS = ("attention_norm", "attention.q", "attention.k", "attention.v", "ffn_norm", "norm")  # are read from it
STREAM = (FIRST, "layers.*.residual")

Item = TypeVar("Item")


class Change(NamedTuple):
    """What a row of a batch gets instead of its own: a slice of the tensor `name` of one prompt."""

    name: str
    where: tuple[int | slice, ...]  # the index of the slice in a tensor of one prompt; (): all of it
    value: Tensor  # the slice, on any device, in any floating-point dtype


def tap_names(params: Params, *patterns: str) -> list[str]:
    """Return the tap names that match the patterns, in the order of the pass; without patterns, all of them.

    Raises UserError for a pattern that matches nothing.
    """
    wanted = Patterns(patterns or ("*",))
    return [name for name in named_tensors(params) if wanted.matching(name)]


def sweep(  # noqa: PLR0913  # what a caller may set
    model: Model,
    ids: Sequence[int] | Tensor,
    source: Mapping[str, Tensor],
    names: str | Sequence[str],
    metric: Metric,
    *,
    by: By = "position",
    rows: int = 32,
    ops: Ops | None = None,
    progress: bool = False,
) -> Tensor:
    """Patch one slice after the other from `source` into a pass over `ids`; return the metric of each pass.

    Activation patching (Vig et al. 2020; Meng et al. 2022), with `rows` passes in one batch.

    Args:
        model: the model to run.
        ids: the prompt that is changed, [T].
        source: the values to patch in, by tap name: a trace of another prompt of T tokens, or an `ablation`.
        names: tap names or patterns, in the order of the result's rows.
        metric: a function of the logits [rows, T, vocab_size] that returns one value a row, such as
            `lambda logits: logits[:, -1, answer] - logits[:, -1, other]`.
        by: what a slice is, and so what the columns are. "position": one position of one tensor (of scores and probs,
            that of the query); [names, T]. "head": one head of one tensor, at all positions; [names, heads], where k,
            k_rope and v have n_kv_heads, and the others with heads n_heads. "key": one key of scores or probs;
            [names, T]. Several of these as a tuple: ("position", "head") is one head at one position,
            [names, T, heads]. "layer": the whole tensor of one layer; the result has a row for each tensor within a
            layer, such as attention.out, and a column for each layer in `names`: [1, n_layers] for
            "layers.*.residual".
        rows: how many slices share a pass; fewer need less memory.
        ops: the operations. None: the fast ones of the device, with exact attention if scores or probs are patched.
        progress: show a bar on stderr, if it takes longer than a second.

    Returns:
        The metric of each pass, [names, n], or [names, *sizes] for several axes. Subtract that of an unchanged pass
        for the effects.

    Raises:
        UserError: before anything is computed, if a name matches nothing or has no such slices, `source` lacks a
            tensor or has one of another shape, or `rows` do not fit into memory; and if the metric does not return
            one value a row.
    """
    ids = tokens_of_one_prompt(ids, model.params)
    cells, sizes = cells_of(model.params, len(ids), source, names, by)
    ops = ops or ops_showing(model.weights, {change.name for row in cells for cell in row for change in cell})
    _check_memory(model, len(ids), min(rows, sum(map(len, cells))), ops)
    base = Base(model, ids, trace(model, ids, *STREAM, ops=ops), ops)
    values = _measure(base, cells, metric, rows, progress)
    return values.view(len(values), *sizes)


def path_patch(  # noqa: PLR0913  # what a caller may set
    model: Model,
    ids: Sequence[int] | Tensor,
    source: Mapping[str, Tensor],
    senders: Sequence[End],
    receivers: Sequence[End | list[End]],
    metric: Metric,
    *,
    direct: bool = False,
    rows: int = 32,
    ops: Ops | None = None,
    progress: bool = False,
) -> Tensor:
    """Change what a receiver reads of a sender in the residual stream; return the metric of each such pair.

    Path patching (Wang et al. 2022, appendix B). A first pass over `ids` has the sender's value from `source`, and all
    other heads keep the values of an unchanged pass: the change reaches later layers through the stream and the
    feed-forward layers only. It shows what the receiver would be. A second pass has only the receiver changed to that,
    and computes everything after it as usual.

    Args:
        model: the model to run.
        ids: the prompt that is changed, [T].
        source: the senders' values by tap name, such as a trace of another prompt of T tokens.
        senders: tap names of what is added to the stream (layers.N.attention.heads, layers.N.attention.out,
            layers.N.feed_forward.out, tok_embeddings), or (name, head) for one head of attention.heads.
        receivers: tap names of what is computed from the stream (layers.N.attention.q, k or v, before the rotation;
            layers.N.attention_norm, layers.N.ffn_norm; norm for the logits), or (name, head) for one head of q, k or
            v; k and v have n_kv_heads. A list of these is one receiver: they change together.
        metric: as in `sweep`.
        direct: keep the values of the feed-forward layers too, so that the stream alone carries the change.
        rows: as in `sweep`.
        ops: as in `sweep`.
        progress: as in `sweep`.

    Returns:
        The metric of each pair, [senders, receivers]. Where the receiver comes before the sender, it is that of an
        unchanged pass.

    Raises:
        UserError: as `sweep` does, and if a sender or receiver is none of these, or there are none.
    """
    ids, params = tokens_of_one_prompt(ids, model.params), model.params
    if not len(senders):
        raise UserError("is empty", argument="senders")
    sent = [_slice_of(end, params, "sender", _SENDERS) for end in senders]
    groups = [receiver if isinstance(receiver, list) else [receiver] for receiver in receivers]
    if not groups or not all(groups):
        raise UserError("is empty, or a list in it", argument="receivers")
    read = [[_slice_of(end, params, "receiver", _RECEIVERS) for end in group] for group in groups]
    _check_source(params, len(ids), source, [name for name, _ in sent])
    ops = ops or ops_showing(model.weights, ())
    _check_memory(model, len(ids), min(rows, len(sent) * len(read)), ops)
    frozen = tap_names(params, "layers.*.attention.heads", *(["layers.*.feed_forward.out"] if direct else []))
    base = Base(model, ids, trace(model, ids, *STREAM, *frozen, ops=ops), ops)

    def freeze(name: str, tensor: Tensor) -> Tensor:
        return base.kept[name].expand_as(tensor) if name in frozen else tensor

    results = []
    for chunk in _chunks(sent, rows, "path patching", progress):
        seen = Trace(*{name for group in read for name, _ in group})
        changes = [[Change(name, where, source[name][where])] for name, where in chunk]
        with torch.no_grad():
            base.run(0, len(chunk), chain(freeze, _replacing(changes), seen))
        cells = [
            [[Change(name, where, seen[name][row][where]) for name, where in group] for group in read]
            for row in range(len(chunk))
        ]
        results.append(_measure(base, cells, metric, rows, False))
    return torch.cat(results)


def ablation(
    kept: Mapping[str, Tensor],
    how: Literal["zero", "mean", "resample"],
    *,
    length: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return what replaces each tensor of a trace when it is ablated: a `source` for `sweep`, and what `patch` takes.

    Args:
        kept: the tensors by tap name, such as a trace: of one prompt [T, …], or of a batch of prompts [B, T, …].
        how: "zero", with scores still masked; "mean", over all prompts and positions without padding; or "resample",
            all tensors of one prompt of the batch, chosen at random. (The trace of one other prompt is a source as it
            is.)
        length: the number of positions of the zeros or means, and of the keys of zero scores and probs. None: T.
        generator: chooses the prompt. None: torch's own.

    Raises:
        UserError: another `how`, a length below 1, a trace of one position, the mean of scores or probs (whose keys are
            others at each position), or resampling of the trace of one prompt, or of prompts of unequal length.
    """
    if how not in ("zero", "mean", "resample"):
        raise UserError(f"should be 'zero', 'mean' or 'resample', is {how!r}", argument="how")
    if length is not None and length < 1:
        raise UserError(f"{length}: should be 1 or more", argument="length")
    if getattr(kept, "at", None) is not None:
        raise UserError("the trace is of one position; trace all positions")
    lengths = getattr(kept, "lengths", None)  # [B], of a padded batch
    replaced, row = {}, None
    for name, tensor in kept.items():
        square = within_layer(name) in UNFUSED  # [n_heads, T, T]
        prompts = tensor.reshape(-1, *tensor.shape[-3 if square else token_dimension(name) :])  # [B, T, …]
        size = prompts.shape[2 if square else 1] if length is None else length
        shape = (prompts.shape[1], size, size) if square else (size, *prompts.shape[2:])
        if how == "zero":
            replaced[name] = _zeros(name, prompts, shape)
        elif how == "mean":
            if square:
                raise UserError(f"{name} has no mean over positions, whose keys differ; ablate attention.heads or v")
            texts = prompts.unbind() if lengths is None else map(_beginning, prompts, lengths.tolist())
            mean = torch.cat(list(texts)).to(accumulate_dtype(tensor.dtype)).mean(0)
            replaced[name] = mean.to(tensor.dtype).expand(shape)
        elif len(prompts) == 1:
            raise UserError("the trace is of one prompt; give one of a batch, or use it as the source as it is")
        elif lengths is not None and len(lengths.unique()) > 1:
            raise UserError("the prompts of the trace have unequal lengths; trace prompts of as many tokens as ids")
        else:
            row = int(torch.randint(len(prompts), (), generator=generator)) if row is None else row
            replaced[name] = prompts[row]
    return replaced


def _zeros(name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of this shape; scores stay masked."""
    zeros = like.new_zeros(()).expand(shape)
    if name.endswith(".scores"):
        return zeros.masked_fill(zeros.new_ones(shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return zeros


def _beginning(tensor: Tensor, length: int) -> Tensor:
    return tensor[:length]


class Base(NamedTuple):
    """The unchanged pass that the passes of a sweep begin from."""

    model: Model
    ids: list[int]
    kept: Trace  # with the residual stream after the embedding and each layer
    ops: Ops

    def run(self, first: int, rows: int, tap: Tap) -> Tensor:
        """Return the logits [rows, T, vocab_size] of `rows` equal prompts, computed from layer `first` on."""
        model, kept = self.model, self.kept
        stream = kept[FIRST if first == 0 else f"layers.{first - 1}.residual"]  # [T, dim]
        x = stream.expand(rows, *stream.shape).contiguous()
        weights = model.weights._replace(layers=model.weights.layers[first:])

        def renamed(name: str, tensor: Tensor) -> Tensor:
            if name.startswith("layers."):
                _, layer, rest = name.split(".", 2)
                name = f"layers.{int(layer) + first}.{rest}"
            return tap(name, tensor)

        tokens = torch.tensor(self.ids, device=x.device).expand(rows, -1)
        return forward(weights, model.params, tokens, ops=self.ops._replace(embed=lambda *_: x), tap=renamed)


def ops_showing(weights: Weights, names: Collection[str]) -> Ops:
    """Return the fast operations for the weights, with exact attention if scores or probs are among the names."""
    ops = ops_for(weights)
    if ops.has_scores or not any(within_layer(name) in UNFUSED for name in names):
        return ops
    return ops._replace(attend=REFERENCE.attend, has_scores=True)


def cells_of(
    params: Params, length: int, source: Mapping[str, Tensor], names: str | Sequence[str], by: By
) -> tuple[list[list[list[Change]]], list[int]]:
    """Return the changes of each pass of a sweep, [names, n], and the sizes of the axes that n covers.

    Raises UserError as `sweep` does.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    expanded = list(dict.fromkeys(name for pattern in patterns for name in tap_names(params, pattern)))
    axes = tuple(by) if isinstance(by, (tuple, list)) else (by,)
    known = get_args(Axis)
    if axes != ("layer",) and (not axes or any(axis not in known or axes.count(axis) > 1 for axis in axes)):
        raise UserError(
            f"should be 'layer', or 'position', 'head', 'key' or a tuple of these, is {by!r}", argument="by"
        )
    if not expanded:
        raise UserError("is empty", argument="names")
    _check_source(params, length, source, expanded)
    table: dict[str, dict[int, list[Change]]] = {}  # row -> column -> changes
    sizes = []
    for name in expanded:
        shape = named_tensors(params)[name].shape.split()
        if axes == ("layer",):
            if not name.startswith("layers."):
                raise UserError(f"{name} is in no layer; leave it out, or use by='position'")
            table.setdefault(within_layer(name), {})[int(name.split(".")[1])] = [Change(name, (), source[name])]
        else:
            dims = [_dimension_of(axis, shape, name) for axis in axes]
            sizes = [source[name].shape[dim] for dim in dims]
            wheres = [_where(dict(zip(dims, index, strict=True))) for index in itertools.product(*map(range, sizes))]
            table[name] = {i: [Change(name, where, source[name][where])] for i, where in enumerate(wheres)}
    if len({tuple(row) for row in table.values()}) > 1:
        counts = ", ".join(f"{name} {len(row)}" for name, row in table.items())
        raise UserError(
            f"the names do not have the same {' and '.join(axes)}s ({in_short(counts)}); sweep them one by one"
        )
    cells = [list(row.values()) for row in table.values()]
    return cells, sizes or [len(cells[0])]


def _dimension_of(axis: str, shape: Sequence[str], name: str) -> int:
    """Return which dimension of a tensor of this shape an axis of a sweep is."""
    if axis == "key" and shape.count("T") < 2:
        raise UserError(f"{name} has no keys; attention.scores and probs have", argument="by")
    if axis == "head":
        return _head_axis(shape, name)
    return shape.index("T") if axis == "position" else len(shape) - 1


def _where(index_of: Mapping[int, int]) -> tuple[int | slice, ...]:
    """Return the index that has these numbers in these dimensions, and all of the others."""
    return tuple(index_of.get(dim, slice(None)) for dim in range(max(index_of) + 1))


def _head_axis(shape: Sequence[str], name: str) -> int:
    axis = next((i for i, size in enumerate(shape) if size in ("n_heads", "n_kv_heads")), None)
    if axis is None:
        raise UserError(f"{name} has no heads; attention.q, k, v, heads, scores and probs have")
    return axis


def _slice_of(end: End, params: Params, role: str, allowed: Sequence[str]) -> tuple[str, tuple[int | slice, ...]]:
    """Return the tap name and the index of the end of a path. Raises UserError if it can't be that end."""
    parts = [*end] if isinstance(end, (tuple, list)) else [end]
    name, heads = parts[0] if parts else None, integers(parts[1:])  # [0] or [1]
    if not isinstance(name, str) or heads is None or heads.dim() != 1 or len(heads) > 1:
        raise UserError(f"a {role} should be a tap name, or (name, head), is {end!r}")
    tensor = named_tensors(params).get(name)
    if tensor is None or within_layer(name) not in allowed:
        raise UserError(f"{name!r} cannot be a {role}; use {', '.join(allowed)}, in a layer as layers.N.NAME")
    if not len(heads):
        return name, ()
    head = int(heads)
    shape = tensor.shape.split()
    axis = _head_axis(shape, name)
    if not 0 <= head < getattr(params, shape[axis]):
        raise UserError(f"{name} has heads 0 to {getattr(params, shape[axis]) - 1}, not {head}")
    return name, (slice(None),) * axis + (head,)


def _check_source(params: Params, length: int, source: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise UserError unless the source has these tensors, in the shapes of a prompt of this length."""
    if getattr(source, "at", None) is not None:
        raise UserError("the source is of one position; trace all positions")
    for name in names:
        if name not in source:
            raise UserError(f"the source lacks {name!r}; trace that name too, or trace without patterns")
        sizes = named_tensors(params)[name].shape.split()
        expected = [length if size == "T" else getattr(params, size) for size in sizes]
        if list(source[name].shape) != expected:
            got = list(source[name].shape)
            raise UserError(f"the source's {name} is {got}, not {expected}; trace one prompt of as many tokens as ids")


def _check_memory(model: Model, length: int, rows: int, ops: Ops) -> None:
    """Raise UserError if a pass of `rows` prompts does not fit into memory."""
    if rows < 1:
        raise UserError("should be at least 1", argument="rows")
    params, norm = model.params, model.weights.norm
    scores = params.n_heads * length * score_bytes(norm.itemsize) if ops.has_scores else 0
    needed = rows * length * max(scores, 4 * params.vocab_size, 4 * params.hidden_dim * norm.itemsize)
    free = free_memory(norm.device)
    if needed > free:
        raise UserError(
            f"{{argument}}: a pass of {rows} prompts needs {needed / 1e9:.2f} GB, not {free / 1e9:.2f} GB; lower it",
            argument="rows",
        )


def _measure(base: Base, cells: list[list[list[Change]]], metric: Metric, rows: int, progress: bool) -> Tensor:
    """Return the metric of a pass for each cell, [names, n]; cells that change late layers share passes."""
    flat = [changes for row in cells for changes in row]
    first = [min(layer_of(change.name, base.model.params.n_layers) for change in changes) for changes in flat]
    order = sorted(range(len(flat)), key=first.__getitem__)
    results = []
    with torch.no_grad():
        for chunk in _chunks(order, rows, "patching", progress):
            tap = _replacing([flat[cell] for cell in chunk])
            results.append(checked_values(metric(base.run(first[chunk[0]], len(chunk), tap)), len(chunk)))
    measured = torch.cat(results)
    return (
        torch.empty_like(measured)
        .index_copy_(0, torch.tensor(order, device=measured.device), measured)
        .view(len(cells), -1)
    )


def checked_values(values: Tensor, rows: int) -> Tensor:
    """Return the values of a metric. Raises UserError unless there is one for each row of the logits."""
    if isinstance(values, Tensor) and values.shape == (rows,):
        return values
    got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
    raise UserError(
        f"the metric of logits [{rows}, T, vocab_size] should be one value a row, [{rows}], is {got}; index the logits "
        "as logits[:, -1, token]"
    )


def _chunks(items: Sequence[Item], rows: int, title: str, progress: bool) -> Iterator[Sequence[Item]]:
    """Yield the items, `rows` at a time."""
    for begin in tqdm(range(0, len(items), rows), desc=title, unit="pass", leave=False, delay=1, disable=not progress):
        yield items[begin : begin + rows]


def layer_of(name: str, n_layers: int) -> int:
    """Return the layer from which on a pass has to be computed if the tensor of this name changes."""
    return 0 if name == FIRST else int(name.split(".")[1]) if name.startswith("layers.") else n_layers


def _replacing(changes: Sequence[Sequence[Change]]) -> Tap:
    """Return the tap that makes the changes of each row of a batch."""
    by_name: dict[str, list[tuple[int, Change]]] = {}
    for row, of_row in enumerate(changes):
        for change in of_row:
            by_name.setdefault(change.name, []).append((row, change))

    def replace(name: str, tensor: Tensor) -> Tensor:
        if name in by_name:
            tensor = tensor.clone()
            for row, change in by_name[name]:
                tensor[row][change.where] = change.value.to(tensor)
        return tensor

    return replace
