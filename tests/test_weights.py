"""Loading: what is mapped and what is copied, every format, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import converted, flat, hf_model, random_weights
from torch import Tensor

import llama3_raw
import llama3_raw.weights as weights_module
from llama3_raw import Model, Params, UserError, Weights, forward
from llama3_raw.params import RopeScaling
from llama3_raw.weights import tensor_places, to_state_dict

TINY = Path(__file__).parent.parent / "weights" / "tiny"
SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "norm_eps": 1e-5, "multiple_of": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the built-in model."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def write_meta(folder: Path, content: dict[str, Any], state_dict: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(content))
    torch.save(state_dict, folder / "consolidated.00.pth")
    return folder


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert len(ours.layers) == len(theirs.layers)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(theirs), strict=True))


def file_of(tensor: Tensor) -> str | None:
    """The file that the memory of a tensor belongs to, by /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else None
    return None


def test_the_contract() -> None:
    model = llama3_raw.load("weights/tiny" if Path("weights/tiny").exists() else TINY)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("Hello", bos=True)
    logits = llama3_raw.forward(model.weights, model.params, torch.tensor(ids))
    assert logits.shape == (len(ids), model.params.vocab_size)
    assert model.weights.layers[0].wq.shape == (model.params.dim, model.params.dim)
    cache = llama3_raw.KVCache.allocate(model.params, max_seq_len=512, like=model.weights, batch=(2,))
    assert cache.keys[0].shape == (2, 512, model.params.n_kv_heads, model.params.head_dim)
    assert cache.keys[0].dtype == torch.bfloat16


def test_equal_to_torch_load() -> None:
    model = llama3_raw.load(TINY)
    ours = to_state_dict(model.params, model.weights)
    for name, expected in torch.load(TINY / "consolidated.00.pth", weights_only=True).items():
        assert torch.equal(ours[name], expected)


def test_tables_that_are_computed_here_are_left_alone(folder: Path) -> None:
    change_tensors(lambda t: t.update({"rope.freqs": torch.empty(0)}))(folder)
    assert_same(llama3_raw.load(folder).weights, llama3_raw.load(TINY).weights)


def test_views_are_read_as_they_were_saved(tmp_path: Path) -> None:
    params = Params.from_meta(SMALL)
    state_dict = to_state_dict(params, random_weights(params, torch.bfloat16, seed=0))
    wq = "layers.1.attention.wq.weight"
    saved = dict(state_dict)
    saved[wq] = torch.stack([torch.zeros(64, 64), state_dict[wq].t()]).bfloat16()[1].t()
    model = llama3_raw.load(write_meta(tmp_path / "m", SMALL, saved))
    assert torch.equal(model.weights.layers[1].wq, state_dict[wq])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
def test_tensors_are_windows_into_the_file(folder: Path) -> None:
    model = llama3_raw.load(folder)
    for tensor in flat(model.weights):
        assert file_of(tensor) == str(folder / "consolidated.00.pth")


def test_a_write_never_reaches_the_file(folder: Path) -> None:
    file = folder / "consolidated.00.pth"
    before = file.read_bytes()
    model = llama3_raw.load(folder)
    for tensor in flat(model.weights):
        tensor.fill_(7.0)
    assert file.read_bytes() == before
    assert not torch.equal(llama3_raw.load(folder).weights.norm, model.weights.norm)


def test_a_read_only_file_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root, whom the file's mode does not hold back, it is looked at how the file is opened."""
    modes = []

    def spy(file: Any, mode: str = "r", *others: Any, **options: Any) -> Any:
        modes.append(mode)
        return open(file, mode, *others, **options)

    monkeypatch.setattr(weights_module, "open", spy, raising=False)
    (folder / "consolidated.00.pth").chmod(0o444)
    folder.chmod(0o555)
    try:
        model = llama3_raw.load(folder)
        model.weights.norm[0] = 3.0
    finally:
        folder.chmod(0o755)
    assert modes == ["rb"]


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the size of the RAM is asked by os.sysconf")
def test_a_file_larger_than_the_ram_maps(tmp_path: Path) -> None:
    """A sparse file of one and a half times the RAM. (Without MAP_NORESERVE Linux by default refuses to map it.)"""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    content = {"dim": 4096, "n_layers": 1, "n_heads": 32, "vocab_size": 1000, "norm_eps": 1e-5}
    content["n_layers"] = int(1.5 * ram / 400e6)
    params = Params.from_meta(content)
    empty = {place.meta_name: torch.empty(place.shape, dtype=torch.bfloat16) for place in tensor_places(params)}
    with torch.serialization.skip_data():
        folder = write_meta(tmp_path / "huge", content, empty)
    del empty
    file = folder / "consolidated.00.pth"
    assert file.stat().st_size > 1.4 * ram
    if file.stat().st_blocks * 512 > 1e9:
        pytest.skip("this file system has no sparse files")
    model = llama3_raw.load(folder)
    assert len(model.weights.layers) == content["n_layers"]
    assert model.weights.layers[-1].w2[-1].float().sum() == 0


def test_dtype_and_layers(folder: Path) -> None:
    whole = llama3_raw.load(folder)
    assert whole.weights.norm.dtype == torch.bfloat16
    part = llama3_raw.load(folder, dtype=torch.float32, layers=2, progress=True)
    assert len(part.weights.layers) == part.params.n_layers == 2
    assert all(tensor.dtype == torch.float32 for tensor in flat(part.weights))
    assert torch.equal(part.weights.layers[1].w2, whole.weights.layers[1].w2.float())
    with pytest.raises(UserError, match="dtype should be"):
        llama3_raw.load(folder, dtype=torch.int8)
    for layers in (0, whole.params.n_layers + 1):
        with pytest.raises(UserError, match=f"--layers {layers}"):
            llama3_raw.load(folder, layers=layers)


def test_metas_files_in_original(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "original")
    model = llama3_raw.load(tmp_path)
    assert model.tokenizer is not None
    assert_same(model.weights, llama3_raw.load(TINY).weights)


def test_no_tokenizer(folder: Path) -> None:
    elsewhere = folder.parent / "t.model"
    (folder / "tokenizer.model").rename(elsewhere)
    assert llama3_raw.load(folder).tokenizer is None
    assert llama3_raw.load(folder, tokenizer=elsewhere).tokenizer is not None
    (folder / "tokenizer.model").write_text("nonsense")
    assert llama3_raw.load(folder, tokenizer=False).tokenizer is None


def test_shards_are_joined(tmp_path: Path) -> None:
    """Split as Meta's two-way checkpoints are: by rows, but wo and w2 by columns, norms repeated."""
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.bfloat16, seed=5)
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in to_state_dict(params, weights).items():
        dimension = 1 if ".wo." in name or ".w2." in name else 0
        parts = [tensor, tensor] if tensor.dim() == 1 else list(tensor.chunk(2, dimension))
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    folder = write_meta(tmp_path / "m", SMALL, shards[0])
    torch.save(shards[1], folder / "consolidated.01.pth")
    assert_same(llama3_raw.load(folder).weights, weights)


HF_CASES = {
    "plain": ({}, {}),
    "scaled with factor 32": ({"rope_scaling": RopeScaling(32.0)}, {}),
    "sharded": ({}, {"max_shard_size": "40KB"}),
    "head_dim": ({"head_dim": 32}, {}),
}


@pytest.mark.parametrize("fields", ["new rope fields", "old rope fields"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", HF_CASES)
def test_a_folder_that_hf_saved(tmp_path: Path, case: str, tied: bool, fields: str) -> None:
    changes, save_options = HF_CASES[case]
    params = replace(Params.from_meta(SMALL), **changes)  # type: ignore[arg-type]
    theirs = hf_model(params, random_weights(params, torch.float32, seed=6, tied=tied))
    theirs.save_pretrained(tmp_path, **save_options)
    assert (tmp_path / "model.safetensors.index.json").exists() == (case == "sharded")
    if fields == "old rope fields":
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = llama3_raw.load(tmp_path)
    assert model.params == params
    assert (model.weights.output is model.weights.tok_embeddings) == tied
    tokens = torch.randint(params.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (forward(model.weights, model.params, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_hf_folder_is_mapped_too(tmp_path: Path) -> None:
    params = Params.from_meta(SMALL)
    hf_model(params, random_weights(params, torch.bfloat16, seed=7)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = file.read_bytes()
    weights = llama3_raw.load(tmp_path).weights
    if Path("/proc/self/maps").exists():
        assert file_of(weights.layers[0].w1) == str(file)
    weights.layers[0].w1.zero_()
    assert file.read_bytes() == before


class Malicious:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


def test_code_in_a_checkpoint_does_not_run(folder: Path) -> None:
    trace = folder / "it ran"
    torch.save({"norm.weight": Malicious(trace)}, folder / "consolidated.00.pth")
    with pytest.raises(UserError, match="something other than plain tensors, refused"):
        llama3_raw.load(folder)
    assert not trace.exists()
    torch.load(folder / "consolidated.00.pth", weights_only=False)  # the file would have done it
    assert trace.exists()


def change_tensors(change: Callable[[dict[str, Tensor]], Any], shard: int = 0) -> Callable[[Path], None]:
    """Damage: the first shard's tensors, changed, in place of that shard or as another beside it."""

    def apply(folder: Path) -> None:
        tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
        change(tensors)
        torch.save(tensors, folder / f"consolidated.{shard:02}.pth")

    return apply


def overwrite(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut_checkpoint(share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "consolidated.00.pth"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return apply


WQ = "layers.0.attention.wq.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no such folder"),
    "no checkpoint": (lambda f: (f / "consolidated.00.pth").unlink(), "no model here"),
    "no params": (lambda f: (f / "params.json").unlink(), "no model here"),
    "empty checkpoint": (overwrite("consolidated.00.pth", b""), "the file is empty"),
    "HTML": (overwrite("consolidated.00.pth", b"<!doctype html><html>"), "an HTML page"),
    "git-lfs": (overwrite("consolidated.00.pth", b"version https://git-lfs.github.com/spec/v1"), "git-lfs pointer"),
    "not a zip file": (overwrite("consolidated.00.pth", b"\x80\x02}q\x00."), "not a checkpoint of torch.save"),
    "cut at 1 %": (cut_checkpoint(0.01), "damaged or cut short"),
    "cut at 50 %": (cut_checkpoint(0.5), "damaged or cut short"),
    "cut at 99.9 %": (cut_checkpoint(0.999), "damaged or cut short"),
    "a list": (lambda f: torch.save([1], f / "consolidated.00.pth"), "should hold a dictionary of tensors"),
    "a number": (change_tensors(lambda t: t.update({WQ: 3})), f"'{WQ}' should be a name with a plain tensor, is a int"),
    "a number as name": (change_tensors(lambda t: t.update({3: t[WQ]})), "3 should be a name with a plain tensor"),
    "sparse": (change_tensors(lambda t: t.update({WQ: t[WQ].float().to_sparse()})), "plain tensor"),
    "no values": (change_tensors(lambda t: t.update({WQ: t[WQ][:0]})), f"{WQ} is empty"),
    "missing": (change_tensors(lambda t: t.pop(WQ)), f"tensor {WQ} is missing; it should be [192, 192]"),
    "extra": (change_tensors(lambda t: t.update({"x.weight": t[WQ]})), "unexpected tensor x.weight"),
    "shape": (change_tensors(lambda t: t.update({WQ: t[WQ][:5]})), f"{WQ} is [5, 192], should be [192, 192]"),
    "dtype": (change_tensors(lambda t: t.update({WQ: t[WQ].float()})), f"{WQ} is torch.float32, should be"),
    "all in fp64": (
        change_tensors(lambda t: t.update({name: tensor.double() for name, tensor in t.items()})),
        "is torch.float64, should be bfloat16, float16 or float32",
    ),
    "integers": (change_tensors(lambda t: t.update({WQ: t[WQ].int()})), f"{WQ} is torch.int32"),
    "unlike shards": (
        change_tensors(lambda t: t.update({"tok_embeddings.weight": t[WQ]}), shard=1),
        "tok_embeddings.weight is [2304, 192] and [192, 192]",
    ),
    "too many shards": (change_tensors(lambda t: None, shard=1), "is [4608, 192], should be [2304, 192]"),
    "many layers": (overwrite("params.json", json.dumps({**SMALL, "n_layers": 2**30}).encode()), "layers cannot be"),
    "other params": (overwrite("params.json", json.dumps(SMALL).encode()), "the params describe a model without it"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_named(folder: Path, case: str) -> None:
    damage, message = WRONG[case]
    damage(folder)
    with pytest.raises(UserError) as caught:
        llama3_raw.load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_of_another_model(folder: Path, meta_tokenizer_file: Path) -> None:
    shutil.copy(meta_tokenizer_file, folder / "tokenizer.model")
    with pytest.raises(UserError, match="has 128256 tokens, but the model has 2304"):
        llama3_raw.load(folder)


def test_a_damaged_hf_folder_is_named(tmp_path: Path) -> None:
    params = Params.from_meta(SMALL)
    hf_model(params, random_weights(params, torch.float32, seed=8)).save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["lm_head.weight"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=f"{shard.name}: damaged or cut short"):
        llama3_raw.load(tmp_path)
    shard.write_bytes(b"<html></html>")
    with pytest.raises(UserError, match=f"{shard.name}: this is an HTML page"):
        llama3_raw.load(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"names {shard.name}, which is not in the folder"):
        llama3_raw.load(tmp_path)
    for wrong in ("[]", "{}", '{"weight_map": {"a": 5}}', "[" * 99999):
        (tmp_path / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(UserError, match="not a safetensors index"):
            llama3_raw.load(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
def test_loading_to_a_gpu(tiny: Model) -> None:
    on_gpu = llama3_raw.load(TINY, device="cuda")
    assert_same(converted(on_gpu.weights, Tensor.cpu), tiny.weights)
