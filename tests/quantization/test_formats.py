"""Models in int8 and in int4: made while loading, written to a folder and mapped; refusals; the memory they need."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama3_raw
from llama3_raw import Params, UserError, Weights, forward, generate
from llama3_raw.__main__ import main
from llama3_raw.checkpoint import writing
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import build_weights, from_state_dict, to_state_dict
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.cli import models
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, needed
from llama3_raw.quantization.matrix import FORMATS, nbytes_of, stored_names, tensors_of
from llama3_raw.system.files import atomic_folder
from tests.checkpoint.files import SMALL, file_of, write_meta
from tests.paths import TINY
from tests.references import dense, dequantized_weights, flat, hf_model, quantized_weights, random_weights

CPU = torch.device("cpu")
WQ = "layers.0.attention.wq.weight"

pytestmark = pytest.mark.parametrize("quantize", ["int8", "int4"])


def all_tensors(weights: Weights) -> list[Tensor]:
    return [tensor for matrix in flat(weights) for tensor in tensors_of(matrix)]


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert list(map(type, flat(ours))) == list(map(type, flat(theirs)))
    for mine, other in zip(all_tensors(ours), all_tensors(theirs), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


@pytest.mark.parametrize("outputs", [32, 40])
def test_what_a_shape_says_of_its_tensors(quantize: str, outputs: int) -> None:
    """Their shapes, dtypes and bytes, also where the last block of outputs is padded."""
    matrix = FORMATS[quantize].quantize(torch.randn(outputs, 64, generator=torch.Generator().manual_seed(0)))
    expected = FORMATS[quantize].meta((outputs, 64))
    assert [(t.shape, t.dtype) for t in matrix] == [(t.shape, t.dtype) for t in expected]
    assert nbytes_of(quantize, (outputs, 64)) == matrix.nbytes
    assert matrix.shape == expected.shape == (outputs, 64)


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


@pytest.mark.parametrize("make", [meta_folder, hf_folder, tied_hf_folder])
def test_loading_and_saving_give_the_same(tmp_path: Path, make: Callable[[Path], Path], quantize: str) -> None:
    """In every format; tied embeddings are unchanged, next to an output in int8."""
    folder = make(tmp_path / "model")
    stored = llama3_raw.load(folder)
    model = llama3_raw.load(folder, quantize=quantize)
    assert_same(model.weights, quantized_weights(stored.weights, quantize))
    saved = tmp_path / "new" / "saved"
    save_quantized(folder, open_checkpoint(folder), saved, quantize=quantize)
    mapped = llama3_raw.load(saved)
    assert mapped.params == stored.params
    assert_same(mapped.weights, model.weights)
    if Path("/proc/self/maps").exists():
        for tensor in all_tensors(mapped.weights):
            assert Path(file_of(tensor) or "").parent == saved
    assert_same(from_state_dict(model.params, to_state_dict(model.params, model.weights)), model.weights)
    first = llama3_raw.load(saved, layers=1)
    assert_same(first.weights, model.weights._replace(layers=model.weights.layers[:1]))


def test_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str) -> None:
    """safetensors reads them; the values lie where whole vectors of 64 bytes can be loaded; the plan for the disk."""
    folder = meta_folder(tmp_path / "model")
    planned: list[int] = []

    def watched(folder: Path, n_bytes: int) -> AbstractContextManager[Path]:
        planned.append(n_bytes)
        return atomic_folder(folder, n_bytes)

    monkeypatch.setattr(writing, "atomic_folder", watched)
    save_quantized(folder, open_checkpoint(folder), tmp_path / "saved", quantize=quantize)
    weights = llama3_raw.load(tmp_path / "saved").weights
    by_safetensors = load_file(tmp_path / "saved" / f"{quantize}.001.safetensors")
    name = WQ.replace("layers.0", "layers.1")
    for stored, tensor in zip(stored_names(name, quantize), tensors_of(weights.layers[1].wq), strict=True):
        assert torch.equal(by_safetensors[stored], tensor)
    for matrix in flat(weights):
        values = tensors_of(matrix)[0]
        assert values.data_ptr() % (64 if values.nbytes % 64 == 0 else values.itemsize) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert planned == [sum(tensor.nbytes for tensor in all_tensors(weights))]
    assert size == pytest.approx(planned[0], abs=3 * 4000)  # 3 headers


def test_a_write_never_reaches_the_files(tmp_path: Path, quantize: str) -> None:
    folder = meta_folder(tmp_path / "model")
    saved = tmp_path / "saved"
    save_quantized(folder, open_checkpoint(folder), saved, quantize=quantize)
    before = {file: file.read_bytes() for file in saved.iterdir()}
    for tensor in all_tensors(llama3_raw.load(saved).weights):
        tensor.fill_(7)
    assert {file: file.read_bytes() for file in saved.iterdir()} == before


def test_other_dtypes(tmp_path: Path, quantize: str) -> None:
    """What is not quantized is converted to the dtype, and the rest stays."""
    folder = meta_folder(tmp_path / "model")
    save_quantized(folder, open_checkpoint(folder), tmp_path / "saved", quantize=quantize)
    mapped = llama3_raw.load(tmp_path / "saved", dtype=torch.float32)
    as_stored = llama3_raw.load(folder, quantize=quantize).weights
    assert mapped.weights.norm.dtype == mapped.weights.tok_embeddings.dtype == torch.float32
    for ours, theirs in zip(all_tensors(mapped.weights), all_tensors(as_stored), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    tokens = torch.tensor([1, 2, 3])
    in_fp32 = dequantized_weights(as_stored)
    assert torch.equal(forward(mapped.weights, mapped.params, tokens), forward(in_fp32, mapped.params, tokens))


def test_with_an_adapter(tmp_path: Path, quantize: str) -> None:
    """The sum of a matrix and its change is rounded; a saved folder takes no adapter."""
    from peft import LoraConfig, get_peft_model

    params = Params.from_meta(SMALL)
    network = hf_model(params, random_weights(params, torch.bfloat16, seed=3))
    network.save_pretrained(tmp_path / "model")
    tuned = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    merged = llama3_raw.load(tmp_path / "model", adapter=tmp_path / "adapter").weights
    model = llama3_raw.load(tmp_path / "model", adapter=tmp_path / "adapter", quantize=quantize)
    assert_same(model.weights, quantized_weights(merged, quantize))
    assert not torch.equal(dense(merged.layers[0].w2), dense(llama3_raw.load(tmp_path / "model").weights.layers[0].w2))
    save_quantized(tmp_path / "model", open_checkpoint(tmp_path / "model"), tmp_path / "saved", quantize=quantize)
    with pytest.raises(UserError, match="saved: is quantized, which an adapter cannot be added to; give the original"):
        llama3_raw.load(tmp_path / "saved", adapter=tmp_path / "adapter")


def test_inputs_that_are_no_multiple_of_a_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantize: str
) -> None:
    """A feed-forward of 40 values has no int4 format, in memory or on the disk; int8 has no groups."""
    params = replace(Params.from_meta(SMALL), hidden_dim=40)
    hf_model(params, random_weights(params, torch.bfloat16, seed=0)).save_pretrained(tmp_path / "model")
    ways: list[Callable[[], Any]] = [
        lambda: llama3_raw.load(tmp_path / "model", quantize=quantize),
        lambda: build_weights(open_checkpoint(tmp_path / "model"), quantize=quantize),
        lambda: save_quantized(
            tmp_path / "model", open_checkpoint(tmp_path / "model"), tmp_path / "saved", quantize=quantize
        ),
    ]
    says = "model.layers.0.mlp.down_proj.weight is [64, 40], and int4 needs inputs in groups of 32; use int8 instead"
    for way in ways:
        if quantize == "int8":
            way()
            continue
        with pytest.raises(UserError) as caught:
            way()
        assert str(caught.value).startswith("quantize int4: ")
        assert str(caught.value).endswith(says)
    arguments = ["--weights", str(tmp_path / "model"), "--device", "cpu", "--ids", "1 2", "--max-new-tokens", "1"]
    assert main([*arguments, "--quantize", quantize]) == (0 if quantize == "int8" else 2)
    err = capsys.readouterr().err
    assert quantize == "int8" or ("llama3_raw: error: --quantize int4: " in err and err.endswith(f"{says}\n"))
    assert (tmp_path / "saved").exists() == (quantize == "int8")


# On the command line


@pytest.fixture(scope="module")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The built-in model in a format, written by the command."""
    root = tmp_path_factory.mktemp("saved")

    def folder(quantize: str) -> Path:
        if not (root / quantize).exists():
            # int8 is what the command writes by default
            option = [] if quantize == "int8" else ["--quantize", quantize]
            assert (
                main(["--weights", str(TINY), "--device", "cpu", "--save-quantized", str(root / quantize), *option])
                == 0
            )
        return root / quantize

    return folder


def test_the_tool_writes_what_it_runs(
    saved_tiny: Callable[[str], Path], quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = saved_tiny(quantize)
    out, err = capsys.readouterr()
    assert out == ""
    assert not err or err.endswith(f"llama3_raw: wrote {saved}; run it with --weights {saved}\n")
    files = ["params.json", "tokenizer.model", *(f"{quantize}.{number:03}.safetensors" for number in range(5))]
    assert sorted(file.name for file in saved.iterdir()) == sorted(files)
    model = llama3_raw.load(TINY, quantize=quantize)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("Once upon a time", bos=True)
    text = model.tokenizer.decode(list(generate(model, ids, max_new_tokens=20)))
    arguments = ["Once upon a time", "--max-new-tokens", "20", "--device", "cpu", "--stats", "json"]
    passes = {}
    for way in (["--weights", str(TINY), "--quantize", quantize], ["--weights", str(saved)]):
        assert main([*way, *arguments]) == 0
        out, err = capsys.readouterr()
        assert out == text
        stats = json.loads(err.splitlines()[-1])
        assert stats["matrices"] == quantize
        passes[way[-1]] = stats["passes"]
    assert len(set(passes.values())) == 1


def test_within_less_memory(
    saved_tiny: Callable[[str], Path], quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is mapped, so that its layers may be dropped and read again."""
    arguments = ["--weights", str(saved_tiny(quantize)), "--device", "cpu", "Once", "--max-new-tokens", "4"]
    texts = []
    for option in ([], ["--max-ram", "8GB"]):
        capsys.readouterr()
        assert main([*arguments, *option]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_a_bar_while_quantizing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quantize: str
) -> None:
    monkeypatch.setattr(models, "PROGRESS_BAR_FROM", 0)
    arguments = ["--weights", str(TINY), "--device", "cpu", "Once", "--max-new-tokens", "1"]
    assert main([*arguments, "--quantize", quantize]) == 0
    assert f"loading {TINY / 'consolidated.00.pth'}" in capsys.readouterr().err


REFUSED = {
    "a folder that is not empty": (
        ["--save-quantized", "{tiny}"],
        "tiny: already exists and is not empty",
    ),
    "a folder below a file": (["--save-quantized", "{tiny}/params.json/new"], "cannot be written: "),
    "quantized already": (["--weights", "{saved}", "--save-quantized", "{new}"], "is quantized already"),
    "quantized already, to run": (["x", "--weights", "{saved}", "--quantize", "int4"], "is quantized already; leave"),
    "a prompt": (["x", "--save-quantized", "{new}"], "leave the prompt and --max-ram out"),
    "--max-ram": (["--max-ram", "1GB", "--save-quantized", "{new}"], "leave the prompt and --max-ram out"),
    "--dtype": (
        ["--dtype", "float32", "--quantize", "{format}", "--save-quantized", "{new}"],
        "{format} matrices are fast in bfloat16 only, not in float32; give --dtype bfloat16",
    ),
    "--dtype of a folder": (["x", "--weights", "{saved}", "--dtype", "float16"], "{format} matrices are fast in"),
    "--layers": (["--layers", "2", "--save-quantized", "{new}"], "leave --layers out"),
    "quantized at load with --max-ram": (
        ["x", "--quantize", "{format}", "--max-ram", "1GB"],
        "write them in {format} first, with --save-quantized FOLDER --quantize {format}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    case: str,
    saved_tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quantize: str,
) -> None:
    arguments, says = REFUSED[case]
    places = {"tiny": TINY, "saved": saved_tiny(quantize), "new": tmp_path / "new", "format": quantize}
    capsys.readouterr()
    assert main(["--weights", str(TINY), "--device", "cpu", *(word.format(**places) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert says.format(**places) in err
    assert not (tmp_path / "new").exists()


def test_not_on_an_apple_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quantize: str
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert main(["x", "--weights", str(TINY), "--device", "mps", "--quantize", quantize]) == 2
    assert f"--quantize {quantize} is for CPUs and NVIDIA GPUs" in capsys.readouterr().err


NORM, EMBEDDINGS = "norm.weight", "tok_embeddings.weight"
Tensors = dict[str, Tensor]


def quantize_in_place(tensors: Tensors, name: str, quantize: str) -> None:
    matrix = FORMATS[quantize].quantize(tensors[name])
    tensors |= dict(zip(stored_names(name, quantize), matrix, strict=True))


def in_dtype(name: str, dtype: torch.dtype) -> Callable[[Tensors, str], object]:
    return lambda tensors, quantize: tensors.update({name: tensors[name].to(dtype)})


def with_part(i: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, str], object]:
    """Damage: tensor number i of a matrix is another one."""

    def apply(tensors: Tensors, quantize: str) -> None:
        name = stored_names(WQ, quantize)[i]
        tensors[name] = change(tensors[name])

    return apply


NO_SCALES = f"{WQ} is in {{format}}, without the scales that belong to it"

# the number of the file, what is done to its tensors, and what the error says
DAMAGED: dict[str, tuple[int, Callable[[Tensors, str], object], str]] = {
    "without values": (0, lambda t, q: t.pop(WQ), f"tensor {WQ}."),
    "without scales": (0, lambda t, q: t.pop(stored_names(WQ, q)[1]), f"tensor {WQ} is ["),
    "without row scales": (0, lambda t, q: t.pop(f"{WQ}.row_scales"), f"tensor {WQ} is ["),
    "values of another shape": (0, with_part(0, lambda x: x[:5].clone()), f"tensor {WQ} is [5, "),
    "scales of another shape": (0, with_part(1, lambda x: x[:5].clone()), f"tensor {WQ}{{scales}} is [5"),
    "row scales of another rank": (0, with_part(2, lambda x: x[None].clone()), f"tensor {WQ}{{last}} is [1, "),
    "scales of another dtype": (0, with_part(1, lambda x: x.to(torch.bfloat16)), NO_SCALES),
    "row scales of another dtype": (0, with_part(2, lambda x: x.to(torch.bfloat16)), NO_SCALES),
    "values of another dtype": (0, in_dtype(WQ, torch.bfloat16), f"unexpected tensor {WQ}."),
    "a norm of integers": (4, in_dtype(NORM, torch.uint8), f"{NORM} is [192] U8; only"),
    "quantized embeddings": (
        4,
        lambda t, q: quantize_in_place(t, EMBEDDINGS, q),
        f"{EMBEDDINGS} is in {{format}}, which",
    ),
    "scales that no format has": (
        4,
        lambda t, q: t.update({"output.weight.scales": t["norm.weight"].clone()}),
        "unexpected tensor output.weight.scales",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(case: str, saved_tiny: Callable[[str], Path], tmp_path: Path, quantize: str) -> None:
    number, damage, says = DAMAGED[case]
    folder = Path(shutil.copytree(saved_tiny(quantize), tmp_path / "saved"))
    file = folder / f"{quantize}.{number:03}.safetensors"
    tensors = load_file(file)
    damage(tensors, quantize)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        llama3_raw.load(folder)
    _, scales, last = stored_names("", quantize)
    assert says.format(format=quantize, scales=scales, last=last) in str(caught.value)
    assert str(folder) in str(caught.value)


def test_damaged_files(saved_tiny: Callable[[str], Path], tmp_path: Path, quantize: str) -> None:
    folder = Path(shutil.copytree(saved_tiny(quantize), tmp_path / "saved"))
    (folder / f"{quantize}.001.safetensors").write_bytes(b"\x10" + bytes(20))
    with pytest.raises(UserError, match=rf"{quantize}.001.safetensors: damaged"):
        llama3_raw.load(folder)
    (folder / f"{quantize}.001.safetensors").unlink()
    with pytest.raises(UserError, match=r"tensor layers\.1\."):
        llama3_raw.load(folder)


# Memory

MEASURE = """
import ctypes, sys, torch
from pathlib import Path
import llama3_raw
from llama3_raw.quantization.matrix import FORMATS
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
for name in FORMATS:
    FORMATS[name].quantize(torch.ones(64, 64))
before = anonymous()
weights = llama3_raw.load(sys.argv[1], quantize=sys.argv[2] if len(sys.argv) > 2 else None).weights
ctypes.CDLL(None).malloc_trim(0)  # release freed memory that the allocator keeps
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_planned_memory_is_what_a_load_needs(tmp_path: Path, tied: bool, quantize: str) -> None:
    """The bytes of the quantized matrices if they are made, almost none if they are mapped."""
    content = {"dim": 1024, "n_layers": 2, "n_heads": 8, "vocab_size": 8000, "norm_eps": 1e-5}
    params = Params.from_meta(content)
    weights = random_weights(params, torch.bfloat16, seed=0, tied=tied)
    folder = write_meta(tmp_path / "model", content, to_state_dict(params, weights))
    save_quantized(folder, open_checkpoint(folder), tmp_path / "saved", quantize=quantize)

    def allocated(*arguments: str | Path) -> int:
        command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    plan = MemoryPlan(open_checkpoint(folder), CPU, None, RunShape(1, 1, 2), quantize=quantize)
    saved = llama3_raw.load(tmp_path / "saved").weights
    matrices = sum(matrix.nbytes for matrix in flat(saved) if not isinstance(matrix, Tensor))
    assert needed(plan).copied == matrices
    # the tolerance is for what remains of a piece in fp32
    assert allocated(folder, quantize) == pytest.approx(matrices, rel=0.02, abs=6e6)
    assert allocated(tmp_path / "saved") < 3e6
    mapped = needed(plan._replace(checkpoint=open_checkpoint(tmp_path / "saved"), quantize=None))
    assert mapped.copied == 0
    assert mapped.mapped < matrices + 1e6
