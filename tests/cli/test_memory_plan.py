"""The memory that a run needs against what is free, with given numbers, and whether the suggestions fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from llama3_raw import Model, Params, UserError, generate
from llama3_raw.__main__ import main
from llama3_raw.checkpoint.checkpoint import Checkpoint, first_layers, open_checkpoint
from llama3_raw.checkpoint.loading import build_weights, to_state_dict
from llama3_raw.cli import models
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, check_memory, needed
from llama3_raw.system.machine import free_memory
from tests.paths import TINY
from tests.plans import CPU, GPU, checkpoint
from tests.references import hf_model, random_weights


def test_what_8b_needs() -> None:
    """The sizes in the docs; the KV cache takes 128 KiB a token."""
    lengths = RunShape(17, 25, 18)
    mapped = needed(MemoryPlan(checkpoint(), CPU, None, lengths))
    embeddings = 2 * 128256 * 4096
    assert (mapped.mapped, mapped.copied, mapped.cache) == (16_060_522_496 - embeddings, 0, 25 * 131_072)
    assert mapped.work < 20e6
    assert needed(MemoryPlan(checkpoint(), CPU, torch.float32, lengths)).copied == 2 * 16_060_522_496
    assert needed(MemoryPlan(checkpoint(), GPU, None, lengths)).copied == 16_060_522_496
    tied = needed(MemoryPlan(checkpoint("1b"), CPU, None, lengths))
    assert tied.mapped == 2_471_628_800
    assert 300e6 < needed(MemoryPlan(checkpoint(), CPU, None, RunShape(8000, 8192, 8001))).work < 2e9


def test_a_batch_has_a_cache_for_each_text() -> None:
    """Each text has its own cache and logits; the weights are shared."""
    one, many = (needed(MemoryPlan(checkpoint(), CPU, None, RunShape(17, 273, 18, rows=rows))) for rows in (1, 16))
    assert (many.mapped, many.copied, many.cache) == (one.mapped, one.copied, 16 * one.cache)
    assert many.work - one.work > 16 * 128256 * 10


def test_what_is_copied_on_the_cpu() -> None:
    """wq and wk of Hugging Face's files, which are in another order, and matrices that are joined from shards."""
    lengths = RunShape(1, 1, 2)
    assert needed(MemoryPlan(checkpoint(hf=True), CPU, None, lengths)).copied == 2 * 32 * (4096 + 1024) * 4096
    norms = 2 * 65 * 4096
    joined = needed(MemoryPlan(checkpoint(shards=2), CPU, None, lengths))
    assert (joined.mapped, joined.copied) == (norms, 16_060_522_496 - norms)


def test_a_model_on_gpu_and_cpu() -> None:
    """A layer of 8B has 436,207,616 bytes of matrices and two norms of 8,192; another order or dtype needs copies."""
    lengths = RunShape(17, 25, 18)
    layer, norms, table = 436_207_616, 65 * 8192, 2 * 128256 * 4096
    whole = needed(MemoryPlan(checkpoint(), GPU, None, lengths))
    shared = needed(MemoryPlan(checkpoint(), GPU, None, lengths, gpu_layers=10))
    assert (shared.copied, shared.mapped, shared.in_ram) == (10 * layer + norms + table, 22 * layer, 0)
    assert (shared.cache, shared.work) == (whole.cache, whole.work)
    assert whole.copied == 32 * layer + norms + 2 * table  # the embeddings too
    hf = needed(MemoryPlan(checkpoint(hf=True), GPU, None, lengths, gpu_layers=10))
    assert (hf.copied, hf.in_ram) == (shared.copied, 22 * 2 * (4096 + 1024) * 4096)
    assert hf.mapped == shared.mapped - hf.in_ram
    in_fp32 = needed(MemoryPlan(checkpoint(), GPU, torch.float32, lengths, gpu_layers=10))
    assert (in_fp32.mapped, in_fp32.in_ram) == (0, 2 * (22 * layer + table))
    tied = needed(MemoryPlan(checkpoint("1b"), GPU, None, lengths, gpu_layers=16))
    assert (tied.copied, tied.mapped, tied.in_ram) == (2_471_628_800, 0, 0)


def test_only_the_exact_operations_need_memory_for_scores() -> None:
    """A GPU's fast operations need a part of the cache instead, and in int8 a slice of a dequantized matrix."""
    plan = MemoryPlan(checkpoint(), GPU, None, RunShape(131_000, 131_072, 18))
    fast, exact = needed(plan), needed(plan._replace(exact=True))
    scores = 32 * 256 * 131_000 * 2
    assert fast.work - 500_000_000 < 0.03 * fast.cache < scores < exact.work
    assert needed(plan._replace(quantize="int8")).work - fast.work == 2**28
    assert needed(plan._replace(device=CPU)).work == exact.work - 500_000_000
    small = needed(MemoryPlan(first_layers(open_checkpoint(TINY), 1), GPU, None, RunShape(1, 2, 2), quantize="int8"))
    assert small.work < 500_000_000 + 2 * 2304 * 192 + 10_000


@pytest.mark.parametrize("option", [[], ["--reference"]])
def test_each_option_plans_with_its_own_operations(monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    plans: list[MemoryPlan] = []
    monkeypatch.setattr(models, "check_memory", plans.append)
    assert main(["--weights", str(TINY), "--device", "cpu", "One", "--max-new-tokens", "1", *option]) == 0
    assert [plan.exact for plan in plans] == [bool(option)]


def test_the_bytes_of_quantized_matrices() -> None:
    """Of 8B: 7.0e9 values in layers in 4.5 bits, with 8 bytes for each output, and an output matrix in int8."""
    plan = MemoryPlan(checkpoint(), CPU, None, RunShape(17, 25, 18))
    values, outputs = 32 * 218_103_808, 32 * (4096 + 1024 + 1024 + 4096 + 14336 + 4096 + 14336)
    inputs = 32 * (6 * 4096 + 14336)
    output = 128256 * 4096 + 4 * (128256 + 4096)
    assert needed(plan._replace(quantize="int8")).copied == values + 4 * (outputs + inputs) + output
    in_int4 = needed(plan._replace(quantize="int4"))
    assert in_int4.copied == values * 9 // 16 + 8 * outputs + output
    assert in_int4.mapped == 65 * 8192  # the norms
    tied = MemoryPlan(checkpoint("1b"), CPU, None, RunShape(17, 25, 18), quantize="int4")
    assert needed(tied).copied == 973_078_528 * 9 // 16 + 8 * 16 * (2 * 2048 + 2 * 512 + 2 * 8192 + 2048) + (
        128256 * 2048 + 4 * (128256 + 2048)
    )


def test_int4_is_suggested_where_int8_does_not_fit() -> None:
    """But not for matrices that it does not have, nor for those that are quantized."""
    shape = RunShape(17, 273, 18)

    def says(checkpoint: Checkpoint, quantize: str | None = None) -> str:
        with pytest.raises(UserError) as caught:
            check_memory(MemoryPlan(checkpoint, GPU, None, shape, quantize=quantize), lambda device: 7 * 10**9)
        return str(caught.value)

    eight_b = checkpoint()
    assert "what fits: --quantize int4, or --gpu-layers" in says(eight_b)
    assert "weights in int8 " in says(eight_b, "int8")
    assert "what fits: --quantize int4, or" in says(eight_b, "int8")
    odd = {spec._replace(shape=(4096, 14340)) if spec.field == "w2" else spec: t for spec, t in eight_b.shards.items()}
    assert "--quantize" not in says(eight_b._replace(shards=odd))


def test_what_does_not_fit_on_the_cpu_of_a_gpu_run() -> None:
    """Copied weights are refused there; mapped ones are read again for each token, with a warning."""
    plan = MemoryPlan(checkpoint(), GPU, torch.float32, RunShape(17, 273, 18), gpu_layers=10)
    with pytest.raises(UserError) as caught:
        check_memory(plan, {GPU: 24 * 10**9, CPU: 20 * 10**9}.__getitem__)
    assert "21.29 GB are needed on cpu (weights in float32 of the layers that are not on cuda), 20.00 GB" in str(
        caught.value
    )
    assert str(caught.value).endswith("what fits: no --dtype, or --gpu-layers 24, or --layers 30")
    free = {GPU: 12 * 10**9, CPU: 6 * 10**9}
    assert check_memory(plan._replace(dtype=None, gpu_layers=20), free.__getitem__) is None
    warning = check_memory(plan._replace(dtype=None), free.__getitem__)
    assert warning is not None
    assert "9.60 GB are needed, 6.00 GB are free, so each token reads weights from the disk again" in warning
    assert warning.endswith("what fits: --quantize int8, or --gpu-layers 23, or --layers 23")


def test_mapped_weights_may_exceed_the_memory() -> None:
    plan = MemoryPlan(checkpoint(), CPU, None, RunShape(17, 273, 18))
    assert check_memory(plan, lambda device: 16 * 10**9) is None
    warning = check_memory(plan, lambda device: 10 * 10**9)
    assert warning is not None
    assert "15.06 GB are needed, 10.00 GB are free" in warning
    assert re.search(r"what fits: --quantize int8, or --layers \d\d$", warning)


FREE = {CPU: 24 * 10**9, GPU: 12 * 10**9}
REFUSED = {
    "another dtype": (
        MemoryPlan(checkpoint(), CPU, torch.float32, RunShape(17, 273, 18)),
        ["no --dtype", "--layers 22"],
    ),
    "a long cache": (
        MemoryPlan(checkpoint(), CPU, None, RunShape(17, 200_000, 18)),
        ["--context 145792", "--layers 21"],
    ),
    "a large batch": (
        MemoryPlan(checkpoint(), CPU, None, RunShape(17, 1273, 18, rows=200)),
        ["--batch-size 113", "--context 718", "--layers 14"],
    ),
    "fp32 in two shards": (
        MemoryPlan(checkpoint(shards=2, dtype=torch.float32), CPU, None, RunShape(17, 273, 18)),
        ["--dtype bfloat16", "--layers 22"],
    ),
    "a GPU": (
        MemoryPlan(checkpoint(), GPU, None, RunShape(17, 273, 18)),
        ["--quantize int8", "--gpu-layers 23", "--device cpu", "--layers 21"],
    ),
    "too many layers on a GPU": (
        MemoryPlan(checkpoint(), GPU, None, RunShape(17, 273, 18), gpu_layers=30),
        ["--quantize int8", "--gpu-layers 23", "--device cpu without --gpu-layers"],
    ),
    "bf16 of fp32 on a GPU": (
        MemoryPlan(checkpoint("8b", dtype=torch.float32), GPU, torch.bfloat16, RunShape(17, 273, 18)),
        ["--quantize int8", "--gpu-layers 23", "--device cpu", "--layers 21"],
    ),
    "1b in fp32 with a long cache on a GPU": (
        MemoryPlan(checkpoint("1b", dtype=torch.float32), GPU, None, RunShape(17, 131_072, 18)),
        ["--dtype bfloat16", "--gpu-layers 7", "--device cpu", "--context 99097", "--layers 13"],
    ),
    "the same by the exact operations": (
        MemoryPlan(checkpoint("1b", dtype=torch.float32), GPU, None, RunShape(17, 131_072, 18), exact=True),
        ["--dtype bfloat16", "--device cpu", "--context 66422", "--layers 7"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_suggestion_fits_and_one_more_does_not(case: str) -> None:
    plan, suggestions = REFUSED[case]
    with pytest.raises(UserError) as caught:
        check_memory(plan, FREE.__getitem__)
    assert str(caught.value).endswith(f"what fits: {', or '.join(suggestions)}")

    def fits(plan: MemoryPlan) -> bool:
        return needed(plan).allocated <= FREE[plan.device] and needed(plan).in_ram <= FREE[CPU]

    for offer in suggestions:
        option, value = offer.removesuffix(" without --gpu-layers").rsplit(" ", 1)
        if option == "--layers":
            assert fits(plan._replace(checkpoint=first_layers(plan.checkpoint, int(value))))
            assert not fits(plan._replace(checkpoint=first_layers(plan.checkpoint, int(value) + 1)))
        elif option == "--context":
            assert fits(plan._replace(shape=plan.shape._replace(text=int(value))))
            assert not fits(plan._replace(shape=plan.shape._replace(text=int(value) + 1)))
        elif option == "--batch-size":
            assert fits(plan._replace(shape=plan.shape._replace(rows=int(value))))
            assert not fits(plan._replace(shape=plan.shape._replace(rows=int(value) + 1)))
        elif option == "--gpu-layers":
            assert fits(plan._replace(gpu_layers=int(value)))
            assert not fits(plan._replace(gpu_layers=int(value) + 1))
        elif option == "--device":
            assert fits(plan._replace(device=torch.device(value), gpu_layers=None))
        elif option == "--quantize":
            assert fits(plan._replace(quantize="int8"))
        else:
            assert fits(plan._replace(dtype=None if option == "no" else torch.bfloat16))


def test_no_suggestion_if_nothing_fits() -> None:
    with pytest.raises(UserError, match="no option makes it fit, choose a smaller model"):
        check_memory(MemoryPlan(checkpoint(), GPU, None, RunShape(17, 273, 18)), lambda device: 10**6)


def pretend(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


def test_a_suggestion_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, 7_000_000)
    arguments = ["--weights", str(TINY), "--device", "cpu", "One", "--max-new-tokens", "3", "--dtype", "float32"]
    assert main(arguments) == 2
    assert "what fits: no --dtype, or --layers 3\n" in capsys.readouterr().err
    assert main([*arguments, "--layers", "3"]) == 0
    assert main(arguments[:-2]) == 0


def test_a_model_larger_than_the_memory_runs_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 3_200_000)
    monkeypatch.setattr(models, "PROGRESS_BAR_FROM", 0)
    assert main(["--weights", str(TINY), "--device", "cpu", "Once upon a time", "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == ", there was"
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "loading" not in err  # what would not stay in memory is not read in beforehand
    assert warnings[0].startswith(f"llama3_raw: warning: {TINY / 'consolidated.00.pth'}: 4.1 MB are needed, 3.2 MB are")
    assert warnings[0].endswith("what fits: --quantize int8, or --layers 2")


MEASURE = """
import sys, torch
from pathlib import Path
from llama3_raw.cli.memory_plan import RunShape, MemoryPlan, needed
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import build_weights
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
opened = open_checkpoint(Path(sys.argv[1]))
dtype = torch.float32 if sys.argv[2] == "fp32" else None
before = anonymous()
weights = build_weights(opened, torch.device("cpu"), dtype)
print(needed(MemoryPlan(opened, torch.device("cpu"), dtype, RunShape(1, 1, 2))).copied, anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
@pytest.mark.parametrize("case", ["as stored", "fp32", "hf"])
def test_the_plan_matches_the_memory_of_a_load(tmp_path: Path, case: str) -> None:
    """In a separate process, because this one has free memory from other tests."""
    content = {"dim": 1024, "n_layers": 2, "n_heads": 8, "vocab_size": 1000, "norm_eps": 1e-5}
    params = Params.from_meta(content)
    weights = random_weights(params, torch.bfloat16, seed=0)
    if case == "hf":
        hf_model(params, weights).save_pretrained(tmp_path)
    else:
        (tmp_path / "params.json").write_text(json.dumps(content))
        torch.save(to_state_dict(params, weights), tmp_path / "consolidated.00.pth")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    copied, taken = map(int, done.stdout.split())
    assert (copied > 0) == (case != "as stored")
    assert taken == pytest.approx(copied, rel=0.05, abs=3e6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_the_plan_matches_the_memory_of_a_gpu_run() -> None:
    """The plan is enough, and at most a gigabyte too much."""
    opened = open_checkpoint(TINY)
    before = free_memory(GPU)
    weights = build_weights(opened, GPU)
    tokens = generate(Model(weights, opened.params, None), [1, 2, 3], max_new_tokens=100)
    assert len(list(tokens)) > 1
    need = needed(MemoryPlan(opened, GPU, None, RunShape(3, 103, 4)))
    assert before - free_memory(GPU) <= need.allocated <= before - free_memory(GPU) + 10**9
