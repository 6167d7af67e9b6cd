"""Conversion keeps the bits, for any number of shards and both formats; transformers loads it; memory stays low."""

from __future__ import annotations

import errno
import filecmp
import itertools
import json
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import llama3_raw
from llama3_raw import Params, convert, forward
from llama3_raw.checkpoint import writing
from llama3_raw.checkpoint.checkpoint import open_checkpoint
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.writing import save_quantized
from llama3_raw.convert import main
from llama3_raw.params import RopeScaling
from llama3_raw.weights import tensor_specs
from tests.paths import TINY
from tests.references import hf_model, random_weights

# every dimension divides by 8; with 8 shards each has two rows of wk, less than a head
DIVISIBLE = {
    "dim": 64,
    "n_layers": 1,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "norm_eps": 1e-5,
    "multiple_of": 32,
}
COUNTS = (1, 2, 4, 8)
WQ, WK = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so small that tensors have several, with other boundaries than the shards."""
    monkeypatch.setattr(convert, "CHUNK", 3000)


def state_dict(seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    params = Params.from_meta(DIVISIBLE)
    return to_state_dict(params, random_weights(params, dtype, seed, tied))


def split(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Split as Meta does: matrices by rows, but wo and w2 by columns, and norms in each shard."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        dimension = 1 if ".wo." in name or ".w2." in name else 0
        slices = [tensor] * count if tensor.dim() == 1 else tensor.chunk(count, dimension)
        for shard, piece in zip(shards, slices, strict=True):
            shard[name] = piece.clone()
    return shards


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(DIVISIBLE))
    for number, shard in enumerate(split(tensors, count)):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    return folder


def run(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the command, which must fail. Return its error line; stdout is empty."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *before, line = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("llama3_raw")]
    assert all("wrote" in other or "only compared" in other for other in before)
    return line.removeprefix("llama3_raw: error: ")


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(file.name for file in ours.iterdir())
    assert names == sorted(file.name for file in theirs.iterdir())
    assert filecmp.cmpfiles(ours, theirs, names, shallow=False) == (names, [], [])


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of shards -> a folder converted from a single file, one chunk per tensor."""
    folder = tmp_path_factory.mktemp("direct")
    whole = write_shards(folder / "whole", state_dict())
    for count in COUNTS:
        run(whole, folder / str(count), "--shards", str(count))
    return {count: folder / str(count) for count in COUNTS}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("old", "new"), list(itertools.product(COUNTS, COUNTS)))
def test_every_number_of_shards(
    tmp_path: Path, old: int, new: int, direct: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file has the tensors of a direct split, and the same bytes whatever it was converted from."""
    tensors = state_dict()
    source = write_shards(tmp_path / "source", tensors, old)
    capsys.readouterr()
    run(source, tmp_path / "new", "--shards", str(new), "--verify")
    assert capsys.readouterr().out.startswith(f"{len(tensors)} tensors of {tmp_path / 'new'} have the same bits")
    files = sorted(file for file in (tmp_path / "new").iterdir() if file.suffix == ".pth")
    assert len(files) == new
    for file, expected in zip(files, split(tensors, new), strict=True):
        assert_same_tensors(torch.load(file, weights_only=True, mmap=True), expected)
    assert_same_files(tmp_path / "new", direct[new])
    assert json.loads((tmp_path / "new" / "params.json").read_text()) == DIVISIBLE


MODELS: dict[str, tuple[dict[str, Any], bool, torch.dtype]] = {
    "grouped": ({}, False, torch.float32),
    "tied": ({}, True, torch.float32),
    "scaled as Llama 3.1": ({"rope_scaling": RopeScaling(8.0), "max_seq_len": 131072}, False, torch.float32),
    "scaled as Llama 3.2, tied": ({"rope_scaling": RopeScaling(32.0), "rope_theta": 5e5}, True, torch.float32),
    "multi-head, bf16": ({"n_kv_heads": 8, "hidden_dim": 88}, False, torch.bfloat16),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("model", MODELS)
def test_to_meta_and_back(tmp_path: Path, model: str) -> None:
    """A folder that transformers wrote: the same tensors come back, and the same files the second time."""
    changes, tied, dtype = MODELS[model]
    params = replace(Params.from_meta(DIVISIBLE), **changes)
    weights = random_weights(params, dtype, seed=1, tied=tied)
    hf_model(params, weights).save_pretrained(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "meta", "--verify")
    in_meta = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert_same_tensors(in_meta, to_state_dict(params, weights))
    assert Params.from_file(tmp_path / "meta" / "params.json") == params
    run(tmp_path / "meta", tmp_path / "hf again", "--verify")
    assert_same_tensors(
        load_file(tmp_path / "hf again" / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    )
    run(tmp_path / "hf again", tmp_path / "meta again")
    run(tmp_path / "meta again", tmp_path / "hf at the end")
    assert_same_files(tmp_path / "meta again", tmp_path / "meta")
    assert_same_files(tmp_path / "hf at the end", tmp_path / "hf again")


def from_pretrained(folder: Path) -> Any:
    """Load a folder with transformers in fp32; no tensor may be missing or unexpected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaForCausalLM

        loaded: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, loading_info = loaded
    assert not any(loading_info.values()), loading_info
    return model.eval()


def assert_same_logits(folder: Path, source: Path) -> None:
    model = llama3_raw.load(source, dtype=torch.float32)
    tokens = torch.randint(model.params.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = from_pretrained(folder)(tokens).logits
        ours = forward(model.weights, model.params, tokens)
        assert torch.equal(forward(*llama3_raw.load(folder, dtype=torch.float32)[:2], tokens), ours)
    assert ours.abs().max() > 1
    assert (theirs - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_the_same(tmp_path: Path, model: str) -> None:
    changes, tied, dtype = MODELS[model]
    params = replace(Params.from_meta(DIVISIBLE), **changes)
    tensors = to_state_dict(params, random_weights(params, dtype, seed=2, tied=tied))
    source = write_shards(tmp_path / "meta", tensors, 2)
    (source / "params.json").write_text(json.dumps(params.to_meta()))
    run(source, tmp_path / "hf")
    assert_same_logits(tmp_path / "hf", source)


def test_the_built_in_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is copied too, and the config has the tokens with which a text begins and ends."""
    monkeypatch.chdir(tmp_path)
    run("tiny", "tiny-hf", "--verify")
    run("tiny-hf", "tiny-2", "--shards", "2")
    out, err = capsys.readouterr()
    assert out.startswith("38 tensors of tiny-hf have the same bits as those of ")
    assert "llama3_raw: wrote tiny-hf, in Hugging Face's format; run it with --weights tiny-hf\n" in err
    assert "llama3_raw: wrote tiny-2, in Meta's format, 2 shards; run it with --weights tiny-2\n" in err
    Path("tiny-hf").rename("hf")
    assert_same_logits(tmp_path / "hf", TINY)
    assert filecmp.cmp(tmp_path / "hf" / "tokenizer.model", TINY / "tokenizer.model", shallow=False)
    tokenizer = llama3_raw.Tokenizer(TINY / "tokenizer.model")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.bos_token_id == tokenizer.bos_id
    assert set(config.eos_token_id) == tokenizer.stop_ids
    assert config.dtype == torch.bfloat16


def test_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file with a single tensor may exceed the limit; safetensors and transformers read all of them."""
    tensors = state_dict()
    monkeypatch.setattr(convert, "LARGEST_FILE", 8000)
    run(write_shards(tmp_path / "meta", tensors), tmp_path / "hf", "--verify")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    seen: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 8000 or len(sizes) == 1
        seen |= dict.fromkeys(sizes, file.name)
    assert index["weight_map"] == seen
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same_logits(tmp_path / "hf", tmp_path / "meta")


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    """In safetensors the wider dtypes come first, so that all tensors are aligned."""
    tensors = state_dict()
    tensors = {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    run(write_shards(tmp_path / "meta", tensors), tmp_path / "hf", "--verify")
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(loaded["model.norm.weight"], tensors["norm.weight"])
    assert loaded["model.norm.weight"].dtype == torch.float32
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    by_offset = sorted(header.values(), key=lambda entry: entry["data_offsets"])
    assert [entry["dtype"] for entry in by_offset] == ["F32"] * 3 + ["BF16"] * 9


def test_files_that_are_copied_too(tmp_path: Path) -> None:
    """In a repository with Meta's files in original/: tokenizer.model, and for Hugging Face's format its own files."""
    source = tmp_path / "repository"
    write_shards(source / "original", state_dict())
    (source / "original" / "tokenizer.model").write_text("unchanged")
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        (source / name).write_text(name)
    run(source, tmp_path / "hf")
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "generation_config.json"),
    }
    assert (tmp_path / "hf" / "tokenizer.model").read_text() == "unchanged"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None
    (source / "tokenizer.model").write_text("preferred")
    run(source, tmp_path / "meta", "--to", "meta")
    names = {file.name for file in (tmp_path / "meta").iterdir()}
    assert names == {"params.json", "consolidated.00.pth", "tokenizer.model"}
    assert (tmp_path / "meta" / "tokenizer.model").read_text() == "preferred"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    run("tiny", tmp_path / "new", "--shards", "2")
    assert (tmp_path / "new" / "consolidated.01.pth").exists()


# --verify


def flip(file: Path, tensor: Tensor, offset: int) -> None:
    """Flip the sign of one value of a tensor, whose bytes are searched for in the file."""
    content = bytearray(file.read_bytes())
    bits = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    assert content.count(bits) == 1
    content[content.index(bits) + tensor.itemsize * (offset + 1) - 1] ^= 0x80
    file.write_bytes(content)


def test_one_flipped_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both formats, even if 0 becomes -0; NaN equals itself."""
    tensors = state_dict()
    tensors[WK][3, 5] = 0
    tensors["norm.weight"][1] = float("nan")
    source = write_shards(tmp_path / "source", tensors)
    run(source, tmp_path / "meta", "--shards", "1", "--verify")
    run(source, tmp_path / "hf", "--to", "hf", "--verify")
    flip(tmp_path / "meta" / "consolidated.00.pth", tensors[WK], 3 * 64 + 5)
    line = refusal(capsys, source, tmp_path / "meta", "--verify")
    assert f"tensor {WK} differs, first in row 3; it is not a copy of" in line
    written = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    flip(tmp_path / "hf" / "model.safetensors", written, 64 * written.shape[1] - 1)
    line = refusal(capsys, source, tmp_path / "hf", "--verify")
    assert "tensor model.layers.0.mlp.down_proj.weight differs, first in row 63;" in line


def test_what_is_not_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = state_dict()
    source = write_shards(tmp_path / "source", tensors)
    tied = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    line = refusal(capsys, source, write_shards(tmp_path / "tied", tied), "--verify")
    assert "only one of the two has a separate output matrix" in line
    wide = write_shards(tmp_path / "wide", {name: tensor.float() for name, tensor in tensors.items()})
    assert f"tensor {next(iter(tensors))} is in float32, not in bfloat16" in refusal(capsys, source, wide, "--verify")
    other = write_shards(tmp_path / "other", tensors)
    (other / "params.json").write_text(json.dumps({**DIVISIBLE, "norm_eps": 1e-6}))
    assert "norm_eps is 1e-06, not 1e-05" in refusal(capsys, source, other, "--verify")


def test_an_existing_folder_is_only_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_shards(tmp_path / "source", state_dict())
    existing = write_shards(tmp_path / "existing", state_dict(), 4)
    before = {file: file.stat().st_mtime_ns for file in existing.iterdir()}
    for options in ([], ["--shards", "4"]):
        run(source, existing, "--verify", *options)
        out, err = capsys.readouterr()
        assert out == f"12 tensors of {existing} have the same bits as those of {source}\n"
        assert "exists already, in Meta's format, 4 shards; it is only compared" in err
    assert {file: file.stat().st_mtime_ns for file in existing.iterdir()} == before
    for options in (["--shards", "2"], ["--to", "hf"]):
        line = refusal(capsys, source, existing, "--verify", *options)
        assert "exists already, in Meta's format, 4 shards, not in" in line


# Errors, and what they leave behind


def head_dim(folder: Path) -> Path:
    params = replace(Params.from_meta(DIVISIBLE), head_dim=16)
    hf_model(params, random_weights(params, torch.bfloat16, seed=0)).save_pretrained(folder)
    return folder


def scaling(folder: Path) -> Path:
    params = replace(Params.from_meta(DIVISIBLE), rope_scaling=RopeScaling(8.0, low_freq_factor=2.0))
    hf_model(params, random_weights(params, torch.bfloat16, seed=0)).save_pretrained(folder)
    return folder


def in_int8(folder: Path) -> Path:
    save_quantized(TINY, open_checkpoint(TINY), folder)
    return folder


def mixed(folder: Path) -> Path:
    write_shards(folder, state_dict(), 2)
    shard = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(shard | {WQ: shard[WQ].float()}, folder / "consolidated.01.pth")
    return folder


def meta(folder: Path) -> Path:
    return write_shards(folder, state_dict())


def in_hf(folder: Path) -> Path:
    run(meta(folder.with_name("meta")), folder)
    return folder


REFUSED: list[tuple[Callable[[Path], Path], str, str]] = [
    (meta, "--shards 5", "--shards 5: the 96 rows of tok_embeddings.weight do not divide"),
    (meta, "--shards 32", "--shards 32: the 16 rows of layers.0.attention.wk.weight do not divide"),
    (meta, "--shards 128", "--shards 128: Meta numbers its files from 00 to 99"),
    (meta, "--shards 0", "argument --shards: should be 1 or more"),
    (meta, "--to hf --shards 2", "--shards 2: is only for Meta's format"),
    (meta, "--to gguf", "argument --to: invalid choice: 'gguf'"),
    (in_hf, "--to hf", "--to hf: SOURCE is in Hugging Face's format already"),
    (in_int8, "--to hf", "SOURCE: is in int8, which neither format has"),
    (mixed, "", f"SOURCE: the shards have {WQ} in several dtypes"),
    (head_dim, "", "SOURCE/config.json: head_dim = 16 is not 64 / 8"),
    (scaling, "", "SOURCE/config.json: RopeScaling(factor=8.0, low_freq_factor=2.0"),
]


@pytest.mark.parametrize(
    ("make", "options", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)[:30])
)
def test_refused(
    make: Callable[[Path], Path], options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source")
    before = sorted(tmp_path.iterdir())
    line = refusal(capsys, source, tmp_path / "new", *options.split())
    assert line.startswith(message.replace("SOURCE", str(source)))
    assert sorted(tmp_path.iterdir()) == before


def test_source_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = meta(tmp_path / "source")
    assert "is SOURCE itself" in refusal(capsys, source, tmp_path / "." / "source", "--verify")
    (tmp_path / "link").symlink_to(source)
    assert "is SOURCE itself" in refusal(capsys, source, tmp_path / "link")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("precious")
    assert "already exists and is not empty" in refusal(capsys, source, tmp_path / "other")
    assert "already exists and is not empty" in refusal(capsys, source, tmp_path / "other" / "precious")
    assert "no model here" in refusal(capsys, source, tmp_path / "other", "--verify")
    assert (tmp_path / "other" / "precious").read_text() == "precious"
    assert "SOURCE nowhere: there is no such folder" in refusal(capsys, "nowhere", tmp_path / "new")


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    assert "0.0 GB are needed, 0.0 GB are free" in refusal(capsys, "tiny", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_memory_that_the_system_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit on address space (ulimit -v): tensors for the file's structure use addresses, but no memory."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty_like", refused)
    assert "can't allocate memory; name another" in refusal(capsys, "tiny", tmp_path / "new", "--shards", "2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_left_behind(
    error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk becomes full, or the user presses Ctrl-C, in the middle of the tensors."""
    count = itertools.count()

    def write_at(*arguments: Any) -> None:
        if next(count) == 20:
            raise error
        writing.write_at(*arguments)

    monkeypatch.setattr(convert, "write_at", write_at)
    assert main(["tiny", str(tmp_path / "new"), "--shards", "2"]) == (2 if isinstance(error, OSError) else 130)
    assert ("No space left" in capsys.readouterr().err) == isinstance(error, OSError)
    assert next(count) > 20
    assert list(tmp_path.iterdir()) == []


# Memory

# prints the most anonymous memory at any write; the model is zeros, which take no space on the disk
WATCHED = """
import os, shutil
from pathlib import Path
from llama3_raw import convert

def anonymous_memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

write_at, peak = convert.write_at, 0

def watched(*arguments):
    global peak
    peak = max(peak, anonymous_memory())
    write_at(*arguments)

convert.write_at = watched
for source, folder, to, shards in (
    ("meta", "sharded", "meta", 4), ("sharded", "hf", "hf", 1), ("hf", "back", "meta", 2), ("back", "whole", "meta", 1)
):
    if os.fork() == 0:  # separate processes: freed memory would be reused without asking the system
        checkpoint = convert.open_source(Path(source))
        before = anonymous_memory()
        convert.convert(Path(source), checkpoint, Path(folder), to, shards)
        print(peak - before, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0
    shutil.rmtree(source)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
def test_in_the_memory_of_two_tensors(tmp_path: Path) -> None:
    """The model is seven times as large. Memory-mapped pages of the file do not count."""
    content = {**DIVISIBLE, "dim": 1024, "n_heads": 16, "n_layers": 6, "vocab_size": 12288, "multiple_of": 2816}
    specs = list(tensor_specs(Params.from_meta(content)))
    sizes = [2 * torch.Size(spec.shape).numel() for spec in specs]
    empty = {spec.meta_name: torch.empty(spec.shape, dtype=torch.bfloat16, device="meta") for spec in specs}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(content))
    writing.write_empty_checkpoint(tmp_path / "meta" / "consolidated.00.pth", empty)
    assert sum(sizes) > 7 * max(sizes)
    done = subprocess.run([sys.executable, "-c", WATCHED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
    assert all(0 < int(peak) <= 2 * max(sizes) for peak in done.stdout.split()), done.stdout
