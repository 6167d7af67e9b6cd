"""`running`: the server as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2 as httpx
import psutil

from tests.paths import ROOT, TINY


class Server(NamedTuple):
    """A running server."""

    url: str  # without a slash at the end
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def memory(self) -> int:
        """Its resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def metric(self, name: str) -> float:
        """Return a metric without labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return float(re.search(rf"^llama3_raw_{name} (\S+)$", text, re.MULTILINE).group(1))

    def wait_for(self, name: str, value: float, seconds: float = 60) -> None:
        """Wait until a metric has this value."""
        deadline = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}"
            time.sleep(0.05)


@contextlib.contextmanager
def running(*arguments: str, port: int = 0, seconds: float = 120) -> Iterator[Server]:
    """Start the server with the built-in model; end it by SIGTERM if it still runs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("LLAMA3_RAW_API_KEY", None)
    command = [sys.executable, "-m", "llama3_raw.serve", "--weights", str(TINY), "--device", "cpu", "--port", str(port)]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline = time.monotonic() + seconds
            while not (found := re.search(r" at (http://\S+)/,", Path(log.name).read_text())):
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.05)
            yield Server(found.group(1), process, Path(log.name))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(60)
