"""examples/research/: induction heads and activation patching find what is known of the models."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from llama3_raw import Model
from tests.paths import CACHE, EXAMPLES

pytestmark = pytest.mark.slow


def printed_by(
    script: str, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a script as a reader does, with every warning an error and a picture, and return what it prints."""
    picture = folder / "picture.png"
    file = EXAMPLES / "research" / script
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(file), model, "--picture", str(picture)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(file), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out


def numbers(text: str, after: str) -> list[float]:
    """The numbers of the first line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(after))
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*", line.removeprefix(after))]


def test_smollm2_copies_with_induction_heads(
    smollm2: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fixture fetches the file."""
    file = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
    text = printed_by("induction_heads.py", str(file), tmp_path, monkeypatch, capsys)
    assert numbers(text, "induction heads:")[1] > 80  # %, of the first
    first, second = numbers(text, "loss:")
    assert second < first / 4
    (without,) = numbers(text, "  without these induction heads:")
    (without_others,) = numbers(text, "  without as many others")
    assert without > second + 4
    assert without_others < second + 1


def test_the_built_in_model_copies_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed_by("induction_heads.py", "tiny", tmp_path, monkeypatch, capsys)
    assert numbers(text, "induction heads:")[1] < 5  # %, as the docstring says


def test_activation_patching_follows_the_animal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed_by("activation_patching.py", "tiny", tmp_path, monkeypatch, capsys)
    clean, corrupted = numbers(text, "cat - dog:")
    assert clean > 1
    assert corrupted < -1
    at_animal, at_end = numbers(text, "' dog'"), numbers(text, "' the'")
    assert at_animal == sorted(at_animal, reverse=True)  # the animal's position first, the last one in the end
    assert at_animal[0] == at_end[-1] == 100
    assert at_animal[-1] == at_end[0] == 0
