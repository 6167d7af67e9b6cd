"""Folders with random models of a few megabytes that have Llama 3's vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from llama3_raw import Params
from llama3_raw.checkpoint.loading import to_state_dict
from tests.paths import ROOT
from tests.references import dense, random_weights

N_TOKENS = 128256
CONTENT = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "multiple_of": 32}

# of llama.cpp (MIT): models/ggml-vocab-llama-bpe.gguf.inp
CASES = (ROOT / "tests" / "llama-bpe.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
WITH_SPECIAL_NAMES = "<|begin_of_text|> a<|eot_id|><|reserved_special_token_7|>b <|no_token|>"


def write_llama3_sized(folder: Path, tokenizer_file: Path, *, trained: bool, vocab_size: int = N_TOKENS) -> Path:
    """Write a model in Meta's format. trained: on the tokens of dialogs, unlike on the last 100 reserved tokens."""
    params = Params.from_meta({**CONTENT, "vocab_size": vocab_size})
    weights = random_weights(params, torch.bfloat16, seed=0)
    if trained:
        dense(weights.tok_embeddings)[N_TOKENS - 100 :] *= 0.01
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params.to_meta()))
    torch.save(to_state_dict(params, weights), folder / "consolidated.00.pth")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    return folder
