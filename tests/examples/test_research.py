"""examples/research/: every script runs, and its figures say what its first lines promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama3_raw import Model
from tests.paths import CACHE, EXAMPLES

pytestmark = pytest.mark.slow  # they run a model for up to a minute


def printed_by(script: str, folder: Path, *options: str) -> str:
    """Run a script as a reader does, with every warning an error, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "research" / script), *options],
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


@pytest.mark.exhaustive
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


def test_activation_patching(tmp_path: Path) -> None:
    """The animal moves from its own token to the last one, by one head."""
    printed = printed_by("activation_patching.py", tmp_path, "--picture", "heat.svg")
    cat, big = (figures(printed, rf"^ +{word} +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+$")[0] for word in ("cat", "big"))
    assert cat > 0.9
    assert big < 0.1
    assert "layer 2, head 4: 0.74; token 14 attends to ' dog'" in printed
    assert "<svg" in (tmp_path / "heat.svg").read_text()


def test_direct_attribution(tmp_path: Path) -> None:
    """The parts sum to the difference of the logits."""
    printed = printed_by("direct_attribution.py", tmp_path)
    whole, total = re.findall(r"^dog - cat: ([\d.]+); the sum of 9 parts: ([\d.]+)$", printed, re.M)[0]
    assert abs(float(whole) - float(total)) <= 0.002
    assert "layer 2, head 4 " in printed


def test_induction_heads(smollm2: Model, tmp_path: Path) -> None:
    """What repeats costs little, unless these heads are ablated."""
    del smollm2  # its file is there by now
    file = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
    printed = printed_by("induction_heads.py", tmp_path, str(file), "--picture", "scores.svg")
    whole, without, others = figures(printed, r"^(?:all|without) .* [\d.]+ +([\d.]+)$")
    assert whole < 4
    assert without > 3 * whole
    assert others < 1.5 * whole
    assert "layer 18, head 6: 0.90" in printed
    assert (tmp_path / "scores.svg").exists()
