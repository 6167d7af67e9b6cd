"""Perplexity against Hugging Face's, in any chunks; and the command."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama3_raw import REFERENCE, Model, UserError, perplexity
from llama3_raw.perplexity import Score, main, sliding_windows
from tests.paths import TINY
from tests.references import cast, converted, hf_model

STORY = """Once upon a time, there was a little girl named Lily. She had a red ball, and she took it to the park – every
day. One day, a big dog came and ran away with the ball! Lily was sad. She sat down under a tree and cried. A boy named
Tom saw her. "Why are you sad?" he asked. "The dog has my ball," said Lily. Tom had an idea. He gave the dog a bone,
and the dog dropped the ball. Lily said "thank you", and they all played together until it was time for dinner.
"""


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode(STORY, bos=True)


def score_by_hf(model: Any, ids: list[int], context: int, stride: int) -> Score:
    """Score with the loop of Hugging Face's guide (huggingface.co/docs/transformers/perplexity), with its loss.

    Each window's mean is weighted by its number of scored tokens; the guide uses one less.
    """
    tokens = torch.tensor([ids])
    nats, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = tokens[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                nats += model(tokens[:, begin:end], labels=labels).loss.item() * scored
            count += scored
        previous_end = end
        if end == len(ids):
            break
    return Score(count, nats)


# the text has 131 tokens: fewer than a window, exactly one window, not a multiple of the stride, one left over (65)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("context", "stride"), [(512, 256), (131, 60), (130, 65), (65, 65), (50, 50), (50, 17), (40, 39), (20, 1), (2, 1)]
)
def test_the_same_as_hugging_face(fp32: Model, ids: list[int], context: int, stride: int) -> None:
    assert len(ids) == 131
    expected = score_by_hf(hf_model(fp32.params, fp32.weights), ids, context, stride)
    score = perplexity.perplexity(fp32, ids, context=context, stride=stride)
    assert score.tokens == expected.tokens
    assert score.nats_per_token == pytest.approx(expected.nats_per_token, abs=1e-5)
    assert score.perplexity == pytest.approx(expected.perplexity, abs=1e-3)


@pytest.mark.parametrize(("length", "context", "stride"), [(127, 20, 7), (127, 20, 19), (127, 20, 20), (5, 20, 10)])
def test_each_token_is_scored_once(length: int, context: int, stride: int) -> None:
    """Except the first of the text, or of every window if they do not overlap."""
    windows = list(sliding_windows(length, context, stride))
    assert all(window.begin < window.first and window.end - window.begin <= context for window in windows)
    assert len({window.end for window in windows}) == len(windows)  # none is redundant
    scored = [position for window in windows for position in range(window.first, window.end)]
    assert scored == [position for position in range(length) if position % (stride if stride == context else length)]


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_do_not_change_the_score(
    fp32: Model, ids: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity.perplexity(fp32, ids, context=60, stride=25, ops=REFERENCE)
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    chunked = perplexity.perplexity(fp32, ids, context=60, stride=25, ops=REFERENCE)
    assert chunked.tokens == 130
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-6)


def test_definitions_of_the_figures() -> None:
    score = Score(tokens=4, nats=4 * math.log(8))
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_byte(24) == pytest.approx(0.5)
    assert Score(tokens=1, nats=1e4).perplexity == math.inf


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, Any], str]:
    """Run the command. Return its table, its JSON and its stderr."""
    assert main(["--weights", str(TINY), "--device", "cpu", *arguments]) == 0
    captured = capsys.readouterr()
    *table, last = captured.out.splitlines()
    return table, json.loads(last), captured.err


def test_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Model, ids: list[int]
) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY, encoding="utf-8")
    score = perplexity.perplexity(tiny, ids)
    table, figures, err = call(capsys, str(file))
    assert figures == {
        "tokens": 130,
        "nats": score.nats,
        "nats_per_token": score.nats / 130,
        "perplexity": math.exp(score.nats / 130),
        "bits_per_byte": pytest.approx(score.nats / math.log(2) / len(file.read_bytes())),
        "context": 512,
        "stride": 256,
    }
    shown = " ".join(" ".join(table).split())
    assert shown == (
        f"tokens scored 130 in windows of 512, 256 apart nats {score.nats:.2f} nats per token "
        f"{score.nats_per_token:.4f} perplexity {score.perplexity:.4f} bits per byte {figures['bits_per_byte']:.4f}"
    )
    assert "| 0/130 [" in err  # the progress bar counts the tokens
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert call(capsys, "-")[1] == figures
    exact = call(capsys, str(file), "--reference")[1]
    assert exact["nats"] == perplexity.perplexity(tiny, ids, ops=REFERENCE).nats


def test_only_the_bytes_of_scored_tokens_count(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Model, ids: list[int]
) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY, encoding="utf-8")
    figures = call(capsys, str(file), "--context", "65", "--stride", "65")[1]
    assert tiny.tokenizer is not None
    left_out = sum(len(tiny.tokenizer.token_bytes(ids[position])) for position in (65, 130))
    n_bytes = len(file.read_bytes()) - left_out
    assert figures["bits_per_byte"] == pytest.approx(figures["nats"] / math.log(2) / n_bytes)


def test_ids(capsys: pytest.CaptureFixture[str], tmp_path: Path, ids: list[int]) -> None:
    """Ids are used as given, without BOS, and have no bytes."""
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    from_text = call(capsys, str(tmp_path / "story.txt"), "--context", "30", "--stride", "10")[1]
    table, figures, _ = call(capsys, str(tmp_path / "ids.json"), "--ids", "--context", "30", "--stride", "10")
    assert figures == {**from_text, "bits_per_byte": None}
    assert len(table) == 4


def test_damaged_weights(fp32: Model, ids: list[int]) -> None:
    damaged = fp32._replace(weights=converted(fp32.weights, lambda tensor: tensor * torch.nan))
    with pytest.raises(UserError, match="the weights are damaged"):
        perplexity.perplexity(damaged, ids)


def test_windows_of_llama_cpp(fp32: Model, ids: list[int]) -> None:
    """The second half of windows of 40 is scored, each of which begins with BOS in place of its own first token."""
    hf = hf_model(fp32.params, fp32.weights)
    losses = []
    for begin in range(0, 120, 40):
        window = torch.tensor([ids[0], *ids[begin + 1 : begin + 40]])
        with torch.no_grad():
            logits = hf(window.unsqueeze(0)).logits[0]
        losses += torch.nn.functional.cross_entropy(logits[20:-1], window[21:], reduction="none").tolist()
    score = perplexity.perplexity(fp32, ids, context=40, windows="llama.cpp")
    assert score.tokens == len(losses) == 57
    assert score.nats == pytest.approx(sum(losses), abs=1e-3)


def test_windows_of_llama_cpp_by_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ids: list[int]
) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY, encoding="utf-8")
    figures = call(capsys, str(file), "--windows", "llama.cpp", "--context", "65")[1]
    assert (figures["tokens"], figures["windows"]) == (64, "llama.cpp")
    assert main(["--weights", str(TINY), "--device", "cpu", str(file), "--windows", "llama.cpp"]) == 2  # 131 < 512
    assert "the context is 512, the text has 131 tokens" in capsys.readouterr().err
