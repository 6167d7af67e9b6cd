"""The published perplexities of Llama 3 8B on WikiText-2, if its weights and the text are there."""

from __future__ import annotations

import pytest
import torch

import llama3_raw
from llama3_raw import Model
from llama3_raw.perplexity import perplexity
from tests.paths import ROOT

FOLDER = ROOT / "weights" / "Meta-Llama-3-8B"
TEXT = ROOT / "weights" / "wiki.test.raw"  # of huggingface.co/datasets/ggml-org/ci, wikitext-2-raw-v1.zip

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(not FOLDER.exists(), reason="the real weights are not in weights/Meta-Llama-3-8B"),
    pytest.mark.skipif(not TEXT.exists(), reason="WikiText-2 is not in weights/wiki.test.raw"),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return llama3_raw.load(FOLDER, device="cuda" if torch.cuda.is_available() else "cpu")


def test_windows_of_llama_cpp(model: Model) -> None:
    """llama.cpp, tools/perplexity/README.md: 6.225194 in bf16."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT.read_text(), bos=True)
    score = perplexity(model, ids, context=512, windows="llama.cpp", progress=True)
    assert score.perplexity == pytest.approx(6.225, abs=0.02)


def test_windows_of_2048(model: Model) -> None:
    """EfficientQAT's README: 6.14 in fp16, where lines are joined as quantization papers do it, from GPTQ on.

    Their last window, if it is not whole, is left out; so it is here.
    """
    assert model.tokenizer is not None
    rows = [line if line.strip() else "" for line in TEXT.read_text().splitlines(keepends=True)]
    ids = model.tokenizer.encode("\n\n".join(rows), bos=True)
    ids = ids[: len(ids) // 2048 * 2048]
    score = perplexity(model, ids, context=2048, stride=2048, progress=True)
    assert score.perplexity == pytest.approx(6.14, abs=0.02)
