"""examples/: every lesson runs without a warning, and its own assertions hold."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import make_walkthrough
import nbformat
import pytest
import torch
from tiktoken_ext import openai_public

from llama3_raw import Params, Tokenizer
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.explain.page import merges_of
from tests.paths import EXAMPLES
from tests.references import random_weights

pytestmark = pytest.mark.slow  # most start processes

LESSONS = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))


def run(lesson: Path, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a lesson as a reader does, with every warning an error."""
    # import this checkout
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-W", "error", str(lesson), *options],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="session")
def with_llama_tokenizer(meta_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Meta's format, with Llama 3's tokenizer and a small model of random weights."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(meta_tokenizer_file, folder / "tokenizer.model")
    (folder / "params.json").write_text(
        '{"dim": 128, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 128256, "multiple_of": 64, '
        '"norm_eps": 1e-5, "rope_theta": 500000.0}'
    )
    params = Params.from_file(folder / "params.json")
    weights = random_weights(params, torch.bfloat16, seed=0)
    torch.save(to_state_dict(params, weights), folder / "consolidated.00.pth")
    return folder


def test_lessons_are_numbered_from_1_to_10() -> None:
    assert [int(lesson.name[:2]) for lesson in LESSONS] == list(range(1, 11))


@pytest.mark.parametrize("lesson", [LESSONS[0], LESSONS[5]], ids=lambda lesson: lesson.stem)
def test_starts_without_a_warning(lesson: Path, tmp_path: Path) -> None:
    """One lesson that prints and one that draws; all have the same imports."""
    draws = "draws=True" in lesson.read_text()
    assert draws == (lesson == LESSONS[5])
    done = run(lesson, "--weights", "tiny", *(["--picture", "picture.png"] if draws else []), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr  # the line that names the model


def run_here(lesson: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Like `run`, but in this process, which halves the time."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a lesson sets SIGPIPE, which would affect pytest
    monkeypatch.setattr(sys, "argv", [str(lesson), *options])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(lesson), run_name="__main__")


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_runs_on_the_built_in_model(
    lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = "draws=True" in lesson.read_text()
    picture = tmp_path / "picture.png"
    run_here(lesson, monkeypatch, "--weights", "tiny", *(["--picture", str(picture)] if draws else []))
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err  # the line that names the model, and no warning
    assert len(out.splitlines()) > 10
    if draws:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_runs_on_another_model(
    lesson: Path, with_llama_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(lesson, monkeypatch, "--weights", str(with_llama_tokenizer))
    assert "llama" in capsys.readouterr().err


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_opens_with_question_idea_and_what_to_look_at(lesson: Path) -> None:
    opening = " ".join(lesson.read_text().split('"""')[1].split())
    for part in ("The question: ", "The idea: ", "What to look at: ", f"python examples/{lesson.name}"):
        assert part in opening


def test_wrong_options_end_in_one_line(tmp_path: Path) -> None:
    for options, named in (
        (["--weights", "nowhere"], "nowhere"),
        (["--quantize", "int8"], "int8"),
        (["--picture", "no/such/folder.png"], "--picture"),
    ):
        done = run(EXAMPLES / "06_rmsnorm_swiglu.py", *options, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert named in done.stderr
        assert done.stdout == ""


def test_the_notebook_is_up_to_date() -> None:
    stored = nbformat.read(make_walkthrough.NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    expected = make_walkthrough.make_notebook()
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in expected.cells
    ], "run examples/make_walkthrough.py"
    figures = [
        output for cell in stored.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 5
    assert make_walkthrough.NOTEBOOK.stat().st_size < 500_000


def test_the_notebook_runs_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_walkthrough, "NOTEBOOK", tmp_path / "made.ipynb")
    assert make_walkthrough.main([]) == 0
    for cell in nbformat.read(tmp_path / "made.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text


def test_the_pattern_of_gpt_4_is_that_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # the ranks would be downloaded
    pattern = openai_public.cl100k_base()["pat_str"]
    lesson = ast.parse((EXAMPLES / "01_tokens.py").read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in lesson.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(assigned["CL100K"]) == pattern


def test_llama_3_has_588_tokens_that_no_merge_reaches(meta_tokenizer_file: Path) -> None:
    """The number in lesson 01."""
    tokenizer = Tokenizer(meta_tokenizer_file)

    def is_reached(token: bytes) -> bool:
        return len(merges_of(tokenizer, token)[-1].parts) == 1

    ranks = tokenizer.ranks
    assert sum(not is_reached(token) for token in ranks) == 588
    assert not is_reached(" việc".encode())
    assert ranks[" việc".encode()] == 100769
    assert b"hugging" not in ranks
