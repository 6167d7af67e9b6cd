"""The table of a report: its results by phase, next to what was aimed at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

H200_COPY = 4300.0  # GB/s read and written, measured on an H200; targets are for this card

Row = Mapping[str, Any]
"""A line of report.jsonl: phase and name, value and unit; or phase and status."""


class Target(NamedTuple):
    """What a result should be at least, or at most."""

    value: float
    is_least: bool
    depends_on_memory: bool = True  # scaled by the card's copy


TARGETS: dict[tuple[str, str], Target] = {
    ("decode", "graph, context 17"): Target(250, True),
    ("decode", "graph, context 4096"): Target(240, True),
    ("prefill", "fast operations, 2048 tokens"): Target(60, False, depends_on_memory=False),
    ("correctness", "tests failed"): Target(0, False, depends_on_memory=False),
    ("files", "start to first token, the second time"): Target(10, False, depends_on_memory=False),
    ("memory", "growth over 10000 tokens"): Target(0, False, depends_on_memory=False),
}
# results that should be a multiple of another: (phase, name) -> (factor, phase, beginning of its name)
MULTIPLES = {
    ("int8", "graph, context 17"): (1.6, "decode", "graph, context 17"),
    ("int4", "graph, context 17"): (2.5, "decode", "graph, context 17"),
    ("decode", "graph, context 17"): (3.0, "transformers-compiled", "transformers"),
}


def render(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """Return the table of the rows that are no details; titles by phase."""
    copy = next((row["value"] for row in rows if row.get("name") == "copy, read and written"), None)
    lines: list[str] = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        own = [row for row in rows if row["phase"] == phase]
        status = next((row["status"] for row in own if "status" in row), "running")
        lines += ["", f"{phase}: {titles.get(phase, '')} ({status})"]
        lines += [_line(row, copy) for row in own if "name" in row and not row.get("is_detail")]
        details = Counter(row["value"] for row in own if row.get("is_detail") and isinstance(row["value"], str))
        lines += [f"  and {count} results: {value}" for value, count in details.items()]
    return "\n".join([*lines, "", *_multiples(rows)]).strip() + "\n"


def _line(row: Row, copy: float | None) -> str:
    value = row["value"]
    text = f"  {row['name']:<64} {shown(value):>10} {row['unit']:<9}"
    target = TARGETS.get((row["phase"], row["name"]))
    if target is None or isinstance(value, str):
        return text.rstrip()
    scale = copy / H200_COPY if copy and target.depends_on_memory else 1.0
    wanted = target.value * scale
    met = value >= wanted if target.is_least else value <= wanted
    return f"{text} {'≥' if target.is_least else '≤'} {shown(wanted)}: {'met' if met else 'NOT MET'}"


def _multiples(rows: Sequence[Row]) -> list[str]:
    """Return a line for each result that should be a multiple of another, if both are there."""
    values = {(row["phase"], row["name"]): row["value"] for row in rows if "name" in row}
    lines = []
    for (phase, name), (factor, other_phase, other) in MULTIPLES.items():
        ours = values.get((phase, name))
        context = name.rpartition(", ")[2]
        theirs = [v for (p, n), v in values.items() if p == other_phase and n.startswith(other) and n.endswith(context)]
        if ours and theirs and not isinstance(ours, str):
            ratio = ours / max(theirs)
            verdict = "met" if ratio >= factor else "NOT MET"
            lines.append(f"{phase}, {name}: {ratio:.2f} x {other_phase}, ≥ {factor}: {verdict}")
    return lines


def shown(value: float | str) -> str:
    """Return a number with four digits, and text as it is."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"
