"""Synthetic checkpoints: the format, the size, the memory needed to create and to run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import llama3_raw
from llama3_raw import UserError
from llama3_raw.bench import baselines, synthetic
from llama3_raw.bench import measure as measuring
from llama3_raw.bench.__main__ import main
from llama3_raw.bench.engines import ThisEngine
from llama3_raw.bench.synthetic import SYNTHETIC, make_synthetic, random_weights, synthetic_checkpoint
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, check_memory, needed
from llama3_raw.params import Params
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import FORMATS, tensors_of
from llama3_raw.weights import MATRICES, format_name, tensor_specs
from tests.references import dense

CPU = torch.device("cpu")
PROMPT = "the answer to the ultimate question of life, the universe, and everything is "


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a quick size, 8b with narrower layers, and use chunks smaller than its tensors."""
    content = {**SYNTHETIC["8b"][0], "dim": 128, "n_layers": 2, "multiple_of": 64}
    monkeypatch.setitem(synthetic.SYNTHETIC, "small", (content, False))
    monkeypatch.setattr(synthetic, "CHUNK", 10_000)


@pytest.mark.usefixtures("small")
def test_checkpoint_in_metas_format(tmp_path: Path, meta_tokenizer_file: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert main(["--make-synthetic", "small", str(folder), "--tokenizer", str(meta_tokenizer_file)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    model = llama3_raw.load(folder)
    ours = model.weights.layers[1].w2
    theirs = torch.load(folder / "consolidated.00.pth", weights_only=True)["layers.1.feed_forward.w2.weight"]
    assert torch.equal(dense(ours), dense(theirs))
    assert ours.float().std() == pytest.approx(0.02, rel=0.02)
    assert ours.float().mean() == pytest.approx(0, abs=0.001)
    assert (model.weights.norm == 1).all()
    assert dense(model.weights.layers[0].w1)[0, 0] != dense(model.weights.layers[1].w1)[0, 0]


@pytest.mark.usefixtures("small")
def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "consolidated.00.pth").write_text("precious")
    assert main(["--make-synthetic", "small", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "consolidated.00.pth").read_text() == "precious"


@pytest.mark.usefixtures("small")
def test_tokenizer_that_is_already_in_the_folder(tmp_path: Path, meta_tokenizer_file: Path) -> None:
    shutil.copy(meta_tokenizer_file, tmp_path / "tokenizer.model")
    make_synthetic("small", tmp_path, tmp_path / "tokenizer.model")
    assert llama3_raw.load(tmp_path).tokenizer is not None


@pytest.mark.usefixtures("small")
def test_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="are needed"):
        make_synthetic("small", tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_created_on_the_device(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a model, all different, and the same ones for the same seed."""
    monkeypatch.setitem(SYNTHETIC, "small", (SYNTHETIC["small"][0], tied))
    checkpoint = synthetic_checkpoint("small")
    weights = random_weights(checkpoint, CPU, random_seed=1)
    ours = weights.layers[1].w2
    assert isinstance(ours, torch.Tensor)
    assert ours.dtype == torch.bfloat16
    assert ours.shape == (checkpoint.params.dim, checkpoint.params.hidden_dim)
    assert ours.float().std() == pytest.approx(0.02, rel=0.02)
    assert ours.float().mean() == pytest.approx(0, abs=0.001)
    assert (weights.layers[1].ffn_norm == 1).all()
    assert not torch.equal(ours, dense(weights.layers[0].w2))
    assert (weights.output is weights.tok_embeddings) == tied
    assert torch.equal(ours, dense(random_weights(checkpoint, CPU, random_seed=1).layers[1].w2))
    assert not torch.equal(ours, dense(random_weights(checkpoint, CPU, random_seed=2).layers[1].w2))
    assert random_weights(checkpoint, CPU, torch.float16).norm.dtype == torch.float16


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_weights_are_created_one_by_one(tied: bool, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, rounded one by one, so that at most one matrix exists in bf16 at a time."""
    monkeypatch.setitem(SYNTHETIC, "small", (SYNTHETIC["small"][0], tied))
    checkpoint = synthetic_checkpoint("small")
    plain = random_weights(checkpoint, CPU, random_seed=1)
    unrounded: list[weakref.ref[torch.Tensor]] = []

    for kind in {Int8, FORMATS[quantize]}:

        def watched(matrix: torch.Tensor, original: Any = kind.quantize) -> Any:
            assert all(other() is None for other in unrounded)
            unrounded.append(weakref.ref(matrix))
            return original(matrix)

        monkeypatch.setattr(kind, "quantize", watched)

    def ones(*arguments: Any, created: Any = torch.ones, **settings: Any) -> torch.Tensor:
        assert all(other() is None for other in unrounded)
        tensor: torch.Tensor = created(*arguments, **settings)
        return tensor

    monkeypatch.setattr(torch, "ones", ones)
    weights = random_weights(checkpoint, CPU, random_seed=1, quantize=quantize)
    monkeypatch.undo()
    assert len(unrounded) == 15  # if tied, the last are the embeddings
    assert torch.equal(dense(weights.tok_embeddings), dense(plain.tok_embeddings))
    assert isinstance(weights.output, Int8)
    pairs = [(weights.output, plain.output)]
    for ours, theirs in zip(weights.layers, plain.layers, strict=True):
        assert torch.equal(ours.ffn_norm, theirs.ffn_norm)
        pairs += [(getattr(ours, field), getattr(theirs, field)) for field in MATRICES if field != "output"]
        assert isinstance(ours.w2, FORMATS[quantize])
    for rounded, matrix in pairs:
        expected = FORMATS[format_name(rounded)].quantize(dense(matrix))
        assert all(torch.equal(*both) for both in zip(tensors_of(rounded), expected, strict=True))


@pytest.mark.usefixtures("small")
def test_int8_compared_with_the_same_weights_in_bf16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one run, without files."""
    models = []
    this_engine = ThisEngine

    def watched(model: llama3_raw.Model, *arguments: Any, **options: Any) -> ThisEngine:
        models.append(model)
        return this_engine(model, *arguments, **options)

    monkeypatch.setattr(baselines, "ThisEngine", watched)
    monkeypatch.setattr(measuring, "ThisEngine", watched)
    arguments = ["--device", "cpu", "--prefill", "5", "--rounds", "1", "--seed", "3"]
    assert main(["--make-synthetic", "small", *arguments, "--quantize", "int8", "--vs", "stored"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["vs"]["stored"]["decode_ratio"]["5"] > 0
    stored, ours = (cast(Any, model.weights.layers[1].w2) for model in models)
    assert torch.equal(stored, dense(random_weights(synthetic_checkpoint("small"), CPU, random_seed=3).layers[1].w2))
    assert torch.equal(ours.values, Int8.quantize(stored).values)


@pytest.mark.usefixtures("small")
def test_measuring_without_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measures one layer of two and writes nothing. There are no files, so no start is measured."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--device", "cpu", "--layers", "1", "--prefill", "5", "--rounds", "1"]
    assert main(["--make-synthetic", "small", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "llama3_raw: small (random weights) on cpu" in err
    figures = json.loads(out.splitlines()[-1])
    assert figures["prefill_tokens_per_second"]["5"] > 0
    matrices = [spec for spec in synthetic_checkpoint("small").shards if len(spec.shape) == 2]
    in_layer_0_or_output = [spec for spec in matrices if spec.layer == 0 or spec.field == "output"]
    n_bytes = sum(2 * torch.Size(spec.shape).numel() for spec in in_layer_0_or_output)
    assert figures["weights_bytes_per_token"] == n_bytes
    assert "start_to_first_token_seconds" not in figures
    assert "start to first token" not in out
    assert list(tmp_path.iterdir()) == []
    assert main(["--make-synthetic", "small", "--device", "cpu", "--taps", "--rounds", "1"]) == 0


def test_memory_is_checked_before_anything_is_created() -> None:
    """Created weights are never memory-mapped, and no suggestion needs files."""
    plan = MemoryPlan(synthetic_checkpoint("8b"), CPU, None, RunShape(17, 22, least=22), made=True)
    need = needed(plan)
    assert (need.mapped, need.copied) == (0, 16_060_522_496)
    assert check_memory(plan, free=lambda _: need.allocated) is None
    with pytest.raises(UserError, match=r"8b: 16.* are needed on cpu .*what fits: --quantize int8, or --layers 31$"):
        check_memory(plan, free=lambda _: need.allocated - 1)
    with pytest.raises(UserError, match=r"what fits: --quantize int8, or --device cpu, or --layers 21$"):
        check_memory(
            plan._replace(device=torch.device("cuda")), {torch.device("cuda"): int(12e9), CPU: int(24e9)}.__getitem__
        )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "option",
    ["--weights x", "--tokenizer x", "--gpu-layers 1", "--max-ram 1GB", "--gguf x", "--vs llama.cpp"],
)
def test_options_that_need_files(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--make-synthetic", "small", *option.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    named = option if option.startswith("--vs") else option.split()[0]
    assert line.startswith(f"llama3_raw: error: {named} needs a model in files")


@pytest.mark.usefixtures("small")
def test_int8_needs_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--make-synthetic", "small", "--device", "cpu", "--quantize", "int8", "--dtype", "float32"]) == 2
    assert "int8 matrices are fast in bfloat16 only, not in float32" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_several_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--make-synthetic", "small", "a", "b"]) == 2
    assert "a b: these are several folders" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
@pytest.mark.parametrize("quantize", [None, *FORMATS])
def test_weights_created_on_a_gpu(quantize: str | None) -> None:
    """They are on the GPU, and creating them needs next to no other memory there."""
    gpu = torch.device("cuda")
    checkpoint = synthetic_checkpoint("small")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = random_weights(checkpoint, gpu, quantize=quantize)
    n_bytes = needed(MemoryPlan(checkpoint, gpu, None, RunShape(1, 2, 2), quantize=quantize)).copied
    if quantize:  # the largest matrix in bf16, some rows of it in fp32
        n_bytes += 2 * 128256 * 128 + 3_000_000
    assert weights.norm.is_cuda
    assert torch.cuda.max_memory_allocated() - before <= n_bytes + 1_000_000
    output = weights.output.dequantize(torch.float32) if isinstance(weights.output, Int8) else weights.output
    assert float(output.float().std()) == pytest.approx(0.02, rel=0.02)


def test_unknown_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--make-synthetic", "7b", str(tmp_path)]) == 2
    assert "choose from 8b, 1b, 3b, 70b-1layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "descriptor"), [("8b", "Llama-3-8B"), ("1b", "Llama3.2-1B"), ("3b", "Llama3.2-3B"), ("70b-1layer", None)]
)
def test_sizes_match_metas_list(size: str, descriptor: str | None) -> None:
    from llama_models.sku_list import resolve_model

    content, tied = SYNTHETIC[size]
    theirs = resolve_model(descriptor or "Llama-3-70B").arch_args
    assert Params.from_meta(content) == Params.from_meta({**theirs, **({} if descriptor else {"n_layers": 1})})
    specs = list(tensor_specs(Params.from_meta(content), tied))
    if size == "8b":
        assert len(specs) == 291
        assert sum(2 * torch.Size(spec.shape).numel() for spec in specs) == 16_060_522_496


def peak_of(command: list[str]) -> tuple[int, str]:
    """Return the peak memory of a command in bytes (VmHWM, with mapped files), and its stderr."""
    watch = (
        "import runpy, sys, atexit\n"
        "from llama3_raw.system.machine import peak_memory\n"
        "atexit.register(lambda: print('PEAK', peak_memory(), file=sys.stderr))\n"
        f"sys.argv = {command!r}\n"
        f"runpy.run_module({command[0]!r}, run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("PEAK ")[1].split()[0]), done.stderr


@pytest.mark.slow
@pytest.mark.full_size
def test_8b_at_true_size(tmp_path_factory: pytest.TempPathFactory, meta_tokenizer_file: Path) -> None:
    """Created within 3 GB, loaded in under 3 s with a warm page cache, run within 17.0e9 bytes."""
    folder = Path(os.environ.get("LLAMA3_RAW_FULL_SIZE_FOLDER", tmp_path_factory.mktemp("full"))) / "8b"
    try:
        peak, _ = peak_of(
            ["llama3_raw.bench", "--make-synthetic", "8b", str(folder), "--tokenizer", str(meta_tokenizer_file)]
        )
        assert peak < 3e9
        run = ["llama3_raw", "--weights", str(folder), "--max-new-tokens", "8", "--stats", "json", PROMPT]
        for _ in range(2):  # the first run warms the page cache
            peak, errors = peak_of(run)
        stats = json.loads(next(line for line in errors.splitlines() if line.startswith("{")))
        assert (stats["prompt_tokens"], stats["new_tokens"]) == (17, 8)
        assert stats["load_seconds"] < 3
        assert peak <= 17.0e9
    finally:
        shutil.rmtree(folder, ignore_errors=True)
