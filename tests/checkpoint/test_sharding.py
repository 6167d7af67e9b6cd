"""Which part of a model each of several processes loads, from every kind of checkpoint, and how much that takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import Params, UserError, Weights, load
from llama3_raw.checkpoint.checkpoint import open_checkpoint, shard_of
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.sharding import SHARDED_DIMENSION, Shard, cannot_split
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.cli.memory_plan import Lengths, Plan, needed
from llama3_raw.quantization.int8 import Int8, widen
from llama3_raw.weights import tensor_places
from tests.references import flat, hf_model, random_weights

SIZES = (1, 2, 4, 8)
CONTENT = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 96,
    "norm_eps": 1e-5,
    "multiple_of": 32,
}
PARAMS = Params.from_meta(CONTENT)


def write_shards(folder: Path, content: dict[str, Any], weights: Weights, n_files: int) -> Path:
    """Meta's files, split by torch itself."""
    params = Params.from_meta(content)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(content))
    whole = to_state_dict(params, weights)
    for number in range(n_files):
        part = {}
        for place in tensor_places(params):
            dimension = SHARDED_DIMENSION.get(place.field)
            tensor = whole[place.meta_name]
            part[place.meta_name] = tensor if dimension is None else tensor.chunk(n_files, dimension)[number].clone()
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    return folder


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(PARAMS, torch.float32, seed=0)


@pytest.fixture(scope="module")
def folders(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in 1, 2, 4 and 8 of Meta's files, and as Hugging Face has it."""
    root = tmp_path_factory.mktemp("sharding")
    found = {str(n_files): write_shards(root / str(n_files), CONTENT, weights, n_files) for n_files in SIZES}
    hf_model(PARAMS, weights).save_pretrained(root / "hf")
    return {**found, "hf": root / "hf"}


def rows_of_head(matrix: Tensor, head: int) -> Tensor:
    by_head: Tensor = matrix.unflatten(0, (-1, PARAMS.head_dim))
    return by_head[head]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", ["1", "2", "4", "8", "hf"])
def test_every_process_gets_its_part(weights: Weights, folders: dict[str, Path], source: str, size: int) -> None:
    parts = [load(folders[source], shard=Shard(rank, size)) for rank in range(size)]
    assert all(part.params == PARAMS for part in parts)  # those of the whole model
    for whole, layers in zip(weights.layers, zip(*(part.weights.layers for part in parts), strict=True), strict=True):
        for field in ("wq", "wo", "w1", "w2", "w3"):
            joined = torch.cat([getattr(layer, field) for layer in layers], dim=SHARDED_DIMENSION[field])
            assert torch.equal(joined, getattr(whole, field)), field
        for field in ("attention_norm", "ffn_norm"):
            assert all(torch.equal(getattr(layer, field), getattr(whole, field)) for layer in layers)
        heads_of_each = PARAMS.n_heads // size
        for rank, layer in enumerate(layers):
            for head in range(rank * heads_of_each, (rank + 1) * heads_of_each):
                kv_head = head // (PARAMS.n_heads // PARAMS.n_kv_heads)  # the one that this query head looks at
                own_sharing = heads_of_each // (len(layer.wk) // PARAMS.head_dim)
                own_kv_head = (head - rank * heads_of_each) // own_sharing  # the one that it gets in this process
                for field in ("wk", "wv"):
                    found = rows_of_head(getattr(layer, field), own_kv_head)
                    assert torch.equal(found, rows_of_head(getattr(whole, field), kv_head)), (rank, field)
    for field in ("tok_embeddings", "output"):
        assert torch.equal(torch.cat([getattr(part.weights, field) for part in parts]), getattr(weights, field))
    assert all(tensor.is_contiguous() for part in parts for tensor in flat(part.weights))


def test_rows_of_one_file_are_not_copied(folders: dict[str, Path]) -> None:
    checkpoint = shard_of(open_checkpoint(folders["1"]), Shard(1, 4))
    copied = {place.field for place in checkpoint.parts if checkpoint.must_change(place)}
    assert copied == {"wo", "w2"}  # whose columns are apart in the file
    checkpoint = shard_of(open_checkpoint(folders["4"]), Shard(1, 4))
    assert not any(map(checkpoint.must_change, checkpoint.parts))


def test_a_part_in_int8_has_its_scales(weights: Weights, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "bf16", CONTENT, weights._replace(), 1)
    save_quantized(folder, open_checkpoint(folder), tmp_path / "int8", dtype=torch.bfloat16)
    whole = load(tmp_path / "int8").weights
    parts = [load(tmp_path / "int8", shard=Shard(rank, 2)).weights for rank in range(2)]
    for field in ("wq", "w2"):
        matrices = [getattr(part.layers[1], field) for part in parts]
        assert all(isinstance(matrix, Int8) for matrix in matrices)
        joined = torch.cat([widen(matrix, torch.float32) for matrix in matrices], dim=SHARDED_DIMENSION[field])
        assert torch.equal(joined, widen(getattr(whole.layers[1], field), torch.float32))


def test_what_cannot_be_split_is_refused(folders: dict[str, Path]) -> None:
    assert [size for size in range(1, 10) if not cannot_split(PARAMS, size)] == [1, 2, 4, 8]
    with pytest.raises(UserError, match=r"3 processes cannot share 8 heads evenly; start so many .*: 1, 2, 4, 8"):
        load(folders["1"], shard=Shard(0, 3))
    # 6 heads and 6 of everything, but kv heads that neither divide the processes nor are divided by them
    odd = Params.from_meta({**CONTENT, "dim": 96, "n_heads": 12, "n_kv_heads": 4, "vocab_size": 96})
    assert cannot_split(odd, 6) == "4 kv heads"


@pytest.mark.parametrize("size", [2, 4])
def test_the_plan_of_a_part_is_a_part(folders: dict[str, Path], size: int) -> None:
    whole = open_checkpoint(folders["hf"])
    lengths = Lengths(prompt=30, text=100, least=30)

    def need(checkpoint: Any) -> Any:
        return needed(Plan(checkpoint, torch.device("cpu"), torch.bfloat16, lengths))

    everything, part = need(whole), need(shard_of(whole, Shard(1, size)))
    assert part.cache == everything.cache // size
    norms = sum(2 * place.shape[0] for place in whole.parts if len(place.shape) == 1)
    assert part.copied == (everything.copied - norms) // size + norms


MEASURED = """
import sys, psutil
from pathlib import Path
import torch
from llama3_raw.checkpoint.sharding import Shard
from llama3_raw.checkpoint.loading import load

memory = psutil.Process().memory_info
load(sys.argv[1], layers=1)  # what the first use of torch and the zip takes is not of the weights
before = memory().rss
model = load(sys.argv[1], shard=Shard(int(sys.argv[2]), int(sys.argv[3])))
of_layers = (matrix for layer in model.weights.layers for matrix in layer)
for matrix in (model.weights.output, model.weights.tok_embeddings, *of_layers):
    matrix.view(-1)[::1024].sum()  # a value of each page
print(memory().rss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts the resident pages as Linux does")
@pytest.mark.parametrize("n_files", [1, 4])
def test_a_part_takes_a_part_of_the_memory(tmp_path: Path, n_files: int) -> None:
    content = {**CONTENT, "dim": 2048, "n_layers": 1, "vocab_size": 32768, "multiple_of": 8192}
    params = Params.from_meta(content)
    weights = random_weights(params, torch.bfloat16, seed=0)
    n_bytes = sum(tensor.nbytes for tensor in flat(weights))
    folder = write_shards(tmp_path / "model", content, weights, n_files)
    command = [sys.executable, "-c", MEASURED, str(folder), "2", "4"]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    around = 9 * 2 * 2**21  # at both ends of each matrix the system may bring a large page
    assert 0.98 * n_bytes / 4 < taken < n_bytes / 4 + around < n_bytes / 2
