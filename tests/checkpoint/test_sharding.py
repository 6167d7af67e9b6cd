"""The shard that each of several processes loads, from every kind of checkpoint, and the memory that it needs."""

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
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, needed
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import FORMATS
from llama3_raw.weights import tensor_specs
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
    """Write Meta's files, split with torch.chunk."""
    params = Params.from_meta(content)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(content))
    whole = to_state_dict(params, weights)
    for number in range(n_files):
        shard = {}
        for spec in tensor_specs(params):
            dimension = SHARDED_DIMENSION.get(spec.field)
            tensor = whole[spec.meta_name]
            shard[spec.meta_name] = tensor if dimension is None else tensor.chunk(n_files, dimension)[number].clone()
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    return folder


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(PARAMS, torch.float32, seed=0)


@pytest.fixture(scope="module")
def folders(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in 1, 2, 4 and 8 of Meta's files, and in Hugging Face's format."""
    root = tmp_path_factory.mktemp("sharding")
    written = {str(n_files): write_shards(root / str(n_files), CONTENT, weights, n_files) for n_files in SIZES}
    hf_model(PARAMS, weights).save_pretrained(root / "hf")
    return {**written, "hf": root / "hf"}


def rows_of_head(matrix: Tensor, head: int) -> Tensor:
    by_head: Tensor = matrix.unflatten(0, (-1, PARAMS.head_dim))
    return by_head[head]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", ["1", "2", "4", "8", "hf"])
def test_every_process_gets_its_shard(weights: Weights, folders: dict[str, Path], source: str, size: int) -> None:
    shards = [load(folders[source], shard=Shard(rank, size)) for rank in range(size)]
    assert all(shard.params == PARAMS for shard in shards)  # those of the whole model
    layers_of_shards = zip(*(shard.weights.layers for shard in shards), strict=True)
    for whole, layers in zip(weights.layers, layers_of_shards, strict=True):
        for field in ("wq", "wo", "w1", "w2", "w3"):
            joined = torch.cat([getattr(layer, field) for layer in layers], dim=SHARDED_DIMENSION[field])
            assert torch.equal(joined, getattr(whole, field)), field
        for field in ("attention_norm", "ffn_norm"):
            assert all(torch.equal(getattr(layer, field), getattr(whole, field)) for layer in layers)
        n_heads = PARAMS.n_heads // size  # per process
        for rank, layer in enumerate(layers):
            for head in range(rank * n_heads, (rank + 1) * n_heads):
                kv_head = head // (PARAMS.n_heads // PARAMS.n_kv_heads)  # that this query head attends to
                n_rep = n_heads // (len(layer.wk) // PARAMS.head_dim)
                kv_head_here = (head - rank * n_heads) // n_rep  # its index in this process
                for field in ("wk", "wv"):
                    rows = rows_of_head(getattr(layer, field), kv_head_here)
                    assert torch.equal(rows, rows_of_head(getattr(whole, field), kv_head)), (rank, field)
    for field in ("tok_embeddings", "output"):
        assert torch.equal(torch.cat([getattr(shard.weights, field) for shard in shards]), getattr(weights, field))
    assert all(tensor.is_contiguous() for shard in shards for tensor in flat(shard.weights))


def test_rows_of_one_file_are_not_copied(folders: dict[str, Path]) -> None:
    checkpoint = shard_of(open_checkpoint(folders["1"]), Shard(1, 4))
    copied = {spec.field for spec in checkpoint.shards if checkpoint.needs_copy(spec)}
    assert copied == {"wo", "w2"}  # their columns are not contiguous in the file
    checkpoint = shard_of(open_checkpoint(folders["4"]), Shard(1, 4))
    assert not any(map(checkpoint.needs_copy, checkpoint.shards))


@pytest.fixture(scope="module")
def quantized_folders(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    for name in FORMATS:
        save_quantized(folders["1"], open_checkpoint(folders["1"]), root / name, dtype=torch.bfloat16, quantize=name)
    return {name: root / name for name in FORMATS}


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_shard_of_a_quantized_model_has_its_scales(quantized_folders: dict[str, Path], quantize: str) -> None:
    whole = load(quantized_folders[quantize]).weights
    shards = [load(quantized_folders[quantize], shard=Shard(rank, 2)).weights for rank in range(2)]
    assert all(isinstance(shard.output, Int8) for shard in shards)
    for field in ("wq", "wk", "wo", "w2", "w3"):
        matrices = [getattr(shard.layers[1], field) for shard in shards]
        assert all(isinstance(matrix, FORMATS[quantize]) for matrix in matrices)
        assert all(tensor.is_contiguous() for matrix in matrices for tensor in matrix)
        joined = torch.cat([matrix.dequantize(torch.float32) for matrix in matrices], dim=SHARDED_DIMENSION[field])
        assert torch.equal(joined, getattr(whole.layers[1], field).dequantize(torch.float32))


@pytest.mark.parametrize("quantize", FORMATS)
def test_the_plan_of_a_quantized_shard(quantized_folders: dict[str, Path], quantize: str) -> None:
    """Mapped are the rows, copied the columns, which are not contiguous in the file."""
    checkpoint = shard_of(open_checkpoint(quantized_folders[quantize]), Shard(1, 2))
    need = needed(MemoryPlan(checkpoint, torch.device("cpu"), None, RunShape(1, 2, 2)))
    weights = load(quantized_folders[quantize], shard=Shard(1, 2)).weights
    columns = sum(getattr(layer, field).nbytes for layer in weights.layers for field in ("wo", "w2"))
    assert need.copied == columns
    assert need.mapped == sum(matrix.nbytes for matrix in flat(weights)) - columns - weights.tok_embeddings.nbytes


def test_a_group_of_int4_is_not_split(folders: dict[str, Path], quantized_folders: dict[str, Path]) -> None:
    """16 columns of wo are half a group, and 8 rows of wk half a block; in int8 there are no groups."""
    load(quantized_folders["int8"], shard=Shard(1, 4))
    says = "wk.weight cannot be split among these processes: int4 has rows in groups of 16, and theirs are 8 of 32; use"
    with pytest.raises(UserError, match=says):
        load(quantized_folders["int4"], shard=Shard(1, 4))
    with pytest.raises(UserError, match=r"wo.weight is \[64, 16\], and int4 needs inputs in groups of 32; use int8"):
        load(folders["1"], shard=Shard(1, 4), quantize="int4", dtype=torch.bfloat16)


@pytest.mark.parametrize(("dimension", "wanted"), [(0, range(16, 32)), (0, range(32, 40)), (1, range(32, 96))])
def test_a_part_of_a_matrix(dimension: int, wanted: range) -> None:
    """The last rows too, of a block that is not full."""
    matrix = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    for kind in FORMATS.values():
        whole = kind.quantize(matrix)
        expected = whole.dequantize(torch.float32).narrow(dimension, wanted.start, len(wanted))
        assert torch.equal(whole.part(dimension, wanted).dequantize(torch.float32), expected)


def test_impossible_splits_are_refused(folders: dict[str, Path]) -> None:
    assert [size for size in range(1, 10) if not cannot_split(PARAMS, size)] == [1, 2, 4, 8]
    with pytest.raises(UserError, match=r"3 processes cannot share 8 heads evenly; possible numbers: 1, 2, 4, 8"):
        load(folders["1"], shard=Shard(0, 3))
    # 6 processes can share everything but the kv heads: neither number divides the other
    odd = Params.from_meta({**CONTENT, "dim": 96, "n_heads": 12, "n_kv_heads": 4, "vocab_size": 96})
    assert cannot_split(odd, 6) == "4 kv heads"


@pytest.mark.parametrize("size", [2, 4])
def test_the_memory_plan_of_a_shard(folders: dict[str, Path], size: int) -> None:
    whole = open_checkpoint(folders["hf"])
    shape = RunShape(prompt=30, text=100, least=30)

    def need(checkpoint: Any) -> Any:
        return needed(MemoryPlan(checkpoint, torch.device("cpu"), torch.bfloat16, shape))

    of_model, of_shard = need(whole), need(shard_of(whole, Shard(1, size)))
    assert of_shard.cache == of_model.cache // size
    norms = sum(2 * spec.shape[0] for spec in whole.shards if len(spec.shape) == 1)
    assert of_shard.copied == (of_model.copied - norms) // size + norms


MEASURED = """
import sys, psutil
from pathlib import Path
import torch
from llama3_raw.checkpoint.sharding import Shard
from llama3_raw.checkpoint.loading import load

memory = psutil.Process().memory_info
load(sys.argv[1], layers=1)  # exclude the memory of the first use of torch and of the zip file
before = memory().rss
model = load(sys.argv[1], shard=Shard(int(sys.argv[2]), int(sys.argv[3])))
of_layers = (matrix for layer in model.weights.layers for matrix in layer)
for matrix in (model.weights.output, model.weights.tok_embeddings, *of_layers):
    matrix.view(-1)[::1024].sum()  # a value of each page
print(memory().rss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages, as on Linux")
@pytest.mark.parametrize("n_files", [1, 4])
def test_a_shard_needs_a_fraction_of_the_memory(tmp_path: Path, n_files: int) -> None:
    content = {**CONTENT, "dim": 2048, "n_layers": 1, "vocab_size": 32768, "multiple_of": 8192}
    params = Params.from_meta(content)
    weights = random_weights(params, torch.bfloat16, seed=0)
    n_bytes = sum(tensor.nbytes for tensor in flat(weights))
    folder = write_shards(tmp_path / "model", content, weights, n_files)
    command = [sys.executable, "-c", MEASURED, str(folder), "2", "4"]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    around = 9 * 2 * 2**21  # the system may read a large page at both ends of each matrix
    assert 0.98 * n_bytes / 4 < taken < n_bytes / 4 + around < n_bytes / 2
