"""Build the page of python -m llama3_raw.explain, which follows a prompt from its text to the next token.

The text is in page_parts/page.html; the plots come from tracing/plots.py. Every number is the value of the Python
expression that the page shows with it. Needs the packages of the extra `explain`.
"""

from __future__ import annotations

import base64
import inspect
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy
import regex
import torch
import torch.nn.functional as F
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from torch import Tensor

from ..decoding.sampling import sample
from ..errors import UserError
from ..model import REFERENCE, attend, attention, feed_forward, forward, layer, rms_norm, rope, rope_frequencies
from ..ops import Ops
from ..params import Params
from ..tokenizer import SPLIT_PATTERN, Tokenizer
from ..tracing import plots, record
from ..tracing.record import Trace
from ..weights import Model, dtype_name, format_name, tensor_specs

MAX_TOKENS = 128  # longer tables are unreadable
MAX_HEAD_BYTES = 5_000_000  # scores and probabilities in base64; the remaining layers have thumbnails only
_THUMBNAIL = 32  # pixels; larger heatmaps are max-pooled to this size
_TOP_TOKENS = 10  # next tokens listed
_LENS_TOKENS = 5  # next tokens of the logit lens, per layer
_TABLE_VALUES = 5  # values of a vector that a table shows
_INK = "#010203"  # placeholder for the colour of the page's text (currentColor); no plot uses it otherwise
_PLOT_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",  # keep text as text, for search and screen readers
    "font.size": 9,
}
_PARTS = Path(__file__).parent / "page_parts"
_STYLES = ("base.css", "style.css")  # the first is also that of the live page


class Merge(NamedTuple):
    """A step of byte-pair encoding: the parts of a piece after a merge, and the token that the merge produced."""

    parts: list[bytes]
    token: int | None  # None: the single bytes, before any merge


class Piece(NamedTuple):
    """A piece of the text, as split by the pattern, and the merges that turn its bytes into tokens."""

    text: str
    merges: list[Merge]  # empty for a piece of more than 32 bytes: every merge lists all parts
    ids: list[int]  # a single id if the whole piece is a token: tiktoken looks it up before it merges


def merges_of(tokenizer: Tokenizer, piece: bytes) -> list[Merge]:
    """Return the steps of byte-pair encoding: merge neighbours, lowest id first. (Sennrich et al. 2016)

    The last step has the same tokens as tiktoken, unless the whole piece is a token that no sequence of merges reaches.
    """

    parts = [bytes([byte]) for byte in piece]
    merges = [Merge(parts, None)]
    while len(parts) > 1:
        ranks = [tokenizer.ranks.get(first + second, math.inf) for first, second in itertools.pairwise(parts)]
        best = min(ranks)
        if best == math.inf:
            break
        i = ranks.index(best)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
        merges.append(Merge(parts, int(best)))
    return merges


def pieces_of(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """Split a text into pieces, in order. Raises UserError for a tokenizer that splits it in another way."""
    pieces = [
        Piece(piece, merges_of(tokenizer, piece.encode()) if len(piece.encode()) <= 32 else [], tokenizer.encode(piece))
        for piece in regex.findall(SPLIT_PATTERN, text)
    ]
    if [token for piece in pieces for token in piece.ids] != tokenizer.encode(text):
        raise UserError(
            f"{tokenizer.path}: splits this text in another way than Llama 3's tokenizer, which the page shows; "
            "leave the names of its added tokens out, or use Llama 3's own"
        )
    return pieces


class Numbers:
    """Formats the numbers of the page. Each is the value of a Python expression, which the page shows with it."""

    def __init__(self, trace: Trace, model: Model, lens: plots.LogitLens):
        self._names = {
            "trace": trace,
            "params": model.params,
            "weights": model.weights,
            "lens": lens,
            "torch": torch,
            "F": F,
            "math": math,
            "rope_frequencies": rope_frequencies,
        }

    def value(self, expression: str) -> float:
        """Return the value of a Python expression."""
        with torch.no_grad():
            return float(eval(expression, {"__builtins__": {}}, self._names))

    def __call__(self, expression: str, format_spec: str = ".4g") -> Markup:
        """Return the formatted value as HTML that also contains the expression."""
        value = self.value(expression)
        html = Markup('<data value="{}" title="{}">{}</data>')
        return html.format(repr(value), expression, format(value, format_spec).replace("-", "−").replace("inf", "∞"))


def svg(figure: Figure, name: str, alternative: str) -> Markup:
    """Return a figure as SVG in `_PLOT_STYLE`, with text as text and with ids that are unique on the page."""
    buffer = io.StringIO()
    with rc_context(_PLOT_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser renders the text in its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    image = buffer.getvalue()
    image = image[image.index("<svg") :].replace(_INK, "currentColor")
    image = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", image)
    return Markup(image.replace("<svg", f'<svg role="img" aria-label="{escape(alternative)}"', 1))


def thumbnails(probs: Tensor) -> str:
    """Return the heatmaps of a layer [n_heads, T, S], side by side, one pixel per value, as a PNG data URL."""
    if probs.shape[-1] > _THUMBNAIL:
        probs = F.adaptive_max_pool2d(probs, _THUMBNAIL)
    strip = torch.cat(list(probs), dim=-1)  # [T, n_heads * S]
    pixels = numpy.empty((*strip.shape, 4), dtype=numpy.float32)
    pixels[..., :3] = to_rgb(plots.BLUE)
    pixels[..., 3] = strip.sqrt().numpy()  # makes small values visible
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def lower_triangles(tensor: Tensor) -> str:
    """Return the unmasked part [n_heads, T * (T + 1) / 2] of scores or probs [n_heads, T, T], in base64.

    The values are little-endian: bfloat16 if the tensor is bfloat16, otherwise float32.
    """
    rows, columns = torch.tril_indices(*tensor.shape[-2:])
    values = tensor[:, rows, columns]
    if values.dtype == torch.bfloat16:
        return base64.b64encode(values.view(torch.int16).numpy().astype("<i2").tobytes()).decode()
    return base64.b64encode(values.float().numpy().astype("<f4").tobytes()).decode()


def heads_data(trace: Trace, params: Params, layer: int) -> dict[str, Any]:
    """Return the data of the page's head picker: thumbnails of all heads, and the numbers of all or some layers.

    The numbers of `layer` are always included; those of the other layers, as far as `MAX_HEAD_BYTES` allows.
    """
    dtype = trace["layers.0.attention.probs"].dtype
    length = trace["tok_embeddings"].shape[-2]
    itemsize = 2 if dtype == torch.bfloat16 else 4
    per_layer = 2 * params.n_heads * length * (length + 1) // 2 * itemsize * 4 // 3
    n_fit = max(1, min(params.n_layers, MAX_HEAD_BYTES // per_layer))
    # evenly spaced from the first layer to the last, with `layer` replacing the nearest one
    with_numbers = {round(i * (params.n_layers - 1) / max(1, n_fit - 1)) for i in range(n_fit)}
    if layer not in with_numbers:
        with_numbers.remove(min(with_numbers, key=lambda i: abs(i - layer)))
        with_numbers.add(layer)
    layers = []
    for i in range(params.n_layers):
        scores, probs = trace[f"layers.{i}.attention.scores"], trace[f"layers.{i}.attention.probs"]
        layers.append(
            {
                "thumbnails": thumbnails(probs.float()),
                "scores": lower_triangles(scores) if i in with_numbers else None,
                "probs": lower_triangles(probs) if i in with_numbers else None,
            }
        )
    return {"bfloat16": dtype == torch.bfloat16, "length": length, "n_heads": params.n_heads, "layers": layers}


class Source(NamedTuple):
    """An excerpt of this project's source."""

    name: str  # of the function
    location: str  # file and lines
    code: Markup  # highlighted HTML


def source_of(function: Callable[..., Any], first: str = "", last: str = "") -> Source:
    """Return the source of a function: all of it, or from the line that contains `first` to the next with `last`."""
    lines, number = inspect.getsourcelines(function)
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(begin, len(lines)) if last in lines[i]) if first else len(lines) - 1
    numbers = f"line {number + begin}" if begin == end else f"lines {number + begin} to {number + end}"
    code = highlight(textwrap.dedent("".join(lines[begin : end + 1])), PythonLexer(), HtmlFormatter(nowrap=True))
    file = Path(inspect.getfile(function)).name
    return Source(function.__qualname__, f"{file}, {numbers}", Markup(code))


def syntax_colours() -> str:
    """Return the CSS for highlighted source, light and dark."""

    def style(name: str) -> str:
        return str(HtmlFormatter(style=name, nobackground=True).get_style_defs(".source code"))

    return f"{style('default')}\n@media screen and (prefers-color-scheme: dark) {{\n{style('github-dark')}\n}}"


def _extremes(rows: dict[str, Tensor]) -> str:
    """Describe the range of the values that a plot of these rows [n] shows."""
    values = torch.stack([row.float()[: plots.MAX_COLUMNS] for row in rows.values()])
    row, dimension = divmod(int(values.abs().argmax()), values.shape[1])
    low, high = values.aminmax()
    where = f"{list(rows)[row]}, dimension {dimension}"
    return f"From {low:.3g} to {high:.3g}; the largest magnitude is at {where}."


def sources() -> dict[str, Source]:
    """Return the source excerpts of the page, by the names that page.html uses."""
    return {
        "encode": source_of(Tokenizer.encode),
        "bos": source_of(Tokenizer.encode, "self.bos_id", "+="),
        "embed": source_of(forward, 'tap("tok_embeddings"', ""),
        "rms_norm": source_of(rms_norm),
        "attention": source_of(attention),
        "rope": source_of(rope),
        "rope_frequencies": source_of(rope_frequencies),
        "attend": source_of(attend),
        "probs": source_of(attend, 'tap("probs"', "return"),
        "out": source_of(attention, 'tap("heads"', "return"),
        "layer": source_of(layer),
        "feed_forward": source_of(feed_forward),
        "layers": source_of(forward, "for i,", "x = layer("),
        "lens": source_of(plots.read_logit_lens),
        "logits": source_of(forward, 'tap("norm"', "return"),
        "sample": source_of(sample),
    }


@rc_context(_PLOT_STYLE)
def _figures(trace: Trace, model: Model, prefix: str, input_name: str, layer: int, head: int) -> dict[str, Markup]:
    """Return the figures of the page as SVG with alternative text, by name.

    prefix: "layers.N." of the layer. input_name: the tap name of the layer's input.
    """
    params, tokenizer = model.params, model.tokenizer
    texts = plots.token_texts(trace, tokenizer, len(trace["tok_embeddings"]))

    def by_token(name: str) -> dict[str, Tensor]:
        return {f"{i} {text}": row for (i, text), row in zip(enumerate(texts), trace[name], strict=True)}

    def by_head(name: str) -> dict[str, Tensor]:
        return {f"head {i}": row for i, row in enumerate(trace[f"{prefix}attention.{name}"][-1])}

    top_ids = plots.most_likely(trace["logits"][-1], _TOP_TOKENS).tolist()
    probs = trace["logits"][-1].softmax(dim=-1)[top_ids].tolist()
    figures = {
        "embeddings": (
            plots.vectors(by_token("tok_embeddings")),
            f"The embedding of each token, as colours. {_extremes(by_token('tok_embeddings'))}",
        ),
        "before": (
            plots.vectors(by_token(input_name), title="before"),
            "Each token's row before the norm, as colours.",
        ),
        "after": (
            plots.vectors(by_token(f"{prefix}attention_norm"), title="after"),
            "Each token's row after the norm, as colours.",
        ),
        **{
            name: (
                plots.vectors(by_head(name), title=f"{name} of the last token"),
                f"{name} of the last token as colours, one row per head. {_extremes(by_head(name))}",
            )
            for name in ("q", "k", "v")
        },
        "rotations": (
            plots.rope_turns(trace, params, layer, head),
            "Pairs of the last token's query as arrows, before and after rotation; the table has the numbers.",
        ),
        "wavelengths": (
            plots.rope_wavelengths(params, len(texts)),
            "Tokens per full turn of each pair: about six for the first pair, increasing to the last.",
        ),
        "gates": (plots.gates(trace, layer), "The curve of silu, with the gates of the last token marked on it."),
        "residual": (
            plots.residual_norms(trace, tokenizer=tokenizer),
            "The root mean square of each token's row after each layer; the table has the numbers of the last token.",
        ),
        "next": (
            plots.next_tokens([plots.token_text(tokenizer, token) for token in top_ids], probs),
            "The most likely next tokens as bars; the table has the numbers.",
        ),
    }
    return {name: svg(figure, name, alternative) for name, (figure, alternative) in figures.items()}


def _check_finite(trace: Trace) -> None:
    for name, tensor in trace.items():
        broken = ~tensor.isfinite()
        if name.endswith(".scores"):
            broken &= tensor != -torch.inf  # the mask
        if broken.any():
            raise UserError(
                f"{name}: {int(broken.sum()):,} of {broken.numel():,} values are not finite; the weights are damaged "
                "(check them with download.py --verify), or the values overflow their dtype"
            )


def build_page(
    model: Model,
    model_name: str,
    prompt: str,
    layer: int = 0,
    head: int = 0,
    *,
    ops: Ops = REFERENCE,
    progress: bool = False,
) -> str:
    """Build the page for a prompt and return it as HTML.

    Args:
        model: a model with a tokenizer.
        model_name: the name of the model on the page.
        prompt: the text to follow.
        layer, head: the layer and head to show step by step; the model must have them.
        ops: the operations; they must compute attention scores.
        progress: show progress bars on stderr.

    Raises:
        UserError: `trace` cannot record the pass, or a tensor has values that are not finite.
    """
    params, weights, tokenizer = model.params, model.weights, model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(prompt, bos=True)
    special = {*tokenizer.special_tokens.values(), *tokenizer.added_tokens.values()}
    trace = record.trace(model, ids, device="cpu", ops=ops, progress=progress)
    _check_finite(trace)
    lens = plots.read_logit_lens(trace, model, top=_LENS_TOKENS, ops=ops, progress=progress)
    prefix = f"layers.{layer}."
    input_name = "tok_embeddings" if layer == 0 else f"layers.{layer - 1}.residual"
    n_rep = params.n_heads // params.n_kv_heads
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        model_name=model_name,
        params=params,
        weights=weights,
        n_weights=sum(math.prod(spec.shape) for spec in tensor_specs(params, weights.output is weights.tok_embeddings)),
        dtype=dtype_name(weights.norm.dtype),
        prompt=prompt,
        pieces=pieces_of(tokenizer, prompt),
        ids=ids,
        texts=plots.token_texts(trace, tokenizer, len(ids)),
        token_bytes=[None if token in special else tokenizer.token_bytes(token) for token in ids],
        token_text=lambda token: plots.token_text(tokenizer, token),
        visible=plots.visible,
        matrices="" if isinstance(weights.output, Tensor) else format_name(weights.output),
        trace=trace,
        n=Numbers(trace, model, lens),
        layer=layer,
        head=head,
        kv_head=head // n_rep,
        n_rep=n_rep,
        last=len(ids) - 1,
        prefix=prefix,
        input_name=input_name,
        shown=_TABLE_VALUES,
        pairs=plots.shown_pairs(params),
        hidden_units=trace[f"{prefix}feed_forward.hidden"][-1].float().abs().topk(5).indices.tolist(),
        lens=lens,
        top_ids=plots.most_likely(trace["logits"][-1], _TOP_TOKENS).tolist(),
        stop_ids=tokenizer.stop_ids,
        heads=heads_data(trace, params, layer),
        sources=sources(),
        figures=_figures(trace, model, prefix, input_name, layer, head),
        style="".join((_PARTS / name).read_text(encoding="utf-8") for name in _STYLES) + syntax_colours(),
        script=(_PARTS / "page.js").read_text(encoding="utf-8"),
    )
