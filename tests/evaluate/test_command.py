"""--score, and what the command refuses, without lm-eval."""

from __future__ import annotations

import builtins
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llama3_raw import Model, score
from llama3_raw.evaluate.__main__ import main
from tests.paths import TINY

LINES = [
    {"prompt": "Once upon a time", "continuations": [", there was a little girl", " a dog"]},
    {"prompt": "One day ", "continuations": ["Tom"]},
    {"prompt": [2048, 5], "continuations": [[6], [7, 8]]},
    {"prompt": "There was a lit", "continuations": ["tle"]},
]


def call(*arguments: str) -> int:
    return main([*arguments, "--weights", str(TINY), "--device", "cpu"])


def test_score(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model
) -> None:
    content = "".join(json.dumps(line) + "\n\n" for line in LINES)
    (tmp_path / "prompts.jsonl").write_text(content)
    assert call("--score", str(tmp_path / "prompts.jsonl")) == 0
    shown = capsys.readouterr().out
    first, second, third, fourth = (json.loads(line)["scores"] for line in shown.splitlines())
    assert tiny.tokenizer is not None
    encode = tiny.tokenizer.encode
    prompt = encode("Once upon a time", bos=True)
    by_hand = score(tiny, prompt, [encode(", there was a little girl"), encode(" a dog")])
    assert [one["logprobs"] for one in first] == [one.logprobs for one in by_hand]
    assert [one["logprob"] for one in first] == [one.total for one in by_hand]
    assert [one["is_greedy"] for one in first] == [True, False]
    assert second[0]["tokens"] == encode(" Tom")  # the space goes to the continuation
    assert [one["tokens"] for one in third] == [[6], [7, 8]]
    assert encode(" lit") + encode("tle") != encode(" little")
    assert fourth[0]["tokens"] == encode("tle")  # not what is left of " little" after the prompt's tokens
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert call("--score", "-") == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}', 'line 1: should be {"prompt"'),
        ('{"prompt": "a", "continuations": []}', "continuations a list of texts"),
        ('{"prompt": "a", "continuations": [""]}', "no continuation empty"),
        ('{"prompt": "a", "continuations": [[1]]}', "or all of them lists of token ids"),
        ('{"prompt": [], "continuations": [[1]]}', "line 1: the prompt is empty"),
        ('{"prompt": [1], "continuations": [[9999]]}', "line 1: token id 9999"),
    ],
)
def test_bad_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(line)
    assert call("--score", str(tmp_path / "prompts.jsonl")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --tasks NAMES, --compare-to WEIGHTS TEXT, or --score FILE"),
        (("text.txt",), "give --tasks NAMES"),
        (("--compare-to", "tiny"), "give --tasks NAMES"),
        (("--tasks", "a", "--score", "b"), "give --tasks NAMES"),
        (("--tasks", "a", "--system", "b"), "--system belongs to --chat"),
        (("--score", "a", "-o", "b"), "--output belongs to --tasks; leave it out"),
        (("--score", "a", "--context", "9"), "--context belongs to --tasks or --compare-to"),
        (("--compare-to", "a", "b", "--batch-size", "2"), "--batch-size belongs to --tasks"),
        (("--tasks", "a", "--windows", "llama.cpp"), "--windows belongs to --compare-to"),
        (("--tasks", ","), "--tasks ,: names no task"),
        (("--tasks", "a", "--num-fewshot", "-1"), "--num-fewshot should be 0 or more, is -1"),
        (("--compare-to", "lost", "no.txt"), "no.txt: cannot be read"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err


def test_without_lm_eval(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def missing(name: str, *arguments: Any, **settings: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(f"No module named {name!r}")
        return genuine(name, *arguments, **settings)

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(builtins, "__import__", missing)
    for arguments in (["--tasks", "hellaswag"], ["lm_eval", "--help"]):
        assert main(arguments) == 2
        assert "needs the package lm_eval" in capsys.readouterr().err
