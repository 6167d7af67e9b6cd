"""`Case`, a row of the tables of refused input, and the check that a tool refuses it."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from llama3_raw import UserError
from llama3_raw.__main__ import main
from llama3_raw.system import machine
from tests.damage import copy_tiny, limited_memory, unharmed
from tests.paths import TINY


class Case(NamedTuple):
    """A refused input: the texts in the error, the file or option first; the damage; how the tool is called."""

    says: tuple[str, ...]
    damage: Callable[[Path], Any] = unharmed
    arguments: tuple[str, ...] = ("Once upon a time",)
    start: Callable[[Path], Any] = copy_tiny
    stdin: bytes | None = None
    free: Mapping[str, int] = MappingProxyType({})  # bytes of "RAM", "container" or "GPU"; others are the machine's
    tool: Callable[[list[str]], int] = main


AGAIN = "download it again"

ONE_MODEL = "use params and weights of one model"

HTML = "<!doctype html><html>"

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0"


def content_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return the length and the first 100 MB of every file below a folder, and every folder."""

    def beginning(file: Path) -> bytes:
        with open(file, "rb") as opened:
            return opened.read(100_000_000)

    return {path: (path.stat().st_size, beginning(path)) if path.is_file() else (0, b"") for path in folder.rglob("*")}


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: Mapping[str, int]) -> None:
    """Make the machine report this much free memory."""
    if "RAM" in free:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free["RAM"]))
    if "container" in free:
        monkeypatch.setattr(machine, "container_free", lambda: [free["container"]])
    if "GPU" in free:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["GPU"], 10**12))


def check_refused(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check for one line on stderr that names the file or option and the way out, no changed files, and --debug."""
    folder = tmp_path / "model"
    folder.mkdir()
    case.start(folder)
    case.damage(folder)
    before = content_of(tmp_path)
    arguments = [argument.format(folder=folder) for argument in case.arguments]
    if "--make-synthetic" not in case.arguments:
        arguments = ["--weights", str(folder), *arguments]
        if case.start is not copy_tiny:  # the others have no tokenizer
            arguments = [*arguments, "--tokenizer", str(TINY / "tokenizer.model")]
    if case.stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    pretend_free(monkeypatch, case.free)

    with limited_memory(), warnings.catch_warnings(record=True) as caught:
        status = case.tool(arguments)
    assert not caught  # warnings would be more lines on stderr
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("llama3_raw: error: ")
    assert len(err) < 1000
    assert err.removesuffix("\n").isprintable()
    for text in case.says:
        assert text in err
    assert content_of(tmp_path) == before

    if case.stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    with pytest.raises((UserError, OSError)):  # Python shows it as a traceback
        case.tool([*arguments, "--debug"])
