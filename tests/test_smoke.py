"""A handful of tests that show in seconds that an installation works: nox runs them for each Python and torch."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import torch

import llama3_raw
from llama3_raw import REFERENCE, KVCache, Model, UserError, forward, generate
from llama3_raw.system.version import VERSION
from tests.paths import ROOT, TINY

STORY = ", there was a little girl named Lily. She loved to play outside in the sunshine."
OPTIONAL = {"lm_eval", "matplotlib", "transformers", "starlette", "uvicorn", "prometheus_client"}  # in extras
OPTIONAL |= {"gguf", "httpx2", "blobfile"}  # beside the oldest libraries


def test_the_command_tells_the_story() -> None:
    command = [sys.executable, "-m", "llama3_raw", "Once upon a time", "--max-new-tokens", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.stdout.startswith(STORY), done.stderr
    done = subprocess.run([*command[:3], "--version"], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.stdout.strip() == f"llama3_raw {VERSION}"


def test_exact_and_fast_operations_agree(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode("Once upon a time", bos=True)
    texts = [tiny.tokenizer.decode(list(generate(tiny, ids, max_new_tokens=20, ops=ops))) for ops in (None, REFERENCE)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(STORY)


def test_the_cache_changes_nothing_but_rounding(tiny: Model) -> None:
    ids = torch.arange(1, 20)
    whole = forward(tiny.weights, tiny.params, ids)
    cache = KVCache.allocate(tiny.params, max_seq_len=19, like=tiny.weights)
    steps = [forward(tiny.weights, tiny.params, ids[i : i + 1], cache=cache, start=i) for i in range(19)]
    assert (torch.cat(steps) - whole).abs().max() <= 0.02 * whole.abs().max()


def test_the_tokenizer_returns_the_text(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    text = "Zwölf Boxkämpfer – 日本語 🙂\n\n  x = 42"
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text


def test_int4_tells_a_story() -> None:
    model = llama3_raw.load(TINY, quantize="int4")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("Once upon a time", bos=True)
    assert "there was" in model.tokenizer.decode(list(generate(model, ids, max_new_tokens=10)))


def test_every_module_can_be_imported() -> None:
    """Where an optional package is missing, no other one is asked for."""
    for module in pkgutil.walk_packages(llama3_raw.__path__, "llama3_raw."):
        if module.name.endswith("cuda_kernels"):
            continue  # needs triton
        try:
            importlib.import_module(module.name)
        except (ModuleNotFoundError, UserError) as error:
            missing = error.__cause__ or error
            if not (isinstance(missing, ModuleNotFoundError) and str(missing.name).partition(".")[0] in OPTIONAL):
                raise
