"""What a notebook shows: a model in ten lines, the public names, and lines that type checkers accept."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest
import torch

import llama3_raw
from llama3_raw import LayerWeights, Model, Params, Weights
from llama3_raw.quantization.int8 import Int8
from tests.paths import ROOT
from tests.references import quantized_weights


def test_a_model_prints_ten_lines(tiny: Model) -> None:
    first, *lines = repr(tiny).splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert first == "Model tiny"
    assert len(lines) == 9
    assert shown["parameters"] == "2,016,960, output tied to tok_embeddings"
    assert shown["heads"] == "6 of 32 values, 2 kv heads"
    assert shown["dtype"] == "bfloat16; matrices in bfloat16"
    assert shown["device"] == "cpu"
    assert shown["bytes"] == "4,033,920"
    assert shown["tokenizer"] == "tokenizer.model, 2,304 tokens"


def test_it_tells_quantized_matrices(tiny: Model) -> None:
    weights = quantized_weights(tiny.weights, "int8")
    shown = repr(tiny._replace(weights=weights, tokenizer=None, name="mine"))
    assert shown.startswith("Model mine\n")
    assert "bfloat16; matrices in bfloat16, int8" in shown
    assert shown.endswith("tokenizer   none")
    assert "2,459,328\n" in shown  # the output is one more matrix
    assert str(sum(matrix.nbytes for matrix in weights.layers[0])) not in shown


def test_no_weight_is_read() -> None:
    """Weights on the meta device have no values."""
    params = Params.from_meta({"dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "norm_eps": 1e-5})
    norm = torch.empty(64, dtype=torch.bfloat16, device="meta")
    matrix = Int8.meta((64, 64))
    layer = LayerWeights(norm, matrix, matrix, matrix, matrix, norm, matrix, matrix, matrix)
    weights = Weights(matrix, (layer,), norm, matrix)
    assert "meta" in repr(Model(weights, params, None))


def test_weights_print_shapes(tiny: Model) -> None:
    assert "\n  norm            [192]           bfloat16 on cpu\n" in repr(tiny.weights)
    assert "4 LayerWeights" in repr(tiny.weights)
    lines = repr(tiny.weights.layers[0]).splitlines()
    assert [line.split()[0] for line in lines] == ["LayerWeights", *LayerWeights._fields]
    assert lines[2] == "  wq              [192, 192]      bfloat16 on cpu"


def test_tab_shows_the_public_names_only() -> None:
    """Also after submodules were imported."""
    assert dir(llama3_raw) == sorted(llama3_raw.__all__)
    code = "import llama3_raw.model, llama3_raw.compare\nfrom llama3_raw import *\nprint(dir(llama3_raw), plots, load)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'compare'" not in done.stdout
    assert "'model'" not in done.stdout
    for name in llama3_raw.__all__:
        assert getattr(llama3_raw, name) is not None


def test_completion_in_ipython() -> None:
    completer = pytest.importorskip("IPython.core.completer")
    interactive = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    interactive.user_ns["llama3_raw"] = llama3_raw
    with completer.provisionalcompleter():
        offered = {found.text for found in interactive.Completer.completions("llama3_raw.", len("llama3_raw."))}
    assert offered == set(llama3_raw.__all__)


def test_natural_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mypy checks their types with those of all other files."""
    monkeypatch.chdir(ROOT)
    lines = runpy.run_path(str(ROOT / "tests" / "notebook_lines.py"))
    assert lines["text"] == "<|begin_of_text|>Once upon a time"
    assert not lines["change"].any()
