"""examples/train_tiny.py, end to end in seconds: told stories, tokenizer, training, a folder that loads."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_tiny
from stories15m import Stories15M

import llama3_raw

SMALL = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 290 + 256, "multiple_of": 32}


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A language of three names, verbs and things: far fewer than the 8 bits per byte of a guess after 150 steps."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks) * 60 / 150)  # a minute of its time, however busy the machine
    monkeypatch.setattr(train_tiny, "time", clock)
    monkeypatch.setattr(train_tiny, "PARAMS_JSON", {**train_tiny.PARAMS_JSON, **SMALL})
    monkeypatch.setattr(train_tiny, "CONTEXT_LENGTH", 32)
    words = (["Lily", "Tom", "Mia"], ["found", "lost", "painted"], ["a big red ball", "the blue boat", "her kite"])
    stories = [f"{who} {did} {what}. The end." for who, did, what in itertools.product(*words)] * 10
    file, output = tmp_path / "stories.jsonl", tmp_path / "model"
    file.write_text("".join(json.dumps(story) + "\n" for story in stories))
    assert train_tiny.main(["--stories", str(file), "--minutes", "1", "--output", str(output)]) == 0
    bits = float(re.findall(r"held-out text: ([\d.]+) bits per byte", capsys.readouterr().out)[0])
    assert bits < 2
    model = llama3_raw.load(output)
    assert model.tokenizer is not None
    assert model.weights.norm.dtype == torch.bfloat16
    assert model.weights.output is model.weights.tok_embeddings


def test_stories_end_where_the_teacher_ends_them(teacher: Stories15M) -> None:
    stories = list(train_tiny.sample_stories(teacher, count=3, seed=0, at_once=6))
    assert len(stories) == 3
    for story in stories:
        assert len(story) > 100
        assert "<s>" not in story
        assert story.isprintable() or "\n" in story


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny.main(["--stories", str(tmp_path / "none.jsonl")]) == 2
    assert "give --stories15m" in capsys.readouterr().err
    not_the_package = tmp_path / "x.tgz"
    not_the_package.write_text("x")
    assert train_tiny.main(["--stories", str(tmp_path / "none"), "--stories15m", str(not_the_package)]) == 2
    assert "not the package of `npm pack" in capsys.readouterr().err
