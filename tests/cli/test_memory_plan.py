"""What a run needs and what is free, with given numbers; and that what is offered instead is true."""

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
from llama3_raw.checkpoint.checkpoint import first_layers, open_checkpoint
from llama3_raw.checkpoint.loading import build_weights, to_state_dict
from llama3_raw.cli import models
from llama3_raw.cli.memory_plan import Lengths, Plan, check_memory, needed
from llama3_raw.system.machine import free_memory
from tests.paths import TINY
from tests.plans import CPU, GPU, checkpoint
from tests.references import hf_model, random_weights


def test_what_8b_needs() -> None:
    """The sizes that README gives; all of the cache is 128 KiB a token."""
    lengths = Lengths(17, 25, 18)
    mapped = needed(Plan(checkpoint(), CPU, None, lengths))
    embeddings = 2 * 128256 * 4096
    assert (mapped.mapped, mapped.copied, mapped.cache) == (16_060_522_496 - embeddings, 0, 25 * 131_072)
    assert mapped.work < 20e6
    assert needed(Plan(checkpoint(), CPU, torch.float32, lengths)).copied == 2 * 16_060_522_496
    assert needed(Plan(checkpoint(), GPU, None, lengths)).copied == 16_060_522_496
    tied = needed(Plan(checkpoint("1b"), CPU, None, lengths))
    assert tied.mapped == 2_471_628_800
    assert 300e6 < needed(Plan(checkpoint(), CPU, None, Lengths(8000, 8192, 8001))).work < 2e9


def test_a_batch() -> None:
    """Each text has a cache of its own, and its logits; the weights are there once."""
    one, many = (needed(Plan(checkpoint(), CPU, None, Lengths(17, 273, 18, rows=rows))) for rows in (1, 16))
    assert (many.mapped, many.copied, many.cache) == (one.mapped, one.copied, 16 * one.cache)
    assert many.work - one.work > 16 * 128256 * 10


def test_copies_on_the_cpu() -> None:
    """wq and wk of Hugging Face's files stand in another order; the matrices of shards are joined."""
    lengths = Lengths(1, 1, 2)
    assert needed(Plan(checkpoint(hf=True), CPU, None, lengths)).copied == 2 * 32 * (4096 + 1024) * 4096
    norms = 2 * 65 * 4096
    joined = needed(Plan(checkpoint(shards=2), CPU, None, lengths))
    assert (joined.mapped, joined.copied) == (norms, 16_060_522_496 - norms)


def test_a_model_on_two_devices() -> None:
    """A layer of 8B has 436,207,616 bytes of matrices, and two norms of 8,192; of another order or dtype, copies."""
    lengths = Lengths(17, 25, 18)
    layer, norms, table = 436_207_616, 65 * 8192, 2 * 128256 * 4096
    whole = needed(Plan(checkpoint(), GPU, None, lengths))
    shared = needed(Plan(checkpoint(), GPU, None, lengths, gpu_layers=10))
    assert (shared.copied, shared.mapped, shared.in_ram) == (10 * layer + norms + table, 22 * layer, 0)
    assert (shared.cache, shared.work) == (whole.cache, whole.work)
    assert whole.copied == 32 * layer + norms + 2 * table  # the embeddings too
    hf = needed(Plan(checkpoint(hf=True), GPU, None, lengths, gpu_layers=10))
    assert (hf.copied, hf.in_ram) == (shared.copied, 22 * 2 * (4096 + 1024) * 4096)
    assert hf.mapped == shared.mapped - hf.in_ram
    in_fp32 = needed(Plan(checkpoint(), GPU, torch.float32, lengths, gpu_layers=10))
    assert (in_fp32.mapped, in_fp32.in_ram) == (0, 2 * (22 * layer + table))
    tied = needed(Plan(checkpoint("1b"), GPU, None, lengths, gpu_layers=16))
    assert (tied.copied, tied.mapped, tied.in_ram) == (2_471_628_800, 0, 0)


def test_scores_are_those_of_the_exact_operations() -> None:
    """The fast ones of a GPU have none; what they have is a part of the cache, and in int8 a piece of a matrix."""
    plan = Plan(checkpoint(), GPU, None, Lengths(131_000, 131_072, 18))
    fast, exact = needed(plan), needed(plan._replace(exact=True))
    scores = 32 * 256 * 131_000 * 2
    assert fast.work - 500_000_000 < 0.03 * fast.cache < scores < exact.work
    assert needed(plan._replace(quantized=True)).work - fast.work == 2**28
    assert needed(plan._replace(device=CPU)).work == exact.work - 500_000_000
    small = needed(Plan(first_layers(open_checkpoint(TINY), 1), GPU, None, Lengths(1, 2, 2), quantized=True))
    assert small.work < 500_000_000 + 2 * 2304 * 192 + 10_000


@pytest.mark.parametrize("option", [[], ["--reference"]])
def test_the_operations_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(models, "check_memory", plans.append)
    assert main(["--weights", str(TINY), "--device", "cpu", "One", "--max-new-tokens", "1", *option]) == 0
    assert [plan.exact for plan in plans] == [bool(option)]


def test_what_does_not_fit_on_the_cpu_beside_a_gpu() -> None:
    """Weights that are copied there are refused; mapped ones are read again for each token, which is said."""
    plan = Plan(checkpoint(), GPU, torch.float32, Lengths(17, 273, 18), gpu_layers=10)
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
    assert "9.60 GB are needed, 6.00 GB are free, so that each token reads weights from the disk again" in warning
    assert warning.endswith("what fits: --quantize int8, or --gpu-layers 23, or --layers 23")


def test_what_is_mapped_may_be_larger_than_the_memory() -> None:
    plan = Plan(checkpoint(), CPU, None, Lengths(17, 273, 18))
    assert check_memory(plan, lambda device: 16 * 10**9) is None
    warning = check_memory(plan, lambda device: 10 * 10**9)
    assert warning is not None
    assert "15.06 GB are needed, 10.00 GB are free" in warning
    assert re.search(r"what fits: --quantize int8, or --layers \d\d$", warning)


FREE = {CPU: 24 * 10**9, GPU: 12 * 10**9}
REFUSED = {
    "another dtype": (
        Plan(checkpoint(), CPU, torch.float32, Lengths(17, 273, 18)),
        ["no --dtype", "--layers 22"],
    ),
    "a long cache": (Plan(checkpoint(), CPU, None, Lengths(17, 200_000, 18)), ["--context 145792", "--layers 21"]),
    "a large batch": (
        Plan(checkpoint(), CPU, None, Lengths(17, 1273, 18, rows=200)),
        ["--batch-size 113", "--context 718", "--layers 14"],
    ),
    "fp32 in two shards": (
        Plan(checkpoint(shards=2, dtype=torch.float32), CPU, None, Lengths(17, 273, 18)),
        ["--dtype bfloat16", "--layers 22"],
    ),
    "a GPU": (
        Plan(checkpoint(), GPU, None, Lengths(17, 273, 18)),
        ["--quantize int8", "--gpu-layers 23", "--device cpu", "--layers 21"],
    ),
    "too many layers on a GPU": (
        Plan(checkpoint(), GPU, None, Lengths(17, 273, 18), gpu_layers=30),
        ["--quantize int8", "--gpu-layers 23", "--device cpu without --gpu-layers"],
    ),
    "bf16 of fp32 on a GPU": (
        Plan(checkpoint("8b", dtype=torch.float32), GPU, torch.bfloat16, Lengths(17, 273, 18)),
        ["--quantize int8", "--gpu-layers 23", "--device cpu", "--layers 21"],
    ),
    "1b in fp32 with a long cache on a GPU": (
        Plan(checkpoint("1b", dtype=torch.float32), GPU, None, Lengths(17, 131_072, 18)),
        ["--dtype bfloat16", "--gpu-layers 7", "--device cpu", "--context 99097", "--layers 13"],
    ),
    "the same by the exact operations": (
        Plan(checkpoint("1b", dtype=torch.float32), GPU, None, Lengths(17, 131_072, 18), exact=True),
        ["--dtype bfloat16", "--device cpu", "--context 66422", "--layers 7"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_offered_fits_and_one_more_does_not(case: str) -> None:
    plan, offers = REFUSED[case]
    with pytest.raises(UserError) as caught:
        check_memory(plan, FREE.__getitem__)
    assert str(caught.value).endswith(f"what fits: {', or '.join(offers)}")

    def fits(plan: Plan) -> bool:
        return needed(plan).own <= FREE[plan.device] and needed(plan).in_ram <= FREE[CPU]

    for offer in offers:
        option, value = offer.removesuffix(" without --gpu-layers").rsplit(" ", 1)
        if option == "--layers":
            assert fits(plan._replace(checkpoint=first_layers(plan.checkpoint, int(value))))
            assert not fits(plan._replace(checkpoint=first_layers(plan.checkpoint, int(value) + 1)))
        elif option == "--context":
            assert fits(plan._replace(lengths=plan.lengths._replace(text=int(value))))
            assert not fits(plan._replace(lengths=plan.lengths._replace(text=int(value) + 1)))
        elif option == "--batch-size":
            assert fits(plan._replace(lengths=plan.lengths._replace(rows=int(value))))
            assert not fits(plan._replace(lengths=plan.lengths._replace(rows=int(value) + 1)))
        elif option == "--gpu-layers":
            assert fits(plan._replace(gpu_layers=int(value)))
            assert not fits(plan._replace(gpu_layers=int(value) + 1))
        elif option == "--device":
            assert fits(plan._replace(device=torch.device(value), gpu_layers=None))
        elif option == "--quantize":
            assert fits(plan._replace(quantized=True))
        else:
            assert fits(plan._replace(dtype=None if option == "no" else torch.bfloat16))


def test_nothing_is_offered_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="nothing of it fits, take a smaller model"):
        check_memory(Plan(checkpoint(), GPU, None, Lengths(17, 273, 18)), lambda device: 10**6)


def pretend(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


def test_the_offer_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, 7_000_000)
    arguments = ["--weights", str(TINY), "--device", "cpu", "One", "--max-new-tokens", "3", "--dtype", "float32"]
    assert main(arguments) == 2
    assert "what fits: no --dtype, or --layers 3\n" in capsys.readouterr().err
    assert main([*arguments, "--layers", "3"]) == 0
    assert main(arguments[:-2]) == 0


def test_a_model_larger_than_the_memory_runs_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 3_000_000)
    monkeypatch.setattr(models, "PROGRESS_BAR_FROM", 0)
    assert main(["--weights", str(TINY), "--device", "cpu", "Once upon a time", "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == ", there was"
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "loading" not in err  # what would not stay in memory is not read in beforehand
    assert warnings[0].startswith(f"llama3_raw: warning: {TINY / 'consolidated.00.pth'}: 4.1 MB are needed, 3.0 MB are")
    assert warnings[0].endswith("what fits: --quantize int8, or --layers 2")


MEASURE = """
import sys, torch
from pathlib import Path
from llama3_raw.cli.memory_plan import Lengths, Plan, needed
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import build_weights
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
opened = open_checkpoint(Path(sys.argv[1]))
dtype = torch.float32 if sys.argv[2] == "fp32" else None
before = anonymous()
weights = build_weights(opened, torch.device("cpu"), dtype)
print(needed(Plan(opened, torch.device("cpu"), dtype, Lengths(1, 1, 2))).copied, anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
@pytest.mark.parametrize("case", ["as stored", "fp32", "hf"])
def test_the_need_is_what_a_load_takes(tmp_path: Path, case: str) -> None:
    """In a process of its own, since this one has memory to spare from other tests."""
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
def test_what_a_gpu_run_takes() -> None:
    """The need is enough, and no more than a gigabyte too much."""
    opened = open_checkpoint(TINY)
    before = free_memory(GPU)
    weights = build_weights(opened, GPU)
    tokens = generate(Model(weights, opened.params, None), [1, 2, 3], max_new_tokens=100)
    assert len(list(tokens)) > 1
    need = needed(Plan(opened, GPU, None, Lengths(3, 103, 4)))
    assert before - free_memory(GPU) <= need.own <= before - free_memory(GPU) + 10**9
