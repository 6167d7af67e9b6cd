"""--help and --version answer without torch, and what they show is true of the library."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import pytest

from llama3_raw.backends.cpu import MAX_DECODE_ROWS
from llama3_raw.bench.baselines import BASELINES
from llama3_raw.bench.synthetic import SYNTHETIC
from llama3_raw.bench.tap_overhead import LENGTH
from llama3_raw.chat.conversation import DEFAULT_CONTEXT
from llama3_raw.checkpoint.files import FileFormat
from llama3_raw.cli import shown
from llama3_raw.cli.commands import COMMANDS
from llama3_raw.cli.entry_point import answer_help
from llama3_raw.cli.main_parser import build_parser
from llama3_raw.cli.models import DTYPES_BY_NAME
from llama3_raw.compare.difference import TOP_K
from llama3_raw.decoding.drafts import MAX_DRAFT_TOKENS
from llama3_raw.decoding.scoring import MAX_ROWS
from llama3_raw.perplexity import DEFAULT_CONTEXT as PERPLEXITY_CONTEXT
from llama3_raw.perplexity import LLAMA_CPP_CONTEXT, Kind
from llama3_raw.quantization.matrix import FORMATS
from tests.paths import ROOT

CONSOLE = "import sys; from llama3_raw.console import main; sys.exit(main())"


def imported(*command: str) -> set[str]:
    """Run Python, and return the modules that it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(("usage: ", "llama3_raw 0"))
    return set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_needs_no_torch(name: str) -> None:
    as_module = imported("-m", f"llama3_raw.{name}" if name else "llama3_raw", "--help")
    as_script = imported("-c", CONSOLE, *([name] if name else []), "--help")
    for modules in (as_module, as_script):
        assert "argparse" in modules
        assert not modules & {"torch", "numpy", "transformers"}


def test_version_needs_no_torch() -> None:
    assert "torch" not in imported("-m", "llama3_raw", "--version")
    assert "torch" not in imported("-c", CONSOLE, "--version")


def test_help_that_another_parser_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of lm-eval's own command, of an estimate, and of torchrun's other processes; or it is a prompt."""
    with pytest.raises(SystemExit):
        answer_help("__main__", build_parser, ["--ids", "--help"])
    answer_help("llama3_raw.chat", build_parser, ["--help"])
    for arguments in (["lm_eval", "--help"], ["--estimate", "8b", "-h"], ["--estimate=8b", "-h"], ["--", "--help"]):
        answer_help("__main__", build_parser, arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer_help("__main__", build_parser, ["--help"])


def test_what_is_shown_is_what_the_library_has() -> None:
    assert tuple(DTYPES_BY_NAME) == shown.DTYPES
    assert tuple(FORMATS) == shown.QUANTIZED
    assert get_args(FileFormat) == shown.FILE_FORMATS
    assert get_args(Kind) == shown.WINDOWS
    assert tuple(SYNTHETIC) == shown.SYNTHETIC
    assert BASELINES == shown.BASELINES
    numbers = {
        "MAX_DECODE_ROWS": MAX_DECODE_ROWS,
        "MAX_DRAFT_TOKENS": MAX_DRAFT_TOKENS,
        "TEXTS_AT_ONCE": MAX_ROWS,
        "TOP_K": TOP_K,
        "CHAT_CONTEXT": DEFAULT_CONTEXT,
        "PERPLEXITY_CONTEXT": PERPLEXITY_CONTEXT,
        "LLAMA_CPP_CONTEXT": LLAMA_CPP_CONTEXT,
        "TAP_LENGTH": LENGTH,
    }
    assert {name: getattr(shown, name) for name in numbers} == numbers
