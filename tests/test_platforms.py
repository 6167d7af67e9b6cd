"""Windows, as far as it can be pretended: the package without what only POSIX has, and a console that is not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT, TINY

# what Python has on POSIX only (its documentation, "Availability: Unix"), as far as the package could want it
WITHOUT_POSIX = """
import importlib, mmap, os, pkgutil, signal, sys
# what others import must be there before: those packages look at the platform themselves
import gguf, jinja2, matplotlib.pyplot, multiprocessing.connection, pdb, psutil, safetensors.torch, subprocess, tempfile
import tiktoken, torch.distributed, tqdm, uvicorn, webbrowser
from filelock import FileLock
from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, get_session, get_token, utils
from huggingface_hub.utils import build_hf_headers
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog"):
    sys.modules[name] = None  # importing it raises ImportError
names = {
    os: "fork forkpty getuid geteuid getgid killpg nice mkfifo posix_fadvise pread pwrite preadv pwritev "
        "sched_getaffinity sched_setaffinity setsid sync sysconf uname wait4 O_DIRECT O_DIRECTORY",
    signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGQUIT SIGPIPE SIGTSTP SIGCHLD alarm setitimer pthread_sigmask",
    mmap: "MAP_PRIVATE MAP_SHARED MAP_NORESERVE PROT_READ PROT_WRITE MADV_RANDOM MADV_NORMAL MADV_WILLNEED",
}
for module, removed in names.items():
    for name in removed.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_POSIX + code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=500, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_every_module_is_imported_without_posix() -> None:
    for extra in ("starlette", "lm_eval", "transformers"):
        pytest.importorskip(extra)
    done = python("""
import llama3_raw
for module in pkgutil.walk_packages(llama3_raw.__path__, "llama3_raw."):
    if not module.name.endswith("cuda_kernels"):  # needs Triton, which needs Linux
        importlib.import_module(module.name)
print("imported", len([name for name in sys.modules if name.startswith("llama3_raw.")]) > 50)
""")
    assert done.stdout == "imported True\n", done.stderr


@pytest.mark.slow
def test_the_commands_run_without_posix() -> None:
    """The kernels are left out in one line, files are mapped by ACCESS_COPY, and a written model can be read."""
    done = python(f"""
from llama3_raw.__main__ import main
from llama3_raw.convert import main as convert
with tempfile.TemporaryDirectory() as folder:
    status = [
        main(["--weights", {str(TINY)!r}, "Once upon a time", "--max-new-tokens", "5", "--stats"]),
        convert([{str(TINY)!r}, folder + "/hf", "--to", "hf"]),
        main(["--weights", folder + "/hf", "Once upon a time", "--max-new-tokens", "5"]),
    ]
print("", status)
""")
    assert done.stdout == ", there was a little, there was a little [0, 0, 0]\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if "kernels" in line]
    assert lines == [
        "llama3_raw: the kernels are not built on Windows; computed by torch: tokens come about half as fast, and from "
        "few bits far slower"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["cp1252", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("cp437", "ascii"))]
)
def test_consoles_that_are_not_utf_8(encoding: str) -> None:
    """A character that the console does not know becomes "?" in the text, and an escape in messages; nothing fails."""
    prompt = "日本 Ærø"
    command = [
        sys.executable,
        "-m",
        "llama3_raw",
        "--weights",
        str(TINY),
        prompt,
        "--max-new-tokens",
        "8",
        "--top",
        "2",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=500, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    for other in (["-m", "llama3_raw.evaluate", "--help"], ["examples/01_tokens.py"]):
        done = subprocess.run(
            [sys.executable, *other],
            cwd=ROOT,
            capture_output=True,
            timeout=500,
            env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*command[:3], "--weights", "nowhere 日本", "x"],
        capture_output=True,
        cwd=ROOT,
        timeout=500,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
