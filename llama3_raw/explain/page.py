"""The page that python -m llama3_raw.explain writes: it goes with a prompt from its text to the next token.

The words are in page_parts/page.html, the pictures come from tracing/plots.py. Each number is computed by the line of
Python that the page shows with it. Needs the packages of the extra `explain`.
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
from ..quantization.int8 import Int8
from ..tokenizer import SPLIT_PATTERN, Tokenizer
from ..tracing import plots
from ..tracing.record import Trace, trace
from ..weights import Model, in_words, tensor_places

MOST_TOKENS = 128  # more would fill the page with tables that nobody reads
MOST_HEAD_BYTES = 5_000_000  # of scores and probabilities in base64; layers beyond it have thumbnails only
_THUMBNAIL = 32  # pixels: larger heatmaps are pooled to this
_TOP = 10  # next tokens
_LENS = 5  # next tokens behind each layer
_SHOWN = 5  # values of a vector that the tables have
_INK = "#010203"  # for what should have the colour of the page's text; no picture has it otherwise
_ON_A_PAGE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",  # text, to be found and read aloud
    "font.size": 9,
}
_PARTS = Path(__file__).parent / "page_parts"


class Merge(NamedTuple):
    """A step of byte-pair encoding: what a piece of text consists of, and the token that the last merge made."""

    parts: list[bytes]
    made: int | None  # None: the bytes at the beginning


class Piece(NamedTuple):
    """A piece that the pattern cuts from the text, and how its bytes become tokens."""

    text: str
    merges: list[Merge]  # none for a piece of more than 32 bytes: each has all the parts
    ids: list[int]  # one, where the whole piece is a token: tiktoken looks that up before it merges anything


def merges_of(tokenizer: Tokenizer, piece: bytes) -> list[Merge]:
    """Byte-pair encoding step by step: neighbours are merged, lowest id first. (Sennrich et al. 2016)

    The ids of the last step are those of tiktoken, but for a piece that is a token itself and that no merges lead to.
    """

    def token(part: bytes) -> float:
        try:
            rank = tokenizer.encoding.encode_single_token(part)
        except KeyError:
            return math.inf
        return rank if rank < tokenizer.bos_id else math.inf  # no special one

    parts = [bytes([byte]) for byte in piece]
    merges = [Merge(parts, None)]
    while len(parts) > 1:
        made = [token(first + second) for first, second in itertools.pairwise(parts)]
        best = min(made)
        if best == math.inf:
            break
        at = made.index(best)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
        merges.append(Merge(parts, int(best)))
    return merges


def pieces_of(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """The pieces of a text, in order."""
    cuts = regex.findall(SPLIT_PATTERN, text)
    return [
        Piece(cut, merges_of(tokenizer, cut.encode()) if len(cut.encode()) <= 32 else [], tokenizer.encode(cut))
        for cut in cuts
    ]


class Numbers:
    """Writes numbers into the page, each with the Python that yields it: it is evaluated to make the number."""

    def __init__(self, kept: Trace, model: Model, lens: plots.LogitLens):
        self._names = {
            "trace": kept,
            "params": model.params,
            "weights": model.weights,
            "lens": lens,
            "torch": torch,
            "F": F,
            "math": math,
            "rope_frequencies": rope_frequencies,
        }

    def value(self, expression: str) -> float:
        """What the Python yields."""
        with torch.no_grad():
            return float(eval(expression, {"__builtins__": {}}, self._names))

    def __call__(self, expression: str, form: str = ".4g") -> Markup:
        """The number, in this format, as HTML that holds the Python too."""
        value = self.value(expression)
        html = Markup('<data value="{}" title="{}">{}</data>')
        return html.format(repr(value), expression, format(value, form).replace("-", "−").replace("inf", "∞"))


def svg(figure: Figure, name: str, alternative: str) -> Markup:
    """A figure, made with `_ON_A_PAGE`, as part of a page: its text stays text, and its ids do not collide."""
    written = io.StringIO()
    with rc_context(_ON_A_PAGE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text, with its own fonts
        figure.savefig(written, format="svg", metadata={"Date": None})
    image = written.getvalue()
    image = image[image.index("<svg") :].replace(_INK, "currentColor")
    image = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", image)
    return Markup(image.replace("<svg", f'<svg role="img" aria-label="{escape(alternative)}"', 1))


def thumbnails(probs: Tensor) -> str:
    """The heatmaps of a layer's heads [n_heads, T, S] side by side, one pixel a number, as a PNG in a data URL."""
    if probs.shape[-1] > _THUMBNAIL:
        probs = F.adaptive_max_pool2d(probs, _THUMBNAIL)
    strip = torch.cat(list(probs), dim=-1)  # [T, n_heads * S]
    pixels = numpy.empty((*strip.shape, 4), dtype=numpy.float32)
    pixels[..., :3] = to_rgb(plots.BLUE)
    pixels[..., 3] = strip.sqrt()  # so that small ones are seen as well
    written = io.BytesIO()
    imsave(written, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def lower_triangles(tensor: Tensor) -> str:
    """The part [n_heads, T * (T + 1) / 2] of scores or probs [n_heads, T, T] that is not masked, in base64.

    bfloat16 as it is, everything else as float32, little-endian.
    """
    rows, columns = torch.tril_indices(*tensor.shape[-2:])
    values = tensor[:, rows, columns]
    if values.dtype == torch.bfloat16:
        return base64.b64encode(values.view(torch.int16).numpy().astype("<i2").tobytes()).decode()
    return base64.b64encode(values.float().numpy().astype("<f4").tobytes()).decode()


def heads_data(kept: Trace, params: Params, layer: int) -> dict[str, Any]:
    """What the head picker of the page shows: thumbnails of all heads, and the numbers of all, or of some layers.

    layer: one that is among them in any case.
    """
    dtype = kept["layers.0.attention.probs"].dtype
    length = kept["tok_embeddings"].shape[-2]
    itemsize = 2 if dtype == torch.bfloat16 else 4
    per_layer = 2 * params.n_heads * length * (length + 1) // 2 * itemsize * 4 // 3
    fitting = max(1, min(params.n_layers, MOST_HEAD_BYTES // per_layer))
    # evenly from the first layer to the last, but for the one
    whole = {round(i * (params.n_layers - 1) / max(1, fitting - 1)) for i in range(fitting)}
    if layer not in whole:
        whole.remove(min(whole, key=lambda i: abs(i - layer)))
        whole.add(layer)
    layers = []
    for i in range(params.n_layers):
        scores, probs = kept[f"layers.{i}.attention.scores"], kept[f"layers.{i}.attention.probs"]
        layers.append(
            {
                "thumbnails": thumbnails(probs.float()),
                "scores": lower_triangles(scores) if i in whole else None,
                "probs": lower_triangles(probs) if i in whole else None,
            }
        )
    return {"bfloat16": dtype == torch.bfloat16, "length": length, "n_heads": params.n_heads, "layers": layers}


class Source(NamedTuple):
    """A piece of this project's source."""

    name: str  # of the function
    place: str  # file and lines
    code: Markup  # highlighted


def source_of(function: Callable[..., Any], first: str = "", last: str = "") -> Source:
    """A function's own source, from the line that has the text `first` in it to the next one with `last`, or all."""
    lines, number = inspect.getsourcelines(function)  # the number of the first one in its file
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(begin, len(lines)) if last in lines[i]) if first else len(lines) - 1
    numbers = f"line {number + begin}" if begin == end else f"lines {number + begin} to {number + end}"
    code = highlight(textwrap.dedent("".join(lines[begin : end + 1])), PythonLexer(), HtmlFormatter(nowrap=True))
    file = Path(inspect.getfile(function)).name
    return Source(function.__qualname__, f"{file}, {numbers}", Markup(code))


def syntax_colours() -> str:
    """The style sheets for highlighted source, light and dark."""

    def style(name: str) -> str:
        return str(HtmlFormatter(style=name, nobackground=True).get_style_defs(".source code"))

    return f"{style('default')}\n@media screen and (prefers-color-scheme: dark) {{\n{style('github-dark')}\n}}"


def _extremes(rows: dict[str, Tensor]) -> str:
    """The limits of what a picture of rows [n] shows, in words."""
    values = torch.stack([row.float()[: plots.MOST_COLUMNS] for row in rows.values()])
    row, dimension = divmod(int(values.abs().argmax()), values.shape[1])
    low, high = values.aminmax()
    return f"From {low:.3g} to {high:.3g}; the strongest value shown is of {list(rows)[row]}, dimension {dimension}."


def sources() -> dict[str, Source]:
    """What the page shows of the code, by the name that it has there."""
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


@rc_context(_ON_A_PAGE)
def _pictures(kept: Trace, model: Model, at: str, before: str, layer: int, head: int) -> dict[str, Markup]:
    """The figures of the page as SVG, by name, each with what it shows in words.

    at: what the names of the layer begin with. before: the name of what comes into it.
    """
    params, tokenizer = model.params, model.tokenizer
    texts = plots.token_texts(kept, tokenizer, len(kept["tok_embeddings"]))

    def by_token(name: str) -> dict[str, Tensor]:
        return {f"{i} {text}": row for (i, text), row in zip(enumerate(texts), kept[name], strict=True)}

    def by_head(name: str) -> dict[str, Tensor]:
        return {f"head {i}": row for i, row in enumerate(kept[f"{at}attention.{name}"][-1])}

    top_ids = plots.likeliest(kept["logits"][-1], _TOP).tolist()
    probs = kept["logits"][-1].softmax(dim=-1)[top_ids].tolist()
    figures = {
        "embeddings": (
            plots.vectors(by_token("tok_embeddings")),
            f"The embedding of each token, as colours. {_extremes(by_token('tok_embeddings'))}",
        ),
        "before": (plots.vectors(by_token(before), title="before"), "Each token's row before the norm, as colours."),
        "after": (
            plots.vectors(by_token(f"{at}attention_norm"), title="after"),
            "Each token's row after the norm, as colours.",
        ),
        **{
            part: (
                plots.vectors(by_head(part), title=f"{part} of the last token"),
                f"{part} of the last token as colours, a row for each head. {_extremes(by_head(part))}",
            )
            for part in ("q", "k", "v")
        },
        "turns": (
            plots.rope_turns(kept, params, layer, head),
            "Pairs of the last token's query as arrows, before and after their turn; the table has the numbers.",
        ),
        "wavelengths": (
            plots.rope_wavelengths(params, len(texts)),
            "Tokens for a full turn by pair: about six for the first pair, ever more up to the last.",
        ),
        "gates": (plots.gates(kept, layer), "The curve of silu, with a mark for each gate of the last token."),
        "residual": (
            plots.residual_norms(kept, tokenizer=tokenizer),
            "The root mean square of each token's row over the layers; the table has that of the last token.",
        ),
        "next": (
            plots.next_tokens([plots.token_text(tokenizer, token) for token in top_ids], probs),
            "The likeliest next tokens as bars; the table has the numbers.",
        ),
    }
    return {name: svg(figure, name, words) for name, (figure, words) in figures.items()}


def _check_finite(kept: Trace) -> None:
    for name, tensor in kept.items():
        broken = ~tensor.isfinite()
        if name.endswith(".scores"):
            broken &= tensor != -torch.inf  # the mask
        if broken.any():
            raise UserError(
                f"{name}: {int(broken.sum()):,} of {broken.numel():,} values are not finite: the weights are damaged "
                "(see download.py --verify), or their dtype is too small for them"
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
    """The page for a prompt, as HTML. The layer and head, which the model has, are those whose steps are shown.

    ops: must have attention scores. Raises UserError for what `trace` refuses, and where a tensor is not finite.
    """
    params, weights, tokenizer = model.params, model.weights, model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(prompt, bos=True)
    kept = trace(model, ids, device="cpu", ops=ops, progress=progress)
    _check_finite(kept)
    lens = plots.read_logit_lens(kept, model, top=_LENS, ops=ops, progress=progress)
    at = f"layers.{layer}."
    before = "tok_embeddings" if layer == 0 else f"layers.{layer - 1}.residual"
    sharing = params.n_heads // params.n_kv_heads
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
        n_weights=sum(
            math.prod(place.shape) for place in tensor_places(params, weights.output is weights.tok_embeddings)
        ),
        dtype=in_words(weights.norm.dtype),
        prompt=prompt,
        pieces=pieces_of(tokenizer, prompt),
        ids=ids,
        texts=plots.token_texts(kept, tokenizer, len(ids)),
        token_bytes=[None if token >= tokenizer.bos_id else tokenizer.token_bytes(token) for token in ids],
        token_text=lambda token: plots.token_text(tokenizer, token),
        visible=plots.visible,
        matrices="int8" if isinstance(weights.output, Int8) else "",
        kept=kept,
        n=Numbers(kept, model, lens),
        layer=layer,
        head=head,
        kv_head=head // sharing,
        sharing=sharing,
        last=len(ids) - 1,
        at=at,
        before=before,
        shown=_SHOWN,
        pairs=plots.shown_pairs(params),
        hidden_units=kept[f"{at}feed_forward.hidden"][-1].float().abs().topk(5).indices.tolist(),
        lens=lens,
        top_ids=plots.likeliest(kept["logits"][-1], _TOP).tolist(),
        stop_ids=tokenizer.stop_ids,
        heads=heads_data(kept, params, layer),
        sources=sources(),
        figures=_pictures(kept, model, at, before, layer, head),
        style=(_PARTS / "style.css").read_text(encoding="utf-8") + syntax_colours(),
        script=(_PARTS / "page.js").read_text(encoding="utf-8"),
    )
