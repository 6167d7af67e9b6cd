"""Estimates for GPUs, compared with published figures and with the real tensors, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import llama3_raw
from llama3_raw import KVCache, Params, UserError
from llama3_raw.bench.__main__ import main
from llama3_raw.bench.engines import matrices_of
from llama3_raw.bench.estimate import GPUS, Cluster, check_split, estimate, shard_numel
from llama3_raw.bench.synthetic import SYNTHETIC, synthetic_checkpoint
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.quantization.matrix import FORMATS
from tests.paths import TINY

H200 = Cluster("h200")


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),
        ("70b", 70_553_706_496),
        ("405b", 405_853_388_800),
    ],
)
def test_sizes_match_metas_list(size: str, parameters: float) -> None:
    """The numbers of parameters are those of Meta's safetensors on Hugging Face."""
    from llama_models.sku_list import llama3_1_family, llama3_2_family, llama3_family

    listed = [*llama3_family(), *llama3_1_family(), *llama3_2_family()]
    names = {
        "1b": "Llama3.2-1B",
        "3b": "Llama3.2-3B",
        "8b": "Llama-3-8B",
        "70b": "Llama-3-70B",
        "405b": "Llama3.1-405B",
    }
    content = next(model.arch_args for model in listed if model.descriptor() == names[size])
    checkpoint = synthetic_checkpoint(size)
    assert checkpoint.params == Params.from_meta(content)
    assert estimate(checkpoint, Cluster("h200", 8), 1, [1]).weights_bytes_in_all == 2 * parameters


def test_8b_on_one_gpu() -> None:
    """The bytes are those of its checkpoint. 4.3 TB/s, as a copy on an H200 reaches, gives 286 tokens/s."""
    result = estimate(synthetic_checkpoint("8b"), H200._replace(bandwidth=4.3e12), 1, [1])
    assert result.weights_bytes == result.weights_bytes_in_all == 16_060_522_496
    assert result.weights_bytes_per_token == 15_009_849_344
    assert result.cache_bytes_per_token == result.cache_bytes_per_token_in_all == 131_072
    (step,) = result.steps
    assert step.tokens_per_second == pytest.approx(286, abs=0.6)
    assert step.all_reduce_seconds == step.gather_seconds == 0
    assert result.free_bytes == 141_000_000_000 - 2_000_000_000 - 16_060_522_496
    assert result.cache_tokens == result.free_bytes // 131_072


def test_tied_embeddings_are_read() -> None:
    result = estimate(synthetic_checkpoint("1b"), H200, 1, [1])
    assert result.weights_bytes_per_token == result.weights_bytes == pytest.approx(2.472e9, rel=1e-3)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 32])
def test_shards_add_up_to_the_model(gpus: int) -> None:
    """All GPUs together have each matrix once, except kv heads that several share, and norms, which all have."""
    checkpoint = synthetic_checkpoint("70b")
    params = checkpoint.params
    for spec in checkpoint.shards:
        whole = torch.Size(spec.shape).numel()
        copies = gpus if len(spec.shape) == 1 else max(1, gpus // 8) if spec.field in ("wk", "wv") else 1
        assert gpus * shard_numel(spec, params, gpus) == copies * whole, spec.meta_name
    result = estimate(checkpoint, Cluster("b200", gpus), 1, [1])
    assert result.cache_bytes_per_token_in_all == 327_680
    assert gpus * result.cache_bytes_per_token == max(1, gpus // 8) * 327_680


def test_70b_on_eight() -> None:
    """Computed by hand: (141.1 - 2.1) GB / 8 at 4.32 TB/s, 161 all-reduces of 15 µs; their bytes hardly count."""
    result = estimate(synthetic_checkpoint("70b"), Cluster("h200", 8), 1, [1])
    assert result.all_reduces == 161
    (step,) = result.steps
    assert step.all_reduce_bytes == 2 * 8192
    assert step.read_seconds == pytest.approx(4.022e-3, rel=1e-3)
    assert step.all_reduce_latency_seconds == pytest.approx(161 * 15e-6)
    assert step.all_reduce_seconds - step.all_reduce_latency_seconds == pytest.approx(161 * 2 * 7 / 8 * 16384 / 360e9)
    assert step.tokens_per_second == pytest.approx(1 / (4.022e-3 + 2.428e-3 + 0.016e-3), rel=1e-3)


def test_messages_across_nodes() -> None:
    """A ring within the node, then each of the 8 GPUs sends its eighth over a port of 50 GB/s."""
    cluster = Cluster("h200", 16, nodes=2, latency=10e-6)
    n_bytes = 8e6
    within, across = 7 / 8 * n_bytes / 360e9, 1 / 2 * n_bytes / 8 / 50e9
    assert cluster.gather_seconds(n_bytes) == pytest.approx(10e-6 + within + across)
    assert cluster.all_reduce_seconds(n_bytes) == pytest.approx(10e-6 + 2 * (within + across))
    assert Cluster("h200", 16, nodes=2).all_reduce_seconds(0) > 2 * Cluster("h200", 8).all_reduce_seconds(0)


def test_many_texts_are_limited_by_arithmetic() -> None:
    one, many = estimate(synthetic_checkpoint("8b"), H200, 1, [1, 2000]).steps
    assert one.read_seconds > one.multiply_seconds
    assert many.multiply_seconds > many.read_seconds
    assert many.tokens_per_second == pytest.approx(2000 / many.multiply_seconds)


def test_bytes_match_the_loaded_tensors(tmp_path: Path) -> None:
    """For the built-in model in bf16, in int8 and in int4."""
    for name in FORMATS:
        save_quantized(TINY, open_checkpoint(TINY), tmp_path / name, quantize=name)
    for folder, dtype in ((TINY, "bfloat16"), *((tmp_path / name, name) for name in FORMATS)):
        model = llama3_raw.load(folder)
        result = estimate(open_checkpoint(folder), H200, 1, [1])
        assert result.dtype == dtype
        norms = 2 * (2 * model.params.n_layers + 1) * model.params.dim
        assert result.weights_bytes_per_token == sum(matrix.nbytes for matrix in matrices_of(model.weights)) + norms
        cache = KVCache.allocate(model.params, max_seq_len=10, like=model.weights)
        assert 10 * result.cache_bytes_per_token == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))


@pytest.mark.parametrize(
    ("size", "possible"),
    [
        ("8b", {1, 2, 4, 8, 16, 32}),
        ("3b", {1, 2, 4, 8}),  # 24 heads: 3 does not divide hidden_dim
        ("70b", {1, 2, 4, 8, 16, 32, 64}),
        ("405b", {1, 2, 4, 8, 16, 32, 64, 128}),
    ],
)
def test_possible_numbers_of_gpus(size: str, possible: set[int]) -> None:
    params = Params.from_meta(SYNTHETIC[size][0])
    for gpus in range(1, 257):
        if gpus in possible:
            check_split(params, gpus)
        else:
            with pytest.raises(
                UserError, match=f"--gpus {gpus}: .* possible numbers: {', '.join(map(str, sorted(possible)))}"
            ):
                check_split(params, gpus)


def test_kv_heads_that_can_neither_be_split_nor_shared() -> None:
    params = Params.from_meta({**SYNTHETIC["8b"][0], "n_heads": 12, "n_kv_heads": 6, "dim": 768, "multiple_of": 192})
    with pytest.raises(UserError, match="cannot share 6 kv heads evenly"):
        check_split(params, 4)


def test_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--estimate", "70b", "--gpu", "H200", "--gpus", "8", "--latency", "10", "--bandwidth", "4"]) == 0
    table, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "an estimate, not a measurement" in table
    assert "at 4.00 TB/s" in table
    result = json.loads(last)
    assert [step["batch"] for step in result["steps"]] == [1, 16]
    for step in result["steps"]:
        assert step["all_reduce_latency_seconds"] == pytest.approx(161 * 10e-6)
        assert f"{step['tokens_per_second']:.1f}\n" in table + "\n"
    assert main(["--gpus=2", f"--estimate={TINY}"]) == 0  # in any order, with a folder
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["weights_bytes_in_all"] > 4_000_000


def test_help_shows_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--estimate", "8b", "--help"])
    shown = capsys.readouterr().out
    assert "--latency" in shown
    assert "--prefill" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("8b --gpus 3", "--gpus 3: 3 GPUs cannot share 32 heads evenly; possible numbers: 1, 2, 4, 8, 16, 32"),
        ("405b --gpus 4", r"209\.16 GB are needed on each of 4 h200 .* what fits: --gpus 8 --batch 1"),
        ("70b --gpus 2 --batch 1000", "what fits: --batch 203"),
        ("8b --gpu rtx4090 --context 100000", r"what fits: --batch 1 --context 45\d\d\d"),
        ("405b --gpu rtx4090", "what fits: --gpus 64 --batch 1"),
        ("405b --gpu rtx4090 --context 600000", "choose a larger --gpu"),
        ("70b --gpus 8 --nodes 3", "--nodes 3"),
        ("9b", "--estimate 9b: there is no such folder"),
        ("8b --gpu h300", "invalid choice: 'h300'"),
        ("8b --latency 0", "should be a positive number"),
        ("8b --vs llama.cpp", "unrecognized arguments: --vs"),
    ],
)
def test_refusals(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--estimate", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert re.search(message, err), err


@pytest.mark.parametrize("name", GPUS)
def test_suggestions_fit(name: str) -> None:
    """The batch that an error suggests fits, and one more does not."""
    checkpoint, cluster = synthetic_checkpoint("8b"), Cluster(name)
    batch = estimate(checkpoint, cluster, 100, [1]).cache_tokens // 100
    assert estimate(checkpoint, cluster, 100, [batch]).steps[0].batch == batch
    with pytest.raises(UserError, match=f"what fits: --batch {batch}$"):
        estimate(checkpoint, cluster, 100, [batch + 1])
