"""Small checkpoints for the tests of loading, and the files that their tensors are mapped from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama3_raw import Weights
from tests.references import flat

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "multiple_of": 32}


def write_meta(folder: Path, content: dict[str, Any], state_dict: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(content))
    torch.save(state_dict, folder / "consolidated.00.pth")
    return folder


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert len(ours.layers) == len(theirs.layers)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(theirs), strict=True))


def file_of(tensor: Tensor) -> str | None:
    """Return the file that a tensor is mapped from, by /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else None
    return None
