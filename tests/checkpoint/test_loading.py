"""Loading: what is mapped and what is copied, in every format. (Refused files: test_refusals.py)"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import Params, UserError, forward
from llama3_raw.checkpoint import mapping
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.checkpoint.locate import find_named, local_models
from llama3_raw.params import RopeScaling
from llama3_raw.weights import tensor_specs
from tests.checkpoint.files import SMALL, assert_same, file_of, write_meta
from tests.paths import TINY
from tests.references import dense, flat, hf_model, random_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the built-in model."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_the_public_api() -> None:
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


def test_computed_tables_in_a_file_are_ignored(folder: Path) -> None:
    file = folder / "consolidated.00.pth"
    torch.save(torch.load(file, weights_only=True) | {"rope.freqs": torch.empty(0)}, file)
    assert_same(llama3_raw.load(folder).weights, llama3_raw.load(TINY).weights)


def test_views_are_read_as_they_were_saved(tmp_path: Path) -> None:
    params = Params.from_meta(SMALL)
    state_dict = to_state_dict(params, random_weights(params, torch.bfloat16, seed=0))
    wq = "layers.1.attention.wq.weight"
    saved = dict(state_dict)
    saved[wq] = torch.stack([torch.zeros(64, 64), state_dict[wq].t()]).bfloat16()[1].t()
    model = llama3_raw.load(write_meta(tmp_path / "m", SMALL, saved))
    assert torch.equal(dense(model.weights.layers[1].wq), state_dict[wq])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
def test_tensors_are_mapped_from_the_file(folder: Path) -> None:
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
    """Root may write to a read-only file, so the test checks the mode in which the file is opened."""
    modes = []

    def spy(file: Any, mode: str = "r", *others: Any, **options: Any) -> Any:
        modes.append(mode)
        return open(file, mode, *others, **options)

    monkeypatch.setattr(mapping, "open", spy, raising=False)
    (folder / "consolidated.00.pth").chmod(0o444)
    folder.chmod(0o555)
    try:
        model = llama3_raw.load(folder)
        model.weights.norm[0] = 3.0
    finally:
        folder.chmod(0o755)
    assert modes == ["rb"]


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the size of the RAM comes from os.sysconf")
def test_a_file_larger_than_the_ram_maps(tmp_path: Path) -> None:
    """A sparse file of 1.5 times the RAM. (Without MAP_NORESERVE, Linux by default refuses to map it.)"""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    content = {"dim": 4096, "n_layers": 1, "n_heads": 32, "vocab_size": 1000, "norm_eps": 1e-5}
    content["n_layers"] = int(1.5 * ram / 400e6)
    params = Params.from_meta(content)
    empty = {spec.meta_name: torch.empty(spec.shape, dtype=torch.bfloat16) for spec in tensor_specs(params)}
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
    assert torch.equal(dense(part.weights.layers[1].w2), dense(whole.weights.layers[1].w2).float())
    by_name = llama3_raw.load(folder, dtype="float32", layers=2)
    assert all(torch.equal(a, b) for a, b in zip(flat(by_name.weights), flat(part.weights), strict=True))
    for wrong in (torch.int8, "fp32"):
        with pytest.raises(UserError, match=f"^dtype {wrong}: should be one of bfloat16, float16, float32, float64$"):
            llama3_raw.load(folder, dtype=wrong)
    for layers in (0, whole.params.n_layers + 1):
        with pytest.raises(UserError, match=f"^layers {layers}"):
            llama3_raw.load(folder, layers=layers)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lost: there is no such folder"):
        llama3_raw.load(tmp_path / "lost")


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--weights` takes it; a Path is a path."""
    monkeypatch.chdir(tmp_path)
    assert llama3_raw.load("tiny").name == "tiny"
    with pytest.raises(UserError, match=r"^tiny: there is no such folder or file"):
        llama3_raw.load(Path("tiny"))
    (tmp_path / "weights").mkdir()
    with pytest.raises(UserError, match=r"^weights/mine: there is no such folder, and weights/ holds "):
        llama3_raw.load("weights/mine")
    with pytest.raises(UserError, match=r"^some/model: neither a folder here nor in the Hugging Face cache; fetch it"):
        llama3_raw.load("some/model")


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In weights/, or weights/ itself: other models are found, the built-in one too; its own path says why."""
    exists = Path.exists

    def hidden(path: Path, **settings: Any) -> bool:
        if "secret" in path.parts[:-1]:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **settings)

    (tmp_path / "weights" / "secret").mkdir(parents=True)
    shutil.copytree(TINY, tmp_path / "weights" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", hidden)
    assert set(local_models()) >= {"mine", "tiny"}
    assert find_named("mine") == Path("weights/mine")

    def is_dir(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert find_named("mine") == Path("weights/mine")
    with pytest.raises(PermissionError):
        find_named("weights/mine")


def test_a_repository_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--some--model", "0123" * 10
    shutil.copytree(TINY, repo / "snapshots" / commit)
    for name in ("some/model", f"some/model@{commit[:7]}"):
        model = llama3_raw.load(name)
        assert model.name == "some/model"
        assert model.tokenizer is not None
    with pytest.raises(UserError, match="neither a folder here nor in the Hugging Face cache"):
        llama3_raw.load("some/model@4567")


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
    """Split as in Meta's checkpoints of two shards: by rows, wo and w2 by columns, norms repeated."""
    params = Params.from_meta(SMALL)
    weights = random_weights(params, torch.bfloat16, seed=5)
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in to_state_dict(params, weights).items():
        dimension = 1 if ".wo." in name or ".w2." in name else 0
        slices = [tensor, tensor] if tensor.dim() == 1 else list(tensor.chunk(2, dimension))
        for shard, piece in zip(shards, slices, strict=True):
            shard[name] = piece.clone()
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
def test_a_folder_saved_by_hf(tmp_path: Path, case: str, tied: bool, fields: str) -> None:
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
        assert file_of(dense(weights.layers[0].w1)) == str(file)
    weights.layers[0].w1.zero_()
    assert file.read_bytes() == before


def flags_at(address: int) -> list[str]:
    """Return the flags of the mapping at an address, as in proc(5)."""
    for piece in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(number, 16) for number in piece.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return piece.rpartition("VmFlags:")[2].split()
    return []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads the flags of mappings from /proc")
def test_a_row_of_the_embeddings_is_read_alone(tmp_path: Path) -> None:
    """Not with megabytes around it (rr: random reads); the matrices are read as the system likes."""
    content = {**SMALL, "vocab_size": 4096}
    params = Params.from_meta(content)
    write_meta(tmp_path, content, to_state_dict(params, random_weights(params, torch.bfloat16, seed=0)))
    weights = llama3_raw.load(tmp_path, tokenizer=False).weights
    assert isinstance(weights.tok_embeddings, Tensor)
    assert isinstance(weights.output, Tensor)
    assert "rr" in flags_at(weights.tok_embeddings[2048].data_ptr())
    assert "rr" not in flags_at(weights.output[2048].data_ptr())
