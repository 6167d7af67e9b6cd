"""The divergence of two models: against plain formulas, against llama.cpp's definitions, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from llama3_raw import Model, UserError, convert
from llama3_raw.evaluate.__main__ import main
from llama3_raw.evaluate.divergence import Estimate, correlation, divergence, figures, measure, percentiles
from llama3_raw.model import REFERENCE
from llama3_raw.perplexity import perplexity
from tests.paths import TINY
from tests.references import cast, quantized_weights
from tests.test_perplexity import STORY


@pytest.fixture(scope="module")
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, vocab] of a model and of its base, and the right tokens, more often likely ones."""
    generator = torch.Generator().manual_seed(0)
    base = 3 * torch.randn(300, 500, generator=generator)
    targets = torch.multinomial(base.softmax(-1), 1, generator=generator)[:, 0]
    return base + 0.3 * torch.randn(base.shape, generator=generator), base, targets


class Stored(NamedTuple):
    """A position in the file of `llama-perplexity --kl-divergence-base`: log q = scale * levels + lowest."""

    scale: np.float32
    lowest: np.float32
    levels: np.ndarray  # uint16 [vocab]


def stored(logits: np.ndarray) -> Stored:
    """Round as llama.cpp does: 65,535 steps between the largest logit and the smallest, or 16 below the largest."""
    highest, lowest = logits.max(), max(logits.min(), logits.max() - np.float32(16))
    scale = (highest - lowest) / np.float32(65535)
    levels = np.where(logits > lowest, np.rint((logits - lowest) / scale), 0).astype(np.uint16)
    return Stored(scale, lowest - highest - np.float32(np.log(np.exp(logits - highest).sum())), levels)


def by_llama_cpp(logits: Tensor, base: Tensor, targets: Tensor) -> dict[str, float]:
    """The figures of `llama-perplexity --kl-divergence`, from the sums that it keeps."""
    nats, base_nats, kl, change, top = [], [], [], [], []
    for row, base_row, target in zip(logits.numpy(), base.numpy(), targets.tolist(), strict=True):
        scale, lowest, levels = stored(base_row)
        logq = scale * levels.astype(np.float32) + lowest
        logp = row - row.max() - np.float32(np.log(np.exp(row - row.max()).sum()))
        kept = logq > -16
        kl.append(float((np.exp(logq[kept]) * (logq[kept] - logp[kept])).sum()))
        nats.append(float(-logp[target]))
        base_nats.append(float(-logq[target]))
        change.append(math.exp(-nats[-1]) - math.exp(-base_nats[-1]))
        top.append(row.argmax() == logq.argmax())
    n = len(kl)

    def mean(values: list[float]) -> tuple[float, float]:
        average = sum(values) / n
        return average, math.sqrt((sum(value**2 for value in values) / n - average**2) / (n - 1))

    (log, log_error), (base_log, base_error) = mean(nats), mean(base_nats)
    covariance = (sum(a * b for a, b in zip(nats, base_nats, strict=True)) / n - log * base_log) / (n - 1)
    square, square_error = mean([value**2 for value in change])
    return {
        "ppl": math.exp(log),
        "ppl error": math.exp(log) * log_error,
        "ratio": log - base_log,
        "ratio error": math.sqrt(log_error**2 + base_error**2 - 2 * covariance),
        "difference error": math.sqrt(
            (math.exp(log) * log_error) ** 2
            + (math.exp(base_log) * base_error) ** 2
            - 2 * math.exp(log) * math.exp(base_log) * covariance
        ),
        "correlation": covariance / (log_error * base_error),
        "kl": mean(kl)[0],
        "kl error": mean(kl)[1],
        "change": mean(change)[0],
        "change error": mean(change)[1],
        "rms": math.sqrt(square),
        "rms error": 0.5 / math.sqrt(square) * square_error,
        "top": sum(top) / n,
        "top error": math.sqrt(sum(top) / n * (1 - sum(top) / n) / (n - 1)),
        "median": float(np.median(kl)),
        "p99": sorted(kl)[int(0.99 * (n - 1))],
    }


def test_the_figures_of_llama_cpp_on_the_same_logits(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    """Up to its 16 bits: a step is at most 16/65,535 nats, so a log-probability is off by at most 1.3e-4."""
    theirs = by_llama_cpp(*logits)
    found = divergence(*logits)
    ours = figures(found)
    for name, key in [
        ("perplexity", "ppl"),
        ("KL divergence", "kl"),
        ("change of p", "change"),
        ("RMS change of p", "rms"),
        ("same top token", "top"),
        ("ln(perplexity / base)", "ratio"),
    ]:
        assert ours[name].value == pytest.approx(theirs[key], rel=1e-3, abs=2e-4), name
        assert ours[name].error == pytest.approx(theirs[f"{key} error"], rel=1e-3, abs=2e-5), name
    assert ours["perplexity - base"].error == pytest.approx(theirs["difference error"], rel=1e-3)
    assert correlation(found) == pytest.approx(theirs["correlation"], abs=1e-4)
    assert percentiles(found.kl)[50] == pytest.approx(theirs["median"], rel=1e-3, abs=1e-4)
    assert percentiles(found.kl)[99] == pytest.approx(theirs["p99"], rel=0.05)


def test_plain_formulas(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    model, base, targets = (tensor[:50] for tensor in logits)
    found = divergence(model, base, targets)
    kl = torch.nn.functional.kl_div(
        model.double().log_softmax(-1), base.double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert found.kl == pytest.approx(kl.sum(-1).numpy(), abs=1e-12)
    p, q = (tensor.double().softmax(-1)[range(50), targets].numpy() for tensor in (model, base))
    assert found.nats == pytest.approx(-np.log(p))
    assert found.base_nats == pytest.approx(-np.log(q))
    assert found.p_change == pytest.approx(p - q)


def test_a_model_and_itself(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    found = divergence(logits[1], logits[1], logits[2])
    ours = figures(found)
    assert ours["KL divergence"] == ours["RMS change of p"] == ours["ln(perplexity / base)"] == (0, 0)
    assert ours["same top token"] == (1, 0)
    assert correlation(found) == pytest.approx(1)


@pytest.mark.parametrize("windows", ["sliding", "llama.cpp"])
def test_both_perplexities(tiny: Model, windows: str) -> None:
    """The comparison's perplexities are those of the command perplexity, in the same windows."""
    assert tiny.tokenizer is not None
    base = tiny._replace(weights=cast(tiny.weights, torch.float32))
    model = base._replace(weights=quantized_weights(base.weights, "int4"))
    ids = tiny.tokenizer.encode(STORY, bos=True)
    found = measure([(model, REFERENCE), (base, REFERENCE)], ids, context=50, windows=windows)  # type: ignore[arg-type]
    ours = figures(found)
    for name, one in (("perplexity", model), ("base perplexity", base)):
        alone = perplexity(one, ids, context=50, windows=windows, ops=REFERENCE)  # type: ignore[arg-type]
        assert alone.tokens == len(found.kl)
        assert ours[name].value == pytest.approx(alone.perplexity, rel=1e-5)
    assert 0 < ours["KL divergence"].value < 1


def test_other_vocabulary(tiny: Model) -> None:
    other = tiny._replace(params=dataclasses.replace(tiny.params, vocab_size=7))
    with pytest.raises(UserError, match="have 2304 and 7 tokens"):
        measure([(tiny, REFERENCE), (other, REFERENCE)], [1, 2, 3])


def test_other_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of the same size, where the tokens " a" and " t" have changed places."""
    other, file = tmp_path / "other", tmp_path / "story.txt"
    file.write_text(STORY, encoding="utf-8")
    shutil.copytree(TINY, other)
    tokens = (other / "tokenizer.model").read_text()
    swapped = {"IGE= ": "IHQ= ", "IHQ= ": "IGE= "}  # in base64
    (other / "tokenizer.model").write_text(re.sub("^(IGE=|IHQ=) ", lambda found: swapped[found[0]], tokens, flags=re.M))
    assert main(["--weights", str(TINY), "--compare-to", str(other), "--device", "cpu", str(file)]) == 2
    assert "other: its tokenizer gives other tokens" in capsys.readouterr().err


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY, encoding="utf-8")
    options = ["--weights", str(TINY), "--quantize", "int8", "--compare-to", str(TINY), "--device", "cpu"]
    assert main([*options, str(file)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["tokens"] == 130
    assert 0 < found["KL divergence"]["value"] < 0.01
    assert found["KL percentiles"]["99"] > found["KL percentiles"]["50"] > 0
    assert any(line.split()[:2] == ["KL", "divergence"] for line in table)
    same = [option for option in options if option not in ("--quantize", "int8")]
    assert main([*same, str(file), "--windows", "llama.cpp", "--context", "40"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 3 * 19
    assert found["KL divergence"]["value"] == 0


def rounded(matrix: Tensor) -> Tensor:
    """Return a matrix with 15 values in each row, in fp32: llama.cpp multiplies by it as it is."""
    step = matrix.float().abs().amax(-1, keepdim=True) / 7
    return (matrix.float() / step).round() * step


def shown_by_llama_cpp(out: str, name: str) -> Estimate:
    """Return a figure of the tables at the end, and its standard error, which is 0 where there is none."""
    found = re.search(rf"^{re.escape(name)} *: *(\S+?)%?(?: ± +(\S+))?(?: %)?$", out, re.MULTILINE)
    assert found is not None, name
    return Estimate(float(found[1]), float(found[2] or 0))


def test_llama_cpp_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both programs, from the files on: 5e-4 of a figure are llama.cpp's 16 bits, and 1e-4 its rounding in fp32."""
    program = shutil.which("llama-perplexity")
    if program is None:
        pytest.skip("llama.cpp's llama-perplexity is not on the PATH")
    shutil.copytree(TINY, tmp_path / "rounded")
    state = torch.load(TINY / "consolidated.00.pth")
    state = {name: rounded(weight) if weight.dim() > 1 else weight.float() for name, weight in state.items()}
    torch.save(state, tmp_path / "rounded" / "consolidated.00.pth")
    base, model, text = tmp_path / "base.gguf", tmp_path / "rounded.gguf", tmp_path / "text.txt"
    for source, target in ((TINY, base), (tmp_path / "rounded", model)):
        assert convert.main([str(source), str(target), "--outtype", "f32"]) == 0
    text.write_text(STORY * 3, encoding="utf-8")
    shared = ["-f", str(text), "--kl-divergence-base", str(tmp_path / "logits"), "-c", "64", "-b", "64", "-t", "1"]
    shared += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    subprocess.run([program, "-m", str(base), *shared], check=True, capture_output=True)
    command = [program, "-m", str(model), *shared, "--kl-divergence"]
    theirs = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    capsys.readouterr()
    options = ["--windows", "llama.cpp", "--context", "64", "--device", "cpu"]
    assert main(["--weights", str(model), "--compare-to", str(base), *options, str(text)]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, their_name, unit in [
        ("perplexity", "Mean PPL(Q)", 1),
        ("base perplexity", "Mean PPL(base)", 1),
        ("ln(perplexity / base)", "Mean ln(PPL(Q)/PPL(base))", 1),
        ("perplexity / base", "Mean PPL(Q)/PPL(base)", 1),
        ("perplexity - base", "Mean PPL(Q)-PPL(base)", 1),
        ("KL divergence", "Mean    KLD", 1),
        ("change of p", "Mean    Δp", 0.01),
        ("RMS change of p", "RMS Δp", 0.01),
        ("same top token", "Same top p", 0.01),
    ]:
        value, error = shown_by_llama_cpp(theirs, their_name)
        assert ours[name]["value"] == pytest.approx(unit * value, rel=5e-4, abs=1e-4), name
        assert ours[name]["error"] == pytest.approx(unit * error, rel=5e-4, abs=1e-4), name
    for percentile, their_name in (("50", "Median  KLD"), ("99", "99.0%   KLD"), ("100", "Maximum KLD")):
        expected = shown_by_llama_cpp(theirs, their_name).value
        assert ours["KL percentiles"][percentile] == pytest.approx(expected, rel=1e-3, abs=1e-4)
