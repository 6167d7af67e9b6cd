"""Matrices in int8: their error, quantization, saving and mapping, and their cost in perplexity."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, Model, Params, UserError, Weights, forward, generate
from llama3_raw.__main__ import main
from llama3_raw.backends.cpu import fast_ops
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import from_state_dict, to_state_dict
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, needed
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import Matrix, linear, tensors_of
from llama3_raw.weights import MATRICES
from tests.checkpoint.files import SMALL, file_of, write_meta
from tests.paths import TINY
from tests.references import cast, dense, flat, hf_model, random_weights

CPU = torch.device("cpu")
WQ = "layers.0.attention.wq.weight"


def quantized(weights: Weights) -> Weights:
    """Return the weights with their matrices in int8."""
    layers = (
        layer._replace(**{field: Int8.quantize(getattr(layer, field)) for field in MATRICES if field != "output"})  # type: ignore[arg-type]
        for layer in weights.layers
    )
    return weights._replace(layers=tuple(layers), output=Int8.quantize(weights.output))  # type: ignore[arg-type]


def all_tensors(weights: Weights) -> list[Tensor]:
    return [tensor for matrix in flat(weights) for tensor in tensors_of(matrix)]


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert list(map(type, flat(ours))) == list(map(type, flat(theirs)))
    for mine, other in zip(all_tensors(ours), all_tensors(theirs), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def error(matrix: Int8, exact: Tensor) -> Tensor:
    return (matrix.dequantize(torch.float64) - exact.double()).abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_value_is_within_half_a_step(dtype: torch.dtype) -> None:
    """More rows than are quantized at a time."""
    matrix = torch.randn(1030, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = matrix.clone()
    int8 = Int8.quantize(matrix)
    assert torch.equal(matrix, before)
    assert [tensor.dtype for tensor in int8] == [torch.int8, torch.float32, torch.float32]
    assert int8.shape == matrix.shape
    assert int8.nbytes == 1030 * 96 + 4 * (1030 + 96)
    step = int8.row_scales.double().unsqueeze(-1) * int8.column_scales
    assert (error(int8, matrix) <= 0.5001 * step).all()
    assert (int8.values.abs().amax(dim=-1) == 127).all()  # uses the full range


def test_rows_and_columns_of_zeros() -> None:
    matrix = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    matrix[3] = 0
    matrix[:, 7] = 0
    dequantized = Int8.quantize(matrix).dequantize(torch.float32)
    assert not dequantized[3].any()
    assert not dequantized[:, 7].any()
    assert (dequantized - matrix).abs().max() < 0.02
    assert not Int8.quantize(torch.zeros(4, 32)).dequantize(torch.float32).any()


def test_columns_of_large_weights_do_not_coarsen_the_others() -> None:
    """With row scales alone, columns of small weights would be lost."""
    sizes = torch.logspace(-3, 0, 32)
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)) * sizes
    step = matrix.abs().amax(dim=-1, keepdim=True) / 127
    by_rows = (matrix / step).round() * step
    assert ((by_rows - matrix) / sizes).square().mean() > 0.1
    assert (error(Int8.quantize(matrix), matrix) / sizes).square().mean() < 0.003


def test_linear_equals_that_of_the_dequantized_matrix() -> None:
    matrix, x = torch.randn(64, 32), torch.randn(2, 3, 32)
    int8 = Int8.quantize(matrix)
    assert torch.equal(linear(x, int8), F.linear(x, int8.dequantize(torch.float32)))
    assert torch.equal(linear(x, matrix), F.linear(x, matrix))
    assert linear(x.bfloat16(), int8).dtype == torch.bfloat16


# Loading and saving


def meta_folder(folder: Path) -> Path:
    params = Params.from_meta(SMALL)
    return write_meta(folder, SMALL, to_state_dict(params, random_weights(params, torch.bfloat16, seed=0)))


def hf_folder(folder: Path) -> Path:
    params = Params.from_meta(SMALL)
    hf_model(params, random_weights(params, torch.bfloat16, seed=1)).save_pretrained(folder)
    return folder


def tied_hf_folder(folder: Path) -> Path:
    params = Params.from_meta(SMALL)
    hf_model(params, random_weights(params, torch.bfloat16, seed=2, tied=True)).save_pretrained(folder)
    return folder


FORMATS: list[Callable[[Path], Path]] = [meta_folder, hf_folder, tied_hf_folder]


@pytest.mark.parametrize("make", FORMATS)
def test_loading_and_saving_give_the_same(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """In every format; tied embeddings are unchanged, next to an output in int8."""
    folder = make(tmp_path / "model")
    stored = llama3_raw.load(folder)
    model = llama3_raw.load(folder, quantized=True)
    assert_same(model.weights, quantized(stored.weights))
    saved = tmp_path / "new" / "int8"
    save_quantized(folder, open_checkpoint(folder), saved)
    mapped = llama3_raw.load(saved)
    assert mapped.params == stored.params
    assert_same(mapped.weights, model.weights)
    if Path("/proc/self/maps").exists():
        for tensor in all_tensors(mapped.weights):
            assert Path(file_of(tensor) or "").parent == saved
    assert_same(from_state_dict(model.params, to_state_dict(model.params, model.weights)), model.weights)
    first = llama3_raw.load(saved, layers=1)
    assert_same(first.weights, model.weights._replace(layers=model.weights.layers[:1]))


def test_a_write_never_reaches_the_files(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "model")
    saved = tmp_path / "int8"
    save_quantized(folder, open_checkpoint(folder), saved)
    before = {file: file.read_bytes() for file in saved.iterdir()}
    for tensor in all_tensors(llama3_raw.load(saved).weights):
        tensor.fill_(7)
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_other_dtypes(tmp_path: Path) -> None:
    """What is not in int8 is converted to the dtype, and int8 stays."""
    folder = meta_folder(tmp_path / "model")
    save_quantized(folder, open_checkpoint(folder), tmp_path / "int8")
    mapped = llama3_raw.load(tmp_path / "int8", dtype=torch.float32)
    as_stored = llama3_raw.load(folder, quantized=True).weights
    assert mapped.weights.norm.dtype == mapped.weights.tok_embeddings.dtype == torch.float32
    for ours, theirs in zip(all_tensors(mapped.weights), all_tensors(as_stored), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    tokens = torch.tensor([1, 2, 3])
    in_fp32 = dequantized_weights(as_stored)
    assert torch.equal(forward(mapped.weights, mapped.params, tokens), forward(in_fp32, mapped.params, tokens))


def dequantized_weights(weights: Weights) -> Weights:
    """Return the dequantized weights, in fp32."""

    def convert(matrix: Matrix) -> Tensor:
        return matrix.dequantize(torch.float32) if isinstance(matrix, Int8) else matrix.float()

    layers = tuple(type(layer)(*map(convert, layer)) for layer in weights.layers)
    return Weights(convert(weights.tok_embeddings), layers, convert(weights.norm), convert(weights.output))


# On the command line


@pytest.fixture(scope="module")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in int8, written by the command."""
    folder = tmp_path_factory.mktemp("saved") / "int8"
    command = [sys.executable, "-m", "llama3_raw", "--weights", str(TINY), "--save-quantized", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith(f"llama3_raw: wrote {folder}; run it with --weights {folder}\n")
    return folder


@pytest.mark.slow
def test_the_tool_writes_what_it_runs(saved_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["params.json", "tokenizer.model", *(f"int8.{number:03}.safetensors" for number in range(5))]
    assert sorted(file.name for file in saved_tiny.iterdir()) == sorted(files)
    model = llama3_raw.load(TINY, quantized=True)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("Once upon a time", bos=True)
    text = model.tokenizer.decode(list(generate(model, ids, max_new_tokens=30)))
    arguments = ["Once upon a time", "--max-new-tokens", "30", "--device", "cpu", "--stats", "json"]
    passes = {}
    for way in (["--weights", str(TINY), "--quantize", "int8"], ["--weights", str(saved_tiny)]):
        assert main([*way, *arguments]) == 0
        out, err = capsys.readouterr()
        assert out == text
        passes[way[-1]] = json.loads(err.splitlines()[-1])["passes"]
    assert len(set(passes.values())) == 1


REFUSED = {
    "a folder that is not empty": (
        ["--save-quantized", "{tiny}"],
        "tiny: already exists and is not empty",
    ),
    "a folder below a file": (["--save-quantized", "{tiny}/params.json/new"], "cannot be written: "),
    "quantized already": (["--weights", "{int8}", "--save-quantized", "{new}"], "is quantized already"),
    "quantized already, to run": (["x", "--weights", "{int8}", "--quantize", "int8"], "is quantized already; leave"),
    "a prompt": (["x", "--save-quantized", "{new}"], "leave the prompt and --max-ram out"),
    "--max-ram": (["--max-ram", "1GB", "--save-quantized", "{new}"], "leave the prompt and --max-ram out"),
    "--dtype": (["--dtype", "float32", "--save-quantized", "{new}"], "give --dtype bfloat16"),
    "--layers": (["--layers", "2", "--save-quantized", "{new}"], "leave --layers out"),
    "quantized at load with --max-ram": (["x", "--quantize", "int8", "--max-ram", "1GB"], "with --save-quantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, saved_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = REFUSED[case]
    places = {"tiny": TINY, "int8": saved_tiny, "new": tmp_path / "new"}
    assert main(["--weights", str(TINY), "--device", "cpu", *(word.format(**places) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err
    assert not (tmp_path / "new").exists()


def test_not_on_an_apple_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main(["x", "--weights", str(TINY), "--device", "mps", "--quantize", "int8"]) == 2
    assert "--quantize int8 is for CPUs and NVIDIA GPUs" in capsys.readouterr().err


def change(number: int, edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Damage: changed tensors in one of the files."""

    def apply(folder: Path) -> None:
        file = folder / f"int8.{number:03}.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return apply


NORM, EMBEDDINGS = "norm.weight", "tok_embeddings.weight"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scales": (change(0, lambda t: t.pop(f"{WQ}.row_scales")), f"{WQ} is [192, 192] I8; only"),
    "scales of another shape": (
        change(0, lambda t: t.update({f"{WQ}.column_scales": torch.ones(5)})),
        f"{WQ} is in int8, without the scales",
    ),
    "scales of another dtype": (
        change(0, lambda t: t.update({f"{WQ}.row_scales": t[f"{WQ}.row_scales"].bfloat16()})),
        f"{WQ} is in int8, without the scales",
    ),
    "scales of a matrix that is not in int8": (
        change(0, lambda t: t.update({WQ: t[WQ].bfloat16()})),
        f"unexpected tensor {WQ}.",
    ),
    "a matrix of another shape": (change(0, lambda t: t.update({WQ: t[WQ][:5].clone()})), f"{WQ} is [5, 192], should"),
    "a norm in int8": (change(4, lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM} is [192] I8; only"),
    "embeddings in int8": (
        change(
            4,
            lambda t: t.update(
                {
                    EMBEDDINGS + ending: tensor
                    for ending, tensor in zip(
                        ("", ".row_scales", ".column_scales"), Int8.quantize(t[EMBEDDINGS]), strict=True
                    )
                }
            ),
        ),
        f"{EMBEDDINGS} is in int8",
    ),
    "a missing layer": (lambda folder: (folder / "int8.002.safetensors").unlink(), "tensor layers.2."),
    "a file that is cut": (
        lambda folder: (folder / "int8.001.safetensors").write_bytes(b"\x10" + bytes(20)),
        "int8.001.safetensors: damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(case: str, saved_tiny: Path, tmp_path: Path) -> None:
    damage, says = DAMAGED[case]
    folder = Path(shutil.copytree(saved_tiny, tmp_path / "int8"))
    damage(folder)
    with pytest.raises(UserError) as caught:
        llama3_raw.load(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)


# Memory

MEASURE = """
import ctypes, sys, torch
from pathlib import Path
import llama3_raw
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
from llama3_raw.quantization.int8 import Int8
quantize(torch.ones(64, 64))
before = anonymous()
weights = llama3_raw.load(sys.argv[1], quantized=sys.argv[2] == "quantized").weights
ctypes.CDLL(None).malloc_trim(0)  # release freed memory that the allocator keeps
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_planned_memory_is_what_a_load_needs(tmp_path: Path, tied: bool) -> None:
    """Half of the matrices' bytes if they are quantized, almost none if they are mapped."""
    content = {"dim": 1024, "n_layers": 4, "n_heads": 8, "vocab_size": 8000, "norm_eps": 1e-5}
    params = Params.from_meta(content)
    weights = random_weights(params, torch.bfloat16, seed=0, tied=tied)
    folder = write_meta(tmp_path / "model", content, to_state_dict(params, weights))
    save_quantized(folder, open_checkpoint(folder), tmp_path / "int8")

    def allocated(folder: Path, how: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(folder), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    plan = MemoryPlan(open_checkpoint(folder), CPU, None, RunShape(1, 1, 2), quantized=True)
    matrices = sum(weight.numel() for weight in map(dense, [*weights.layers[0], weights.output]) if weight.dim() == 2)
    matrices += 3 * sum(weight.numel() for weight in map(dense, weights.layers[0]) if weight.dim() == 2)
    assert needed(plan).copied == matrices
    # the tolerance is for the scales, and for what remains of a piece in fp32
    assert allocated(folder, "quantized") == pytest.approx(matrices, rel=0.05, abs=25e6)
    assert allocated(tmp_path / "int8", "mapped") < 3e6
    mapped = needed(plan._replace(checkpoint=open_checkpoint(tmp_path / "int8"), quantized=False))
    assert mapped.copied == 0
    assert mapped.mapped < matrices + 1e6


# Perplexity


def losses(model: Model, ids: list[int], window: int) -> Tensor:
    """Return -log p of each token except the first of each window, in fp64."""
    with torch.no_grad():
        return torch.cat(
            [
                F.cross_entropy(
                    forward(model.weights, model.params, piece[:-1], ops=fast_ops()), piece[1:], reduction="none"
                )
                for piece in torch.tensor(ids).split(window)
            ]
        ).double()


@pytest.mark.slow
def test_perplexity_of_a_trained_model(smollm2: Model, smollm2_text: list[int]) -> None:
    """At most 0.5 % more on 2,048 tokens; the statistical error of that many tokens must be small enough."""
    ids = smollm2_text[:2048]
    model = smollm2._replace(weights=cast(smollm2.weights, torch.bfloat16))
    difference = losses(model._replace(weights=quantized(model.weights)), ids, 1024) - losses(model, ids, 1024)
    uncertain = float(difference.std()) / len(difference) ** 0.5
    assert uncertain < 0.0025
    assert abs(float(difference.mean())) < 0.005


def test_perplexity_of_the_built_in_model(tiny: Model) -> None:
    """On text sampled from the model itself, where the difference is the loss of its probabilities."""
    ids = list(generate(tiny, [1], max_new_tokens=500, temperature=1.0, seed=0, stop_ids=()))
    model = tiny._replace(weights=quantized(tiny.weights))
    difference = losses(model, ids, 500) - losses(tiny, ids, 500)
    assert abs(float(difference.mean())) < 0.01


def test_exact_operations_accept_int8(tiny: Model) -> None:
    """They dequantize to bf16, and so round otherwise than the fast ones, whose integer products lose less."""
    model = tiny._replace(weights=quantized(tiny.weights))
    tokens = torch.randint(2000, (20,), generator=torch.Generator().manual_seed(0))
    exact = forward(dequantized_weights(model.weights), model.params, tokens)
    reference = forward(model.weights, model.params, tokens, ops=REFERENCE)
    fast = forward(model.weights, model.params, tokens, ops=fast_ops())
    assert (fast - exact).square().mean() <= 1.5**2 * (reference - exact).square().mean()
