"""examples/research/: every script runs, and its figures say what its first lines promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import EXAMPLES

pytestmark = pytest.mark.slow  # they run a model for up to a minute


def printed_by(script: str, folder: Path) -> str:
    """Run a script as a reader does, with every warning an error, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "research" / script)],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONIOENCODING": "utf-8", "MPLBACKEND": "agg"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(text: str, pattern: str) -> list[float]:
    """Return the numbers in the groups of every match."""
    return [float(number) for number in re.findall(pattern, text, re.M)]


def test_a_linear_probe(tmp_path: Path) -> None:
    """Attention brings what the embedding cannot know."""
    printed = printed_by("probe.py", tmp_path)
    base, embedding, *layers = figures(printed, r"([\d.]+)%$")
    assert len(layers) == 4
    assert embedding < base + 5
    assert layers[-1] > 97
    assert layers == sorted(layers)


def test_a_sparse_autoencoder(tmp_path: Path) -> None:
    printed = printed_by("sae.py", tmp_path)
    assert figures(printed, r"features a token: ([\d.]+)%")[0] > 75
    assert figures(printed, r"loss recovered: ([\d.]+)%")[0] > 90
    assert len(re.findall(r"^feature", printed, re.M)) == 8


def test_steering(tmp_path: Path) -> None:
    """The more of the direction, the happier."""
    odds = figures(printed_by("steering.py", tmp_path), r"^ +-?[\d.]+ +([+-][\d.]+)$")
    assert len(odds) == 5
    assert odds == sorted(odds)
    assert odds[0] < -3
    assert odds[-1] > 2
