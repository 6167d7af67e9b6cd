"""Text on the command line, on stdin and in files: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama3_raw import UserError
from llama3_raw.__main__ import main
from llama3_raw.cli.options import read_prompt, read_text
from tests.paths import TINY

LATIN_1 = os.fsdecode(b"caf\xe9")  # as in sys.argv


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([LATIN_1], "caf\ufffd"),
        (["--top", "2", LATIN_1], "caf\ufffd"),
        (["x", f"--stop={LATIN_1}"], "--stop"),
        (["x", "--stop", LATIN_1], "--stop"),
    ],
)
def test_an_argument_that_is_not_utf8(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(TINY), "--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"llama3_raw: error: {name}: not valid UTF-8; convert the text to UTF-8\n"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
@pytest.mark.parametrize("form", ["--weights={}", "--weights {}"])
def test_the_name_of_a_file_may_be_any_bytes(tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LATIN_1).symlink_to(TINY)
    arguments = form.format(tmp_path / LATIN_1).split(" ")
    assert main([*arguments, "--device", "cpu", "Once", "--max-new-tokens", "2"]) == 0
    assert capfd.readouterr().out == " upon a"


@pytest.mark.parametrize("source", ["stdin", "file"])
def test_a_byte_order_mark_is_dropped(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only at the start; and the position of an error counts its bytes."""

    def read(content: bytes) -> str:
        (tmp_path / "text").write_bytes(content)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        return read_text("-" if source == "stdin" else str(tmp_path / "text"))

    assert read(b"\xef\xbb\xbfHi\n") == "Hi\n"
    assert read("é\ufeffx".encode()) == "é\ufeffx"
    with pytest.raises(UserError, match="not valid UTF-8 at byte 4"):
        read(b"\xef\xbb\xbfa\xff")


def test_a_prompt_of_a_byte_order_mark_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbf\r\n")))
    with pytest.raises(UserError, match="the prompt is empty"):
        read_prompt("-", "tool")
