"""python -m llama3_raw.serve: what it refuses before it serves."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import psutil
import pytest

from llama3_raw.cli import memory_plan
from llama3_raw.cli.memory_plan import MemoryPlan, MemoryUse
from llama3_raw.cli.models import choose_model
from llama3_raw.serve import __main__ as command
from llama3_raw.serve.__main__ import main
from llama3_raw.serve.parser import build_parser
from tests.damage import copy_tiny
from tests.paths import TINY

from .servers import running


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets the handler of SIGTERM, and reads the variable of the key."""
    monkeypatch.delenv("LLAMA3_RAW_API_KEY", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: others can reach it, so it needs --api-key KEY or $LLAMA3_RAW_API_KEY",
        ),
        (["--host", "::"], "--host ::: others can reach it, so it needs --api-key"),
        (["--host", "laptop.local"], "--host laptop.local: others can reach it"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "cannot listen there"),
        (
            ["--host", "192.0.2.7", "--port", "8000", "--api-key", "k"],
            "--host 192.0.2.7 --port 8000: cannot listen there",
        ),
        (["--api-key", "a b"], "should be ASCII characters without spaces"),
        (["--port", "65536"], "--port: should be from 0 to 65535, is 65536"),
        (["--port", "http"], "--port: invalid _port value: 'http'"),
        (["--rows", "0"], "--rows: should be 1 or more, is 0"),
        (["--context", "513"], "--context 513: the model's own context is 512 tokens"),
        (["--queue", "0"], "--queue: should be 1 or more"),
        (["--timeout", "0"], "--timeout: should be seconds above 0, is 0"),
        (["--timeout", "nan"], "--timeout: should be seconds above 0, is nan"),
        (["--grace", "-1"], "--grace: should be seconds above 0, is -1"),
        (["--max-body", "4"], "--max-body: should be a size such as 4GB"),
        (["--allow-origin", "example.org"], "--allow-origin: should be such as https://example.org, without a path"),
        (["--template", "none.jinja"], "none.jinja"),
        (["--stop-token", "<|none|>"], "--stop-token <|none|>: the model has no such token"),
        (["--weights", "nothing"], "--weights nothing: there is no such folder"),
        (["page"], "unrecognized arguments: page"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(TINY), "--device", "cpu", "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("llama3_raw: error: ")
    assert message in line


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--weights", str(TINY), "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen there (Address already in use" in capsys.readouterr().err


def test_rows_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=400_000_000))
    assert main(["--weights", str(TINY), "--device", "cpu", "--port", "0", "--rows", "4096"]) == 2
    assert (
        "--rows 4096: a cache for 4096 texts of 512 tokens does not fit into memory; give --rows"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("free", "rows"), [(36_000, 16), (28_000, 8), (18_000, 1), (15_000, 8)])
def test_rows_leave_the_weights_in_memory(free: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --rows, the cache is as large as the memory besides the weights allows, if they fit at all."""

    def needed(plan: MemoryPlan) -> MemoryUse:
        return MemoryUse(mapped=16_000, copied=0, cache=1_000 * plan.shape.rows, work=0)

    monkeypatch.setattr(command, "needed", needed)
    monkeypatch.setattr(memory_plan, "needed", needed)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    chosen = choose_model(build_parser().parse_args(["--weights", str(TINY), "--device", "cpu"]))
    assert command._shape(chosen, 512, None).rows == rows


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_tiny(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    assert main(["--weights", str(tmp_path / "model"), "--port", "0"]) == 2
    assert "there is no tokenizer.model or tokenizer.json" in capsys.readouterr().err


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says what to install. --help needs none of them."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([]) == 2
    error = capsys.readouterr().err
    assert "the server needs the package uvicorn" in error
    assert "pip install -e '.[serve]'" in error
    assert "--allow-origin" in build_parser().format_help()


def test_ctrl_c_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It does not wait until the model is there."""
    main_thread, tensors = threading.get_ident(), []

    def load_model(*_: object) -> None:
        time.sleep(0.5)  # meanwhile the other thread begins to wait
        signal.pthread_kill(main_thread, signal.SIGINT)
        for number in range(300):
            time.sleep(0.1)
            tensors.append(number)

    monkeypatch.setattr(command, "load_model", load_model)
    assert main(["--weights", str(TINY), "--device", "cpu", "--port", "0"]) == 130
    assert len(tensors) < 200
    assert "stopped by Ctrl-C" in capsys.readouterr().err


@pytest.mark.slow
def test_the_network_and_its_key(tmp_path: Path) -> None:
    """On all addresses, --open prints a URL with the key, and opens the browser: here, a script that writes it down.

    The server answers while the browser is open.
    """
    browser = tmp_path / "browser"
    opened, closed = tmp_path / "opened", tmp_path / "closed"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\nuntil [ -e {closed} ]; do sleep 0.1; done\n')
    browser.chmod(0o755)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BROWSER", str(browser))
        with running("--host", "0.0.0.0", "--api-key", "a&b", "--open", "--allow-host", "Laptop.local") as server:
            try:
                assert httpx.get(f"{server.url}/health", headers={"Host": "laptop.local"}).status_code == 200
                page = f"{server.url}/#key=a%26b"
                assert f"llama3_raw: the page: {page}\n" in server.log.read_text()
                deadline = time.monotonic() + 30
                while not (opened.exists() and opened.read_text().endswith("\n")):
                    assert time.monotonic() < deadline, "no browser was opened"
                    time.sleep(0.05)
                assert opened.read_text() == f"{page}\n"
            finally:
                closed.touch()
            port = server.url.rsplit(":")[-1]
            for url in (server.url, f"http://127.0.0.1:{port}"):
                assert httpx.get(f"{url}/v1/models").status_code == 401
                assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer a&b"}).status_code == 200
