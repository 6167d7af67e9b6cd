"""The report of a comparison: a table and its verdict on the terminal, as JSON, or as a page of HTML."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from ..system.files import atomic_write
from ..tracing.names import FIRST
from ..tracing.taps import Patterns
from .comparison import Comparison, Step
from .difference import TOP_K, Logits, Measured
from .rounding import Limits

_PAGE = Path(__file__).with_name("report.html")


def show(comparison: Comparison, patterns: Sequence[str] = ()) -> None:
    """Print a table: one line for each layer, or for each tensor that matches a pattern."""
    wanted = Patterns(patterns)
    names = {name for name in comparison.made if wanted.matching(name)}
    lines = [[step] for step in comparison.steps if step.name in names] if patterns else _by_layer(comparison.steps)
    width = max([9, *(len(steps[0].name) for steps in lines)]) if patterns else 9
    at = 2 if patterns else 21
    print(f"{'':{width}}{'end to end':>27}{'':{at}}{'each step alone':>22}")
    figures, place = f"{'relative':>9}{'rounding':>9}", "" if patterns else f"  {'at':<19}"
    print(f"{'':{width}}{'absolute':>9}{figures}{place}  {figures}{place}".rstrip())
    for steps in lines:
        absolute = max(step.whole.absolute for step in steps)
        whole = max(steps, key=lambda step: step.whole.relative)
        own = max(steps, key=lambda step: step.excess)
        label = steps[0].name if patterns else _layer_of(steps[0].name)
        both = f"{absolute:9.1e}{whole.whole.relative:9.1e}{whole.rounding_end_to_end:9.1e}{_at(whole, place)}"
        figure, rounding = own.telling
        each = f"{figure:9.1e}{rounding:9.1e}{_at(own, place).rstrip()}{' *' if own.diverges else ''}"
        print(f"{label:{width}}{both}  {each}")
    if comparison.diverged:
        print("* more than rounding explains")
    for what, mean, last in _of_logits(comparison.logits):
        print(f"{what:<36}{mean:>12}{last:>12}")


def _of_logits(logits: Logits | None) -> list[tuple[str, str, str]]:
    """Return the lines of the table of the logits, with its header."""
    if logits is None:
        return []
    last = "yes" if logits.same_likeliest_last else "no"
    return [
        ("logits", "mean", "last"),
        (f"top {TOP_K} tokens in common", f"{logits.top_k:.1%}", f"{logits.top_k_last:.1%}"),
        ("same most likely token", f"{logits.same_likeliest:.1%}", last),
        ("KL divergence, nats", f"{logits.kl:.2e}", f"{logits.kl_last:.2e}"),
    ]


def _at(step: Step, place: str) -> str:
    """Return the name within its layer, if the table has a column for it."""
    return f"  {_short(step):<{len(place) - 2}}" if place else ""


def _short(step: Step) -> str:
    return re.sub(r"layers\.\d+\.", "", step.name)


def _layer_of(name: str) -> str:
    if name.startswith("layers."):
        return f"layer {name.split('.')[1]}"
    return "embedding" if name == FIRST else name


def _by_layer(steps: Sequence[Step]) -> list[list[Step]]:
    layers: dict[str, list[Step]] = {}
    for step in steps:
        layers.setdefault(_layer_of(step.name), []).append(step)
    return list(layers.values())


def save_json(file: str, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON."""
    with atomic_write(file) as part:
        Path(part).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def figures_of_steps(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the figures of every tensor, to be saved as JSON; infinite ones are None."""
    return [
        {
            "name": step.name,
            "diverges": step.diverges,
            "unlike": step.own.unlike,
            "end_to_end": _figures(step.whole_measured, step.whole_limits),
            "alone": _figures(step.own_measured, step.own_limits),
        }
        for step in comparison.steps
    ]


def _figures(found: Measured, limits: Limits) -> dict[str, float | None]:
    """Return the figures of a difference, and what rounding explains."""
    figures = {"absolute": found.difference.absolute}
    for kind, figure, limit in zip(("rows", "row", "value"), found.figures, limits, strict=True):
        figures |= {kind: figure, f"{kind}_rounding": limit}
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


def save_html(file: str, comparison: Comparison, verdict: str, about: Mapping[str, str]) -> None:
    """Write a page that needs nothing else: the verdict, a map of all tensors, and a table of their figures.

    about: what was compared with what, as terms and their values.
    """
    opening, _, rest = verdict.partition("\n")
    columns, cells = _map(comparison)
    text = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(opening.split(".")[0] if comparison.agree else opening),
        state="good" if comparison.agree else "bad",
        opening=html.escape(opening),
        rest="".join(f"<li>{html.escape(line)}</li>" for line in rest.splitlines()),
        about="".join(f"<div><dt>{html.escape(t)}</dt><dd>{html.escape(d)}</dd></div>" for t, d in about.items()),
        columns=columns,
        cells=cells,
        logits="".join(
            f"<tr><th>{what}</th><td>{mean}</td><td>{last}</td></tr>"
            for what, mean, last in _of_logits(comparison.logits)
        )
        or "<tr><td>The other run has no logits.</td></tr>",
        rows="".join(_row(step) for step in comparison.steps),
    )
    with atomic_write(file) as part:
        Path(part).write_text(text, encoding="utf-8")


def _map(comparison: Comparison) -> tuple[str, str]:
    """Return the head and the rows of the map: a row for each tensor of a layer, a column for each layer."""
    by_name = {step.name: step for step in comparison.steps}
    layered = [name for name in comparison.made if name.startswith("layers.")]
    layers = sorted({int(name.split(".")[1]) for name in layered})
    shorts = dict.fromkeys(name.split(".", 2)[2] for name in layered)
    tops = [
        f"<tr><th>{html.escape(name)}</th>{_cell(by_name.get(name))}</tr>"
        for name in comparison.made
        if not name.startswith("layers.")
    ]
    head = "<th></th>" + "".join(f"<th>{layer}</th>" for layer in layers)
    rows = [
        f"<tr><th>{html.escape(short)}</th>"
        + "".join(_cell(by_name.get(f"layers.{layer}.{short}")) for layer in layers)
        + "</tr>"
        for short in shorts
    ]
    before = 1 if next(iter(comparison.made)) == FIRST else len(tops) - 1  # gradients go back
    return head, "\n".join([*tops[:before], *rows, *tops[before:]])


def _cell(step: Step | None) -> str:
    """Return a cell of the map, darker the more of what rounding explains the step alone differs by."""
    if step is None:
        return '<td class="none"></td>'
    times = min(step.excess, 1e9)
    shade = 0 if times == 0 else round(max(6, min(100, 100 * times)))
    label = f"{step.name}: {times:.2g} times what rounding explains"
    mark = "✕" if step.diverges else ""
    kind = "bad" if step.diverges else "ok"
    return f'<td class="{kind}" style="--p:{shade}%" title="{html.escape(label)}">{mark}</td>'


def _row(step: Step) -> str:
    figures = [step.whole.absolute, step.whole.relative, step.rounding_end_to_end, *step.telling]
    kind = {"row": "worst row", "value": "worst value", "rows": "all rows"}[step.kind]
    return (
        f"<tr{' class=bad' if step.diverges else ''}><th>{html.escape(step.name)}</th>"
        + "".join(f"<td>{figure:.1e}</td>" for figure in figures)
        + f"<td>{kind}</td></tr>"
    )
