"""The console script: which command its first argument means, and what the help shows."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import llama3_raw
from llama3_raw import console
from llama3_raw.__main__ import main
from llama3_raw.cli.commands import COMMANDS
from tests.paths import ROOT


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llama3-raw", *arguments])
    return console.main()


def test_every_command_is_listed() -> None:
    """A package with a __main__, and a module with a main, is a command."""
    package = Path(llama3_raw.__file__).parent
    there = {file.parent.name for file in package.glob("*/__main__.py")}
    there |= {file.stem for file in package.glob("[a-z]*.py") if "\ndef main(" in file.read_text()} - {"console"}
    assert set(COMMANDS) == there


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m llama3_raw.{name}" in out
    assert find_spec(f"llama3_raw.{name}")
    assert max(map(len, out.splitlines())) <= 100


def test_anything_else_is_a_prompt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the name of a command after --, and with python -m."""
    options = ("--max-new-tokens", "3", "--ids", "--weights", str(ROOT / "weights" / "tiny"))
    assert run(monkeypatch, "5 6", *options) == 0
    assert len(capsys.readouterr().out.split()) == 3
    assert run(monkeypatch, *options, "--", "chat") == 2
    assert "chat" in capsys.readouterr().err  # it is no token id
    assert main([*options, "chat"]) == 2
    assert "'chat' is not a token id" in capsys.readouterr().err


def test_a_download_does_not_import_torch() -> None:
    code = "import sys; from llama3_raw.console import main; sys.argv[1:] = ['download', '--list']; main()"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0


def test_the_help_fits_two_screens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends with the other commands."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 72  # two of 36 lines
    assert [line.split()[0] for line in lines[-len(COMMANDS) :]] == list(COMMANDS)


def test_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Three things to try, each of them a command that exists."""
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    tries = [line.split()[2] for line in captured.err.splitlines() if line.startswith("  python -m ")]
    assert len(tries) == 3
    assert all(import_module(name) for name in tries)
