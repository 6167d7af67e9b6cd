"""Plots of a trace, as matplotlib figures, for notebooks and for the page of llama3_raw.explain.

Each needs a `Trace` with the tensors that it names. Colours become transparent towards zero, so that they work on white
and, in the page, on black. Needs matplotlib: pip install -e '.[explain]'.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError, needed_package
from ..model import REFERENCE, rms_norm, rope_frequencies
from ..ops import UNFUSED, Ops
from ..params import Params
from ..tokenizer import Tokenizer
from ..weights import Model
from .names import within_layer
from .record import Trace

needed_package("matplotlib", "llama3_raw.plots", "explain")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

BLUE, ORANGE = "#3b7dd8", "#e8731a"  # distinct for the colour-blind, and on either background
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, (BLUE, 1.0)), (0.5, (BLUE, 0.0)), (0.5, (ORANGE, 0.0)), (1.0, (ORANGE, 1.0))]
)
# matplotlib 3.10, the last for Python 3.10, would take (color, alpha) for (position, color)
_SHARE = LinearSegmentedColormap.from_list("share", [to_rgba(BLUE, 0.0), to_rgba(BLUE, 1.0)])
_BY_POSITION = LinearSegmentedColormap.from_list("position", [ORANGE, BLUE])
MAX_COLUMNS = 64  # in a plot of vectors; more would be thinner than a pixel
_MAX_LEGEND_LINES = 12


class Picture(Figure):
    """A figure that a notebook shows at the end of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def visible(text: str) -> str:
    """Return the text with every character visible: ↵ for a newline, ⇥ for a tab, escapes for the unprintable."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """Return the text of a token, with ␣ for a space and \\xNN for a byte that is not UTF-8; None: its id.

    Other characters are as in `visible`.
    """
    if tokenizer is None:
        return str(token)
    return visible(tokenizer.name(token)).replace(" ", "␣")


def token_texts(trace: Trace, tokenizer: Tokenizer | None, length: int) -> list[str]:
    """Return the `length` tokens of the trace as text, or their positions if the trace does not know its tokens."""
    if trace.origin is None or len(trace.origin.ids) != length:
        return [str(position) for position in range(length)]
    return [token_text(tokenizer, token) for token in trace.origin.ids]


def most_likely(logits: Tensor, top: int) -> Tensor:
    """Logits [..., vocab] -> the most likely tokens [..., top]; ties go to the first, as in `sample`."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :top]


def attention(trace: Trace, layer: int, head: int, *, tokenizer: Tokenizer | None = None) -> Figure:
    """Plot how much each token (row) attends to itself and to each token before it, in one head.

    Args:
        trace: has layers.N.attention.probs, [n_heads, T, T].
        layer: the layer N, from 0.
        head: the query head, from 0.
        tokenizer: turns the tokens into text for the axes. None: their ids.

    Raises:
        UserError: the trace lacks the tensor, or the model has no such layer or head.
    """
    probs = _tensor(trace, f"layers.{layer}.attention.probs", 3)  # [n_heads, T, T]
    _check_head(head, len(probs))
    texts = token_texts(trace, tokenizer, probs.shape[-2])
    size = 1.5 + 0.3 * len(texts)
    figure, axes = _figure(size + 0.8, size)
    image = axes.imshow(probs[head].float().numpy(), cmap=_SHARE, vmin=0, vmax=1)
    _name_ticks(axes, "y", texts)
    _name_ticks(axes, "x", texts)
    axes.set(title=f"layer {layer}, head {head}", xlabel="attends to", ylabel="token")
    figure.colorbar(image, label="probability", pad=0.02)
    return figure


def residual_norms(trace: Trace, *, tokenizer: Tokenizer | None = None) -> Figure:
    """Plot how the residual stream grows: the RMS of each token's row, after the embedding and each layer.

    Args:
        trace: has tok_embeddings and layers.*.residual, each [T, dim].
        tokenizer: turns the tokens into text for the legend. None: their ids.

    Raises:
        UserError: the trace lacks one of the tensors.
    """
    rms = residual_rms(trace)  # [layers + 1, T]
    texts = token_texts(trace, tokenizer, rms.shape[-1])
    figure, axes = _figure(5.2, 3.2)
    axes.set_prop_cycle(color=_BY_POSITION(torch.linspace(0, 1, len(texts)).numpy()))
    lines = axes.plot(range(-1, len(rms) - 1), rms.numpy(), linewidth=1.5)
    spacing = math.ceil(len(texts) / _MAX_LEGEND_LINES)
    named = range(0, len(texts), spacing)
    legend = figure.legend(
        [lines[i] for i in named],
        [""] * len(named),
        loc="outside right upper",
        frameon=False,
        title="token" if spacing == 1 else f"every {spacing}th token",
    )
    for text, i in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)
        text.set_text(f"{i} {texts[i]}")
    axes.set(yscale="log", xlabel="layer (-1: the embedding)", ylabel="root mean square")
    return figure


def residual_rms(trace: Trace) -> Tensor:
    """Return the RMS of each token's row in tok_embeddings and each layers.N.residual, [layers + 1, T] fp32."""
    rows = [_tensor(trace, name, 2) for name in residual_names(trace)]
    return torch.stack([row.float().square().mean(-1).sqrt() for row in rows])


def residual_names(trace: Trace) -> list[str]:
    """Return the names of the residual stream, from the embedding to the last layer.

    If the trace does not know its model, the last layer is the last one that it has.
    """
    last = max((int(name.split(".")[1]) for name in trace if name.split(".")[2:] == ["residual"]), default=0)
    n_layers = last + 1 if trace.origin is None else trace.origin.params.n_layers
    return ["tok_embeddings", *(f"layers.{i}.residual" for i in range(n_layers))]


class LogitLens(NamedTuple):
    """The next tokens that the model would predict if it ended after the embedding or each layer, at each position."""

    stages: list[str]  # the names of the residual stream
    ids: Tensor  # [stages, T, top] int64, the most likely first
    probs: Tensor  # [stages, T, top] fp32


def read_logit_lens(
    trace: Trace, model: Model, *, top: int = 5, ops: Ops = REFERENCE, progress: bool = False
) -> LogitLens:
    """Apply the final norm and the output matrix to the residual stream after every layer. (nostalgebraist 2020)

    Args:
        trace: has tok_embeddings and layers.*.residual, each [T, dim].
        model: the model of the trace.
        top: how many tokens to return for each position.
        ops: the operations.
        progress: show a bar on stderr, if it takes longer than a second.

    Raises:
        UserError: the trace lacks one of the tensors.
    """
    weights, ids, probs = model.weights, [], []
    stages = residual_names(trace)
    with torch.no_grad():
        for name in tqdm(stages, desc="logit lens", leave=False, delay=1, disable=not progress):
            x = _tensor(trace, name, 2).to(weights.norm.device, weights.norm.dtype)
            logits = ops.linear(rms_norm(x, weights.norm, model.params.norm_eps), weights.output).float()
            ids.append(most_likely(logits, top).cpu())  # [T, top]
            probs.append(logits.softmax(dim=-1).cpu().gather(-1, ids[-1]))
    return LogitLens(stages, torch.stack(ids), torch.stack(probs))


def logit_lens(trace: Trace, model: Model) -> Figure:
    """Plot the most likely next token at each position if the model ended after each layer (see `read_logit_lens`).

    Args:
        trace: has tok_embeddings and layers.*.residual, each [T, dim].
        model: the model of the trace.

    Raises:
        UserError: the trace lacks one of the tensors.
    """
    lens = read_logit_lens(trace, model, top=1)
    probs = lens.probs[..., 0]  # [stages, T]
    texts = token_texts(trace, model.tokenizer, probs.shape[-1])
    figure, axes = _figure(2.4 + 0.75 * len(texts), 2.2 + 0.28 * len(lens.stages))
    image = axes.imshow(probs.numpy(), cmap=_SHARE, vmin=0, vmax=1, aspect="auto", origin="lower")
    for stage, row in enumerate(lens.ids[..., 0].tolist()):
        for position, token in enumerate(row):
            axes.text(
                position,
                stage,
                token_text(model.tokenizer, token),
                ha="center",
                va="center",
                fontsize=7,
                parse_math=False,
            )
    _name_ticks(axes, "x", texts)
    axes.set_yticks(range(len(lens.stages)), ["embedding", *(f"layer {i}" for i in range(len(lens.stages) - 1))])
    axes.set(xlabel="after the token")
    figure.colorbar(image, label="probability", pad=0.02)
    return figure


def vectors(rows: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Plot the first values of vectors, one below the other: blue if negative, orange if positive.

    Args:
        rows: the vectors by name, each [n].
        title: the title of the plot.
    """
    values = torch.stack([row.float()[:MAX_COLUMNS] for row in rows.values()]).cpu()  # [rows, columns]
    limit = float(values.abs().max())
    figure, axes = _figure(5.2, 0.9 + 0.24 * len(rows))
    image = axes.imshow(values.numpy(), cmap=_SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    _name_ticks(axes, "y", list(rows))
    length = next(iter(rows.values())).shape[0]
    shown = f" (the first {MAX_COLUMNS} of {length:,})" if length > MAX_COLUMNS else ""
    axes.set(title=title, xlabel=f"dimension{shown}")
    figure.colorbar(image, pad=0.02)
    return figure


def heat(
    values: Tensor, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, *, title: str = ""
) -> Figure:
    """Plot a table of numbers, such as the effects of a sweep: blue if negative, orange if positive, pale near 0.

    Args:
        values: [rows, columns]; a NaN stays empty.
        rows: the name of each row, from top to bottom. None: their numbers.
        columns: the name of each column. None: their numbers.
        title: the title of the plot.

    Raises:
        UserError: the values are not a table, or there is not one name for each row and column.
    """
    if values.dim() != 2:
        raise UserError(f"should be [rows, columns], is {list(values.shape)}", argument="values")
    names = [list(rows or map(str, range(values.shape[0]))), list(columns or map(str, range(values.shape[1])))]
    for n, given, argument in zip(values.shape, names, ("rows", "columns"), strict=True):
        if len(given) != n:
            raise UserError(f"has {len(given)} names for {n}", argument=argument)
    wide, high = (0.08 * max(map(len, given), default=0) for given in names)  # inches of the names
    table = values.detach().float().cpu()
    limit = float(table.nan_to_num(0.0).abs().max()) or 1.0
    figure, axes = _figure(1.8 + wide + 0.32 * values.shape[1], 0.8 + high + 0.26 * values.shape[0])
    image = axes.imshow(table.numpy(), cmap=_SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    _name_ticks(axes, "y", names[0])
    _name_ticks(axes, "x", names[1])
    axes.set_title(title)
    figure.colorbar(image, pad=0.02)
    return figure


def heads(trace: Trace, layer: int | None = None) -> Figure:
    """Plot the attention of all heads as a grid of small maps, queries from top to bottom and keys from left to right.

    Args:
        trace: has layers.N.attention.probs, [n_heads, T, T].
        layer: the layer N, whose heads are in rows of eight. None: all layers in the trace, one in each row.

    Raises:
        UserError: the trace lacks the tensor, or the model has no such layer.
    """
    if layer is None:
        layers = [int(name.split(".")[1]) for name in trace if name.endswith(".attention.probs")] or [0]
    else:
        layers = [layer]
    maps = torch.stack(
        [_tensor(trace, f"layers.{i}.attention.probs", 3).float() for i in layers]
    )  # [layers, heads, T, T]
    across = maps.shape[1] if layer is None else min(8, maps.shape[1])
    framed = F.pad(maps.flatten(0, 1), (0, 1, 0, 1), value=torch.nan)  # a gap between the maps
    down = math.ceil(len(framed) / across)
    framed = F.pad(framed, (0, 0, 0, 0, 0, down * across - len(framed)), value=torch.nan)
    size = framed.shape[-1]  # T + 1
    picture = framed.unflatten(0, (down, across)).transpose(1, 2).reshape(down * size, across * size)
    figure, axes = _figure(1.2 + 0.9 * across, 0.6 + 0.9 * down)
    image = axes.imshow(picture.numpy(), cmap=_SHARE, vmin=0, vmax=1, interpolation="nearest")
    centres = [[size * i + size / 2 - 1 for i in range(n)] for n in (down, across)]
    rows = [f"layer {i}" for i in layers] if layer is None else [f"head {across * i}" for i in range(down)]
    axes.set_yticks(centres[0], rows)
    axes.set_xticks(centres[1], [f"head {i}" if layer is None else f"+{i}" for i in range(across)])
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("" if layer is None else f"layer {layer}")
    figure.colorbar(image, label="probability", pad=0.02)
    return figure


def rope_turns(trace: Trace, params: Params, layer: int, head: int) -> Figure:
    """Plot how RoPE rotates four pairs of the last token's query, from the fastest pair to the slowest.

    Args:
        trace: has layers.N.attention.q and layers.N.attention.q_rope, each [T, n_heads, head_dim].
        params: the params of the model.
        layer: the layer N, from 0.
        head: the query head, from 0.

    Raises:
        UserError: the trace lacks one of the tensors, or the model has no such layer or head.
    """
    q, q_rope = (_tensor(trace, f"layers.{layer}.attention.{name}", 3)[-1] for name in ("q", "q_rope"))
    _check_head(head, len(q))
    before, after = (x[head].float().unflatten(-1, (-1, 2)) for x in (q, q_rope))  # [head_dim/2, 2]
    pairs = shown_pairs(params)
    figure, all_axes = _figure(5.2, 1.9, len(pairs))
    for axes, pair in zip(all_axes, pairs, strict=True):
        radius = float(before[pair].norm())
        turn = torch.linspace(0, 2 * math.pi, 100)
        axes.plot((radius * turn.cos()).numpy(), (radius * turn.sin()).numpy(), color="0.5", linewidth=0.5)
        for (x, y), colour, name in ((before[pair].tolist(), BLUE, "q"), (after[pair].tolist(), ORANGE, "q_rope")):
            axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.8})
            axes.plot(x, y, "o", color=colour, markersize=4, label=name)
        limit = 1.25 * max(radius, 1e-6)
        axes.set(
            title=f"pair {pair}", xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[0], yticks=[0]
        )
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def shown_pairs(params: Params) -> list[int]:
    """Return four pairs of a head, evenly spaced from the one that rotates fastest to the slowest."""
    pairs = params.head_dim // 2
    return sorted({round(i * (pairs - 1) / 3) for i in range(4)})


def rope_wavelengths(params: Params, length: int) -> Figure:
    """Plot how many tokens a full turn of each pair of a head takes, with a line at the length of the prompt.

    Args:
        params: the params of the model.
        length: the length of the prompt in tokens.
    """
    wavelengths = 2 * math.pi / rope_frequencies(params, torch.device("cpu"))  # [head_dim/2]
    figure, axes = _figure(5.2, 2.4)
    axes.plot(wavelengths.numpy(), ".-", color=BLUE, markersize=4)
    axes.axhline(length, color=ORANGE, linewidth=1)
    end = (len(wavelengths) - 1, length)
    axes.annotate(f"the prompt: {length} tokens", end, xytext=(0, 4), textcoords="offset points", ha="right")
    axes.set(yscale="log", xlabel="pair", ylabel="tokens for a full turn")
    return figure


def gates(trace: Trace, layer: int) -> Figure:
    """Plot silu, with a mark at the value of each gate of the last token.

    Args:
        trace: has layers.N.feed_forward.gate, [T, hidden_dim].
        layer: the layer N, from 0.

    Raises:
        UserError: the trace lacks the tensor, or the model has no such layer.
    """
    gate = _tensor(trace, f"layers.{layer}.feed_forward.gate", 2)[-1].float()
    limit = max(4.0, float(gate.abs().max()))
    x = torch.linspace(-limit, limit, 200)
    figure, axes = _figure(5.2, 2.6)
    axes.plot(x.numpy(), F.silu(x).numpy(), color="0.5", linewidth=1)
    axes.plot(
        gate.numpy(),
        F.silu(gate).numpy(),
        "|",
        color=ORANGE,
        alpha=max(0.1, min(1.0, 200 / len(gate))),
        rasterized=True,
    )
    axes.set(xlabel=f"gate (one mark for each of {len(gate):,} units)", ylabel="silu(gate)")
    return figure


def next_tokens(names: Sequence[str], probs: Sequence[float]) -> Figure:
    """Plot tokens and their probabilities as bars, the first on top.

    Args:
        names: the tokens as text.
        probs: the probability of each.
    """
    figure, axes = _figure(5.2, 0.7 + 0.26 * len(names))
    bars = axes.barh(range(len(names)), probs, color=BLUE)
    axes.bar_label(bars, [f"{p:.1%}" if p >= 0.001 else "below 0.1%" for p in probs], padding=3)
    _name_ticks(axes, "y", names)
    axes.set(xlim=(0, 1.12 * max(probs)), xlabel="probability")
    axes.invert_yaxis()
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure, its size in inches, and its axes: one, or an array of `columns`."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name_ticks(axes: Axes, which: str, names: Sequence[str]) -> None:
    """Set the tick labels of an axis, literally: a $ does not start a formula."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_ticks(range(len(names)), names, parse_math=False, rotation=90 if which == "x" else 0)


def _check_head(head: int, n_heads: int) -> None:
    if not 0 <= head < n_heads:
        raise UserError(f"head {head}: the layer has heads 0 to {n_heads - 1}")


def _tensor(trace: Trace, name: str, dimensions: int) -> Tensor:
    """Return a tensor of a single prompt with all its positions."""
    n_layers = trace.origin and trace.origin.params.n_layers
    layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
    if n_layers and not 0 <= layer < n_layers:
        raise UserError(f"layer {layer}: the model has layers 0 to {n_layers - 1}")
    if name not in trace:
        raise UserError(f"the trace lacks {name!r}; trace that name too, or trace without patterns")
    tensor = trace[name].cpu()
    is_partial = trace.at is not None or (within_layer(name) in UNFUSED and tensor.shape[-1] != tensor.shape[-2])
    if tensor.dim() != dimensions or is_partial:
        raise UserError(f"{name} is {list(tensor.shape)}; use a trace of one prompt, with all its positions")
    return tensor
