"""The table of examples/measure_quantization.py, with few tokens."""

from __future__ import annotations

import sys

import measure_quantization
import pytest

from llama3_raw.decoding import calibration
from tests.paths import TINY


@pytest.mark.slow
def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """More bits lose less, and calibration loses less than rounding to the nearest."""
    for name, value in {"N_TOKENS": 1024, "_LENGTH": 64}.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(sys, "argv", ["measure_quantization.py", str(TINY)])
    measure_quantization.main()
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "tiny: 1,024 tokens to calibrate with, 1,024 measured"
    divergence = {row[:38].strip(): float(row[44:].split("±")[1].split()[1]) for row in rows}
    order = ["Q8_0", "int8", "int4, calibrated", "int4", "Q4_0"]
    assert order == sorted(order, key=lambda name: divergence[name])
    assert divergence["int4"] < divergence["int4, activations in 8 bits"] < 1.2 * divergence["int4"]
    assert "output matrix alone: int4" in divergence
