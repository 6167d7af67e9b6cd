"""The example of attribution patching runs on the built-in model, and docs/patching.md states its figures."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from tests.paths import EXAMPLES, ROOT

SCRIPT = EXAMPLES / "research" / "attribution_patching.py"


def test_the_correlations_are_those_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "heads.png"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--picture", str(picture)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(SCRIPT), run_name="__main__")
    found = [float(value) for value in re.findall(r"correlation (\d\.\d+)", capsys.readouterr().out)]
    table = (ROOT / "docs" / "patching.md").read_text().split("| built-in model |")[1]
    stated = [float(value) for value in re.findall(r"^\|.*\| (\d\.\d+) \| \d\.\d+ \|$", table, re.M)]
    assert len(found) == 4
    assert found == pytest.approx(stated, abs=0.0015)
    assert picture.read_bytes().startswith(b"\x89PNG")
