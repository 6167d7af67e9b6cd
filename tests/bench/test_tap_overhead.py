"""The cost of taps and traces: what is compared, and how it is printed. No time is limited."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from torch import Tensor

from llama3_raw import REFERENCE, KVCache, Model, forward, trace
from llama3_raw.bench.__main__ import main
from llama3_raw.bench.engines import random_ids
from llama3_raw.bench.tap_overhead import model_without_taps
from tests.paths import TINY


def test_model_without_taps_is_the_same_model(tiny: Model) -> None:
    """It never calls its tap, and its logits have the same bits."""
    without_taps = model_without_taps()

    def never(name: str, tensor: Tensor) -> Tensor:
        raise AssertionError(f"a tap is left at {name}")

    tokens = torch.tensor(random_ids(tiny, 9))
    with torch.no_grad():
        expected = forward(tiny.weights, tiny.params, tokens)
        for ops in (without_taps.REFERENCE, REFERENCE._replace(attend=without_taps.attend)):
            assert torch.equal(without_taps.forward(tiny.weights, tiny.params, tokens, ops=ops, tap=never), expected)
        cache = KVCache.allocate(tiny.params, max_seq_len=9, like=tiny.weights)
        for i, token in enumerate(tokens.split(1)):
            logits = without_taps.forward(tiny.weights, tiny.params, token, cache=cache, start=i, tap=never)
    assert logits.shape == (1, 2304)
    assert int(logits.argmax()) == int(expected[-1].argmax())


def test_table(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(TINY), "--taps", "--rounds", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert len(table) == 5
    names = ("default_tap_prompt", "default_tap_token", "trace")
    for line, cost in zip(table, (figures[name] for name in names), strict=False):
        assert len(cost["ratios"]) == 3
        assert cost["ratio"] == statistics.median(cost["ratios"])
        assert 0 < cost["plain_seconds"] < 60
        assert f"{cost['ratio']:.4f} times as long as {cost['plain_seconds']:.4f} s" in line
    assert figures["trace_bytes"] == trace(tiny, random_ids(tiny, 17)).nbytes
    assert abs(figures["default_tap_seconds"]) < 0.1
    assert figures["threads"] == torch.get_num_threads()


def test_tap_that_changes_something_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llama3_raw.bench.tap_overhead.forward.__kwdefaults__",
        {**(forward.__kwdefaults__ or {}), "tap": lambda n, x: x * 2},
    )
    with pytest.raises(AssertionError, match="a tap should change nothing"):
        main(["--weights", str(TINY), "--taps", "--rounds", "1"])


@pytest.mark.parametrize("other", [["--vs", "transformers"], ["--contexts", "5"], ["--max-ram", "2GB"]])
def test_options_of_other_measurements_are_refused(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(TINY), "--taps", *other]) == 2
    assert f"--taps measures something else; leave {other[0]} out" in capsys.readouterr().err
