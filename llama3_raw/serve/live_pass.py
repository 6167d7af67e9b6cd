"""The passes behind the live page: one prompt with changes (heads off, layers scaled, another prompt's residual).

Everything that a pass needs comes in and everything that the page shows goes out, so nothing is kept between two
requests. Passes use the exact operations: the numbers are those of `trace` with ops=REFERENCE.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.choose import ops_for
from ..decoding.sampling import check_sound, is_sound
from ..errors import UserError, in_short
from ..model import rms_norm
from ..ops import Ops, Tap
from ..params import Params
from ..tokenizer import Tokenizer
from ..tracing.names import within_layer
from ..tracing.record import trace
from ..tracing.taps import chain, patch
from ..weights import Model

MAX_TOKENS = 128  # as on the page of explain: longer tables are unreadable
_TOP_TOKENS = 10  # next tokens shown as bars
_LENS_TOKENS = 5  # next tokens of the logit lens, per cell
_MAX_FACTOR = 10.0

Replacement = Callable[[Tensor], Tensor]
"""What `patch` takes for each name."""

Report = Callable[[int, int], None]
"""report(done, total): called after every layer; an exception that it raises ends the pass."""


class Patch(NamedTuple):
    """A row of the residual stream that comes from another prompt."""

    stage: int  # 0: the embedding; N: the output of layer N - 1
    source: int  # the position in the other prompt
    target: int  # the position in this one


class Changes(NamedTuple):
    """What a pass does differently. Where several concern one tensor, they apply in the order of the fields."""

    heads: tuple[tuple[int, int], ...] = ()  # (layer, head): the output of the head is 0
    feed_forward: tuple[int, ...] = ()  # the layers whose MLP adds nothing
    scales: tuple[tuple[int, float], ...] = ()  # (layer, factor): the layer's output is multiplied
    patches: tuple[Patch, ...] = ()
    other: tuple[int, ...] = ()  # the ids of the prompt that the patches come from


class PassRequest(NamedTuple):
    """What the page asks for."""

    ids: tuple[int, ...]
    changes: Changes = Changes()
    lens: bool = False  # the logit lens
    attention: int | None = None  # the layer whose attention is wanted


def stage_names(params: Params) -> list[str]:
    """Return the names of the residual stream: after the embedding, and after each layer."""
    return ["tok_embeddings", *(f"layers.{i}.residual" for i in range(params.n_layers))]


def read_request(body: Any, params: Params) -> PassRequest:
    """Return a request from its JSON. Raises UserError for what the model does not have."""
    if not isinstance(body, dict):
        raise UserError("the body should be a JSON object")
    _only(body, PassRequest._fields)
    ids = read_ids(body.get("ids"), "ids", params)
    attention, lens = body.get("attention"), body.get("lens", False)
    if attention is not None:
        _whole(attention, "attention", params.n_layers)
    if not isinstance(lens, bool):
        raise UserError("should be true or false", argument="lens")
    return PassRequest(ids, _read_changes(body.get("changes", {}), len(ids), params), lens, attention)


def read_ids(value: Any, name: str, params: Params) -> tuple[int, ...]:
    """Return the token ids of a prompt. Raises UserError unless there are 1 to MAX_TOKENS of the vocabulary."""
    if value == []:
        raise UserError("the prompt is empty; give at least one token")
    if not isinstance(value, list):
        raise UserError("should be a list of token ids", argument=name)
    if len(value) > min(MAX_TOKENS, params.max_seq_len):
        raise UserError(
            f"has {len(value)} tokens, but the page takes {min(MAX_TOKENS, params.max_seq_len)}; shorten the prompt",
            argument=name,
        )
    return tuple(_whole(token, name, params.vocab_size) for token in value)


def _read_changes(value: Any, length: int, params: Params) -> Changes:
    if not isinstance(value, dict):
        raise UserError("should be a JSON object", argument="changes")
    _only(value, Changes._fields)
    layers, heads = params.n_layers, params.n_heads
    other = read_ids(value["other"], "other", params) if value.get("other") else ()
    rows = _rows(value, "patches", 3, (layers + 1) * MAX_TOKENS)
    if rows and not other:
        raise UserError("need `other`, the ids of the prompt that they come from", argument="patches")
    counts = Patch(layers + 1, len(other), length)
    patches = [Patch(*(_whole(n, "patches", count) for n, count in zip(row, counts, strict=True))) for row in rows]
    return Changes(
        heads=tuple(
            (_whole(i, "heads", layers), _whole(j, "heads", heads)) for i, j in _rows(value, "heads", 2, layers * heads)
        ),
        feed_forward=tuple(_whole(i, "feed_forward", layers) for (i,) in _rows(value, "feed_forward", 1, layers)),
        scales=tuple((_whole(i, "scales", layers), _factor(by)) for i, by in _rows(value, "scales", 2, layers)),
        patches=tuple({(it.stage, it.target): it for it in patches}.values()),  # the last one of a row counts
        other=other,
    )


def _only(value: Mapping[str, Any], fields: Sequence[str]) -> None:
    for name in value:
        if name not in fields:
            raise UserError(f"{name[:40]!r} is not one of {', '.join(fields)}")


def _rows(value: Mapping[str, Any], name: str, width: int, most: int) -> list[list[Any]]:
    """Return a list of at most `most` lists of `width` entries; single entries need no list."""
    rows = value.get(name, [])
    if isinstance(rows, list) and len(rows) > most:
        raise UserError(f"should have at most {most} entries, has {len(rows)}", argument=name)
    rows = [[row] for row in rows] if width == 1 and isinstance(rows, list) else rows
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == width for row in rows):
        raise UserError(
            f"should be a list of {'numbers' if width == 1 else f'lists of {width} numbers'}", argument=name
        )
    return rows


def _whole(value: Any, name: str, count: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise UserError(f"should hold integers from 0 to {count - 1}, holds {in_short(value)}", argument=name)
    return value


def _factor(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -_MAX_FACTOR <= value <= _MAX_FACTOR:
        raise UserError(
            f"should hold factors from {-_MAX_FACTOR} to {_MAX_FACTOR}, holds {in_short(value)}", argument="scales"
        )
    return float(value)


def replacements(changes: Changes, params: Params, other: Mapping[str, Tensor]) -> dict[str, Replacement]:
    """Return the functions by tap name that `patch` takes. other: the residual stream of the other prompt."""
    found: dict[str, Replacement] = {}
    for layer in sorted({layer for layer, _ in changes.heads}):
        off = sorted({head for i, head in changes.heads if i == layer})
        found[f"layers.{layer}.attention.heads"] = partial(_with_rows, dimension=1, at=off, values=0.0)
    for layer in changes.feed_forward:
        found[f"layers.{layer}.feed_forward.out"] = torch.zeros_like
    for layer, factor in changes.scales:
        found[f"layers.{layer}.residual"] = partial(torch.mul, other=factor)
    stages = stage_names(params)
    for stage in sorted({it.stage for it in changes.patches}):
        name, rows = stages[stage], [it for it in changes.patches if it.stage == stage]
        values = other[name][[it.source for it in rows]]
        put = partial(_with_rows, dimension=0, at=[it.target for it in rows], values=values)
        found[name] = _both(found[name], put) if name in found else put
    return found


def _both(first: Replacement, second: Replacement) -> Replacement:
    return lambda x: second(first(x))


def _with_rows(x: Tensor, *, dimension: int, at: list[int], values: Tensor | float) -> Tensor:
    """Return a copy of x in which the rows `at` of a dimension have these values."""
    x = x.clone()
    x[(slice(None),) * dimension + (at,)] = values
    return x


class _Counter:
    """Counts layers as a tap, and other steps, and reports each."""

    def __init__(self, report: Report, total: int):
        self._report, self._total, self._done = report, total, 0
        report(0, total)

    def step(self) -> None:
        self._done += 1
        self._report(self._done, self._total)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if within_layer(name) == "residual":
            self.step()
        return tensor


def run_pass(model: Model, request: PassRequest, report: Report) -> dict[str, Any]:
    """Run one pass and return what the page shows, ready for JSON; tensors are fp32 in base64, little-endian.

    logits [vocab] of the last position; tokens: the prompt; top: the ten most likely tokens; lens: ids and probs
    [stages, T, 5], and their tokens; attention [n_heads, T * (T + 1) / 2]: the unmasked probabilities of a layer.

    Raises UserError: the pass does not fit into memory, or the logits are not numbers. Also whatever `report` raises.
    """
    params, changes, tokenizer = model.params, request.changes, model.tokenizer
    assert tokenizer is not None
    ops = ops_for(model.weights, exact=True)
    stages = stage_names(params)
    needed = sorted({stages[it.stage] for it in changes.patches})
    steps = params.n_layers * (2 if needed else 1) + (len(stages) if request.lens else 0)
    counter = _Counter(report, steps)
    other: Mapping[str, Tensor] = trace(model, changes.other, *needed, ops=ops, tap=counter) if needed else {}
    changed = replacements(changes, params, other)
    tap: Tap = chain(patch(changed), counter) if changed else counter
    names = ["logits", *(stages if request.lens else [])]
    if request.attention is not None:
        names.append(f"layers.{request.attention}.attention.probs")
    kept = trace(model, request.ids, *names, ops=ops, tap=tap)
    logits = kept["logits"][-1].cpu()  # [vocab]
    check_sound(bool(is_sound(logits)))
    top = _most_likely(logits, min(_TOP_TOKENS, params.vocab_size)).tolist()
    result: dict[str, Any] = {"logits": _base64(logits)}
    for name, listed in (("tokens", request.ids), ("top", top)):
        result[name] = [token_json(tokenizer, token) for token in listed]
    if request.lens:
        result["lens"] = _lens(model, [kept[name] for name in stages], ops, counter)
    if request.attention is not None:
        probs = kept[names[-1]].float().cpu()  # [n_heads, T, T]
        rows, columns = torch.tril_indices(*probs.shape[-2:])
        result["attention"] = _base64(probs[:, rows, columns])
    return result


def _lens(model: Model, stream: Sequence[Tensor], ops: Ops, counter: _Counter) -> dict[str, Any]:
    """Return the logit lens of the residual stream after each stage, [T, dim] each (see plots.read_logit_lens)."""
    weights, ids, probs = model.weights, [], []
    assert model.tokenizer is not None
    with torch.no_grad():
        for x in stream:
            x = x.to(weights.norm.device)
            logits = ops.linear(rms_norm(x, weights.norm, model.params.norm_eps), weights.output).float()
            ids.append(_most_likely(logits, min(_LENS_TOKENS, logits.shape[-1])))
            probs.append(logits.softmax(dim=-1).gather(-1, ids[-1]).tolist())
            counter.step()
    listed = [of_stage.tolist() for of_stage in ids]
    seen = sorted({token for of_stage in listed for row in of_stage for token in row})
    return {"ids": listed, "probs": probs, "tokens": [token_json(model.tokenizer, token) for token in seen]}


def _most_likely(logits: Tensor, top: int) -> Tensor:
    """Logits [..., vocab] -> the most likely tokens [..., top]; among equal ones, those with the lower id.

    The order of floats is that of their bits as integers, if those of negative ones are flipped. Below them, the id
    decides, so that there are no ties: `topk` takes any of them, and a stable sort of all takes longer than a layer.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    return (keys - torch.arange(logits.shape[-1], device=logits.device)).topk(top, dim=-1).indices


def _base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.float().contiguous().numpy().astype("<f4").tobytes()).decode()


def token_json(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """Return a token as the page shows it: id, text, and bytes in hex; a special token has none."""
    is_special = token in (*tokenizer.special_tokens.values(), *tokenizer.added_tokens.values())
    content = b"" if is_special else tokenizer.token_bytes(token)
    return {"id": token, "text": tokenizer.name(token), "bytes": content.hex(" ")}
