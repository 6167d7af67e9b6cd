"""Fixtures of the chat tests."""

from __future__ import annotations

import ast
import io
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama3_raw import Model
from llama3_raw.chat.__main__ import main
from llama3_raw.decoding import runner
from tests.chat.fakes import PARAMS, Fake, taught
from tests.conftest import fetch
from tests.paths import TINY
from tests.references import random_weights


@pytest.fixture(scope="session")
def hf_template() -> str:
    """The template of Llama 3 Instruct that transformers 4 writes into converted models (5 no longer has it)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "transformers==4.43.4"]
    with zipfile.ZipFile(fetch("transformers-4.43.4-py3-none-any.whl", command)) as wheel:
        source = wheel.read("transformers/models/llama/convert_llama_weights_to_hf.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "chat_template":
            return str(ast.literal_eval(node.value))
    raise AssertionError("no chat_template in it")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, fake_model: Model) -> Fake:
    assert fake_model.tokenizer is not None
    fake = Fake(fake_model.tokenizer.special_tokens["<|eot_id|>"])
    monkeypatch.setattr(runner, "forward", fake)
    return fake


@pytest.fixture(scope="session")
def fake_model(tiny: Model) -> Model:
    return Model(random_weights(PARAMS, torch.float32, seed=0), PARAMS, tiny.tokenizer)


@pytest.fixture(scope="session")
def taught_folder(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llama3_raw.checkpoint.loading import to_state_dict

    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("chat") / "model"))
    torch.save(to_state_dict(tiny.params, taught(tiny).weights), folder / "consolidated.00.pth")
    return folder


Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def call(typed: str | bytes, *options: str, folder: Path = TINY) -> tuple[int, str, str]:
        """Run the command with `typed` on stdin, a pipe. Return status, stdout and stderr."""
        lines = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        status = main(["--weights", str(folder), "--temperature", "0", "--max-new-tokens", "8", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
