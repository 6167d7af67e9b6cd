"""Blocks of a GGUF file, interleaved in memory for the CPU's kernels."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

import llama3_raw
from llama3_raw.__main__ import main
from llama3_raw.backends import cpu
from llama3_raw.backends.repacking import repack
from llama3_raw.batch.__main__ import main as batch
from llama3_raw.chat.__main__ import main as chat
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.cli import models
from llama3_raw.cli.main_parser import build_parser
from llama3_raw.cli.memory_plan import MemoryPlan, RunShape, check_memory, needed
from llama3_raw.convert import main as convert
from llama3_raw.errors import UserError
from llama3_raw.quantization.blocks import Blocks
from tests.paths import TINY

CPU = torch.device("cpu")
SHAPE = RunShape(5, 9, 6)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with its matrices in Q8_0."""
    file = tmp_path_factory.mktemp("q8") / "tiny.gguf"
    assert convert([str(TINY), str(file), "--outtype", "q8_0"]) == 0
    return file


def is_interleaved(matrix: object) -> bool:
    return isinstance(matrix, Blocks) and matrix.is_interleaved


@pytest.mark.usefixtures("cpu_kernels")
def test_the_logits_keep_their_bits(gguf_file: Path) -> None:
    model = llama3_raw.load(gguf_file)
    before = [tensor.data.clone() for tensor in model.weights.layers[0] if isinstance(tensor, Blocks)]
    repacked = repack(model.weights, are_mapped=True)
    assert all(map(is_interleaved, (*repacked.layers[-1][1:5], *repacked.layers[-1][6:], repacked.output)))
    assert repacked.tok_embeddings is model.weights.tok_embeddings
    ids = torch.arange(9)
    for length in (1, 9):
        logits = [
            llama3_raw.forward(weights, model.params, ids[:length], ops=cpu.fast_ops())
            for weights in (model.weights, repacked)
        ]
        assert torch.equal(*logits)
    assert repack(repacked).output is repacked.output
    after = [tensor.data for tensor in model.weights.layers[0] if isinstance(tensor, Blocks)]
    assert all(map(torch.equal, before, after))  # pages that were dropped are read again


@pytest.mark.usefixtures("cpu_kernels")
def test_a_number_of_outputs_that_is_no_multiple_of_16_stays(gguf_file: Path) -> None:
    weights = llama3_raw.load(gguf_file).weights
    assert isinstance(weights.output, Blocks)
    output = weights.output._replace(data=weights.output.data[:-8])
    assert repack(weights._replace(output=output)).output is output


def test_other_weights_stay_as_they_are(tiny: llama3_raw.Model) -> None:
    assert repack(tiny.weights) is tiny.weights


@pytest.mark.parametrize(("generated", "free", "expected"), [(64, 2.0, True), (63, 2.0, False), (64, 1.1, False)])
def test_when_a_copy_pays(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, generated: int, free: float, expected: bool
) -> None:
    """For long texts, with a tenth of the memory to spare. A chat's window may be full of the question."""
    plan = MemoryPlan(open_checkpoint(gguf_file), CPU, None, RunShape(9, 9, 1, generated=generated))
    n_bytes = int(free * needed(plan._replace(repack=True)).allocated)
    monkeypatch.setattr("llama3_raw.cli.models.available", lambda plan: n_bytes)
    assert models._repacks(plan) is expected
    assert not models._repacks(plan._replace(exact=True))
    assert not models._repacks(plan._replace(max_ram=10**12))


def test_commands_say_how_much_they_generate(monkeypatch: pytest.MonkeyPatch, gguf_file: Path, tmp_path: Path) -> None:
    shapes = []

    def stop(chosen: object, shape: RunShape, *_: object) -> None:
        shapes.append(shape)
        raise UserError("enough")

    for module in ("chat", "batch"):
        monkeypatch.setattr(f"llama3_raw.{module}.__main__.load_model", stop)
    model = ["--weights", str(gguf_file), "--max-new-tokens", "70"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert chat([*model, "--template", "llama3"]) == 2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"prompt": "Once upon a time there was", "max_new_tokens": 2}\n')
    assert batch([*model, str(prompts), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert [shape.generated for shape in shapes] == [70, 70]


@pytest.mark.usefixtures("cpu_kernels")
def test_the_command_repacks_where_a_text_is_generated(
    gguf_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: object, **options: object) -> llama3_raw.Weights:
        calls.append(arguments)
        return repack(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("llama3_raw.cli.models.repack", counted)
    texts = []
    cases = {"--repack --max-new-tokens 4": 1, "--max-new-tokens 64": 1, "--max-new-tokens 63": 0, "--no-repack": 0}
    for options, expected in {**cases, "--reference": 0}.items():
        calls.clear()
        assert main(["--weights", str(gguf_file), "--stop", "was", *options.split(), "Once upon a time"]) == 0
        texts.append(capsys.readouterr().out)
        assert len(calls) == expected
    assert texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        ("tiny", [], "--repack is for a GGUF file in blocks, such as Q4_K_M; leave it out"),
        ("gguf", ["--dtype", "float32"], "--repack is for the CPU's kernels in bfloat16; leave it out"),
        ("gguf", ["--reference"], "--repack is for the CPU's kernels; leave it, or --reference and --break, out"),
        ("gguf", ["--max-ram", "4GB"], "--max-ram leaves the weights in their file, and --repack copies them"),
    ],
)
def test_options_that_do_not_go_with_it(
    gguf_file: Path, capsys: pytest.CaptureFixture[str], weights: str, options: list[str], expected: str
) -> None:
    model = str(gguf_file if weights == "gguf" else TINY)
    assert main(["--weights", model, "--repack", *options, "Once"]) == 2
    assert expected in capsys.readouterr().err


def test_the_copy_counts_as_memory(gguf_file: Path) -> None:
    plan = MemoryPlan(open_checkpoint(gguf_file), CPU, None, SHAPE)
    mapped, copied = needed(plan), needed(plan._replace(repack=True))
    assert (copied.copied, copied.mapped) == (mapped.copied + mapped.mapped, 0)
    too_little = copied.allocated - 1
    with pytest.raises(UserError, match="--no-repack"):
        check_memory(plan._replace(repack=True), lambda device: too_little)


@pytest.mark.parametrize(("option", "expected"), [("--repack", None), ("--no-repack", False)])
def test_another_model_is_not_repacked_because_of_the_option(option: str, expected: bool | None) -> None:
    """As that of --with, --draft and --compare-to, which may have no blocks."""
    options = build_parser().parse_args(["--weights", str(TINY), option, "Once"])
    assert models.choose_model(options, named_by="--with").repack is expected
