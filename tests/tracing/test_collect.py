"""Collecting tensors over a corpus: the files against passes by hand, resuming, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import Collection, Model, UserError, collect, load_collection
from llama3_raw.ops import Tap
from llama3_raw.tracing import collect as module
from llama3_raw.tracing.__main__ import main
from llama3_raw.tracing.circuits import dense
from llama3_raw.tracing.collect import _batches
from tests.paths import ROOT
from tests.references import cast, quantized_weights, seen_by_hand

IDS = torch.randint(2304, (150,), generator=torch.Generator().manual_seed(0)).tolist()  # windows of 64: two, and 22
NAMES = ("layers.*.residual", "layers.1.attention.q", "layers.2.attention.scores", "layers.0.attention.probs")


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return llama3_raw.to(tiny, "float32")


def gather(model: Model, folder: Path, *patterns: str, **changes: Any) -> Collection:
    settings: dict[str, Any] = {"to": folder, "context": 64, "batch": 2, "progress": False} | changes
    return collect(model, settings.pop("ids", IDS), *(patterns or NAMES), **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


def test_rows_are_those_of_a_pass_over_each_window(fp32: Model, tmp_path: Path) -> None:
    found = gather(fp32, tmp_path / "new", *NAMES, "norm", "logits")
    assert found.tokens.tolist() == IDS
    assert found.context == 64
    assert found.positions[[0, 63, 64, 149]].tolist() == [0, 63, 0, 21]
    assert next(iter(found)) == "layers.0.attention.probs"  # in the order of the pass
    assert len(found) == 4 + 3 + 2
    for begin in (0, 64, 128):
        window = seen_by_hand(fp32, IDS[begin : begin + 64])
        for name, tensor in found.items():
            expected = window[name].transpose(0, 1) if name.endswith(("scores", "probs")) else window[name]
            actual = tensor[begin : begin + 64]
            if actual.shape != expected.shape:  # the last window has fewer keys
                actual, beyond = actual[..., :22], actual[..., 22:]
                assert torch.equal(beyond, torch.full_like(beyond, -torch.inf if name.endswith("scores") else 0))
            assert torch.allclose(actual, expected, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("dtype", [None, "float16", torch.float32])
def test_dtypes(tiny: Model, tmp_path: Path, dtype: Any) -> None:
    found = gather(tiny, tmp_path / "new", "layers.0.residual", "logits", dtype=dtype)
    expected = torch.bfloat16 if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    assert found["layers.0.residual"].dtype == expected
    assert found["logits"].dtype == ((dtype and expected) or torch.float32)
    exact = seen_by_hand(tiny, IDS[:64])["layers.0.residual"].float()
    assert (found["layers.0.residual"][:64].float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_files_open_without_this_package(fp32: Model, tmp_path: Path) -> None:
    found = gather(fp32, tmp_path, "layers.3.residual")
    rows = np.load(tmp_path / "layers.3.residual.npy", mmap_mode="r")
    assert rows.shape == (150, 192)
    assert np.array_equal(rows, found["layers.3.residual"].numpy())
    assert np.load(tmp_path / "tokens.npy").tolist() == IDS


def test_what_a_reader_writes_stays_in_memory(fp32: Model, tmp_path: Path) -> None:
    found = gather(fp32, tmp_path, "norm")
    found["norm"].zero_()
    assert load_collection(tmp_path)["norm"].any()
    assert repr(found) == "<Collection of 1 tensors of 150 tokens, 115,200 bytes>"


def test_windows_that_are_already_cut(fp32: Model, tmp_path: Path) -> None:
    rows = torch.tensor(IDS[:60]).view(6, 10)
    found = gather(fp32, tmp_path, "norm", ids=rows)
    assert found.context == 10
    assert torch.allclose(found["norm"][20:30], seen_by_hand(fp32, IDS[20:30])["norm"], atol=1e-4)


@pytest.mark.parametrize(("finished", "n_tokens"), [(0, 11), (4, 11), (10, 11), (11, 11), (0, 12), (6, 12), (12, 12)])
def test_batches(finished: int, n_tokens: int) -> None:
    """Of 2 windows of 2 tokens each; the shorter last window comes alone."""
    batches = list(_batches(torch.arange(n_tokens), finished, 2, 2))
    assert [token for batch in batches for token in batch.flatten().tolist()] == list(range(finished, n_tokens))
    assert all(batch.shape[1] == 2 or batch.shape == (1, 1) for batch in batches)


def test_it_stops_after_the_last_tensor(fp32: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    forward = llama3_raw.forward

    def watched(*arguments: Any, tap: Tap, **options: Any) -> Tensor:
        def watching(name: str, tensor: Tensor) -> Tensor:
            seen.append(name)
            return tap(name, tensor)

        return forward(*arguments, tap=watching, **options)

    monkeypatch.setattr(module, "forward", watched)
    gather(fp32, tmp_path, "layers.0.residual", "layers.1.attention.q")
    assert seen[-1] == "layers.1.attention.q"
    assert "layers.0.attention.scores" not in seen  # the fast operations


class Stop(Exception):
    """What interrupts a run."""


def stop_after(monkeypatch: pytest.MonkeyPatch, n_passes: int) -> None:
    """Let `collect` fail after this many passes."""
    run, count = module._run, 0

    def counted(*arguments: Any) -> None:
        nonlocal count
        if count == n_passes:
            raise Stop
        count += 1
        run(*arguments)

    monkeypatch.setattr(module, "_run", counted)


@pytest.mark.parametrize("n_passes", [0, 1, 2])
def test_it_goes_on_where_it_was(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_passes: int) -> None:
    gather(tiny, tmp_path / "whole", batch=1)
    with monkeypatch.context() as patched:
        stop_after(patched, n_passes)
        with pytest.raises(Stop):
            gather(tiny, tmp_path / "part", batch=1)
    with pytest.raises(UserError, match=r"part: \d+ of 150 tokens are finished; run the same collect again"):
        load_collection(tmp_path / "part")
    with monkeypatch.context() as patched:
        stop_after(patched, 3 - n_passes)  # no pass is repeated
        gather(tiny, tmp_path / "part", batch=1)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    stop_after(monkeypatch, 0)
    assert len(gather(tiny, tmp_path / "part", batch=7)) == 7  # all is there


def test_after_a_kill_between_records(tiny: Model, tmp_path: Path) -> None:
    """Rows after the record are computed again."""
    gather(tiny, tmp_path / "whole", batch=1)
    gather(tiny, tmp_path / "part", batch=1)
    about = json.loads((tmp_path / "part" / "collection.json").read_text())
    (tmp_path / "part" / "collection.json").write_text(json.dumps(about | {"finished": 64}))
    rows = np.load(tmp_path / "part" / "layers.3.residual.npy", mmap_mode="r+")
    rows[64:] = 1
    rows.flush()
    gather(tiny, tmp_path / "part", batch=1)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tiny: Model, tmp_path: Path) -> None:
    code = (
        "import llama3_raw, sys, torch\nfrom llama3_raw.tracing import collect as module\nmodule._RECORD_EVERY = 0.0\n"
        "ids = torch.arange(20_000) * 7 % 2304\n"
        "llama3_raw.collect(llama3_raw.load('tiny'), ids, '*.residual', to=sys.argv[1], progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    about = tmp_path / "killed" / "collection.json"
    while process.poll() is None and not (about.exists() and json.loads(about.read_text())["finished"]):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < json.loads(about.read_text())["finished"] < 20_000
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    ids = torch.arange(20_000) * 7 % 2304
    whole = collect(tiny, ids, "*.residual", to=tmp_path / "whole", progress=False)
    killed = load_collection(tmp_path / "killed")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


def with_zeros(model: Model, head: int) -> Model:
    """The model with one head of the last layer's queries set to zero."""
    *before, last = model.weights.layers
    wq = dense(last.wq).clone()
    wq[32 * head : 32 * (head + 1)] = 0
    return model._replace(weights=model.weights._replace(layers=(*before, last._replace(wq=wq))))


OTHERS: dict[str, tuple[Callable[[Model], Model], dict[str, Any], str]] = {
    "text": (lambda model: model, {"ids": [*IDS[:-1], 5]}, "another text"),
    "length": (lambda model: model, {"ids": IDS[:-1]}, "another text"),
    "context": (lambda model: model, {"context": 32}, "another context"),
    "dtype": (lambda model: model, {"dtype": "float16"}, "other tensors"),
    "names": (lambda model: model, {"patterns": ("norm", "logits")}, "other tensors"),
    "weights": (
        lambda model: model._replace(weights=model.weights._replace(norm=model.weights.norm * 2)),
        {},
        "another model",
    ),
    "one head": (lambda model: with_zeros(model, 3), {}, "another model"),
    "last head": (lambda model: with_zeros(model, 5), {}, "another model"),
    "format": (lambda model: model._replace(weights=quantized_weights(model.weights, "int8")), {}, "another model"),
    "model's dtype": (
        lambda model: model._replace(weights=cast(model.weights, torch.float32)),
        {"dtype": "bfloat16"},
        "another model",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_something_else(tiny: Model, tmp_path: Path, what: str) -> None:
    gather(tiny, tmp_path, "norm")
    before = contents(tmp_path)
    change, changes, reason = OTHERS[what]
    patterns = changes.pop("patterns", ("norm",))
    with pytest.raises(UserError, match=f": is of {reason}; name another folder, or remove it first"):
        gather(change(tiny), tmp_path, *patterns, **changes)
    assert contents(tmp_path) == before


def test_a_folder_with_other_files(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already exists and is not of a collection; name another folder"):
        gather(tiny, tmp_path)
    with pytest.raises(UserError, match=r"there is no collection.json; give the folder that collect wrote"):
        load_collection(tmp_path)
    with pytest.raises(UserError, match="already exists and is not of a collection"):
        gather(tiny, tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": []}, "^ids should be token ids"),
        ({"ids": [0.5]}, "^ids should be token ids"),
        ({"ids": ["a"]}, "^ids should be token ids"),
        ({"ids": [1, 2304]}, "token id 2304 is outside"),
        ({"context": 0}, "^context 0: should be from 1 to the model's 512 tokens"),
        ({"context": 513}, "^context 513: should be from 1 to"),
        ({"batch": 0}, "^batch 0: should be 1 or more"),
        ({"dtype": "int8"}, "^dtype int8: should be one of"),
    ],
)
def test_arguments_that_are_refused(tiny: Model, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gather(tiny, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_an_unknown_name(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 0)  # nothing runs
    with pytest.raises(UserError, match=r"named 'layers.\*.residul'.*; the nearest are layers.\*.residual"):
        gather(tiny, tmp_path / "new", "layers.*.residul")
    assert not (tmp_path / "new").exists()


def test_too_small_a_disk(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 0)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000 + 150 * (192 * 2 + 4) - 1)
    monkeypatch.setattr("llama3_raw.system.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"GB are needed, .* GB are free on that disk"):
        gather(tiny, tmp_path / "new", "norm")


@pytest.mark.parametrize("damage", ["missing", "shorter", "no json", "other json"])
def test_damage(tiny: Model, tmp_path: Path, damage: str) -> None:
    gather(tiny, tmp_path, "norm")
    file, about = tmp_path / "norm.npy", tmp_path / "collection.json"
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        np.save(file, np.load(file)[:-1])
    else:
        about.write_text("{" if damage == "no json" else '{"of": []}')
    with pytest.raises(UserError, match=r"norm\.npy|collection\.json"):
        load_collection(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "shorter", "truncated", None, "x", 10**6, -64, 5, 64.0, True])
def test_damage_is_named_before_the_rest_is_computed(tiny: Model, tmp_path: Path, damage: Any) -> None:
    """Also a number of tokens that cannot be finished."""
    gather(tiny, tmp_path, "norm")
    file, about = tmp_path / "norm.npy", tmp_path / "collection.json"
    finished = damage
    if damage in ("missing", "shorter", "truncated"):
        finished = 64
        rows = np.load(file)
        file.unlink()
        if damage == "shorter":
            np.save(file, rows[:-1])
        elif damage == "truncated":
            np.save(file, rows)
            os.truncate(file, file.stat().st_size - 1)
    about.write_text(json.dumps(json.loads(about.read_text()) | {"finished": finished}))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"(norm\.npy|collection\.json): .*; remove the folder and collect again$"):
        gather(tiny, tmp_path, "norm")
    assert contents(tmp_path) == before


class TestCommand:
    """`python -m llama3_raw.tracing --text FILE -o FOLDER`."""

    def test_it_collects_a_text(self, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "text.txt"
        file.write_text("Once upon a time, there was a little girl named Lily. " * 5)
        options = [
            "--text",
            str(file),
            "-o",
            str(tmp_path / "new"),
            "--names",
            "layers.*.residual",
            "--weights",
            "tiny",
        ]
        assert main([*options, "--context", "16", "--batch", "2", "--keep-dtype", "float32"]) == 0
        ids = tiny.tokenizer.encode(file.read_text(), bos=True)
        found = load_collection(tmp_path / "new")
        assert found.tokens.tolist() == ids
        assert list(found) == [f"layers.{i}.residual" for i in range(4)]
        assert found["layers.0.residual"].dtype == torch.float32
        output = capsys.readouterr()
        assert output.out == ""
        assert f"new: <Collection of 4 tensors of {len(ids)} tokens, " in output.err
        assert main([*options, "--ids"]) == 2
        assert "text.txt: 'Once' is not a token id" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--text", "lost.txt", "-o", "new"], "lost.txt: cannot be read"),
            (["--text", "text.txt"], "--text FILE goes with -o FOLDER"),
            (["--context", "5", "Once"], "--context and --batch go with --text FILE"),
            (["--batch", "5", "Once"], "--context and --batch go with --text FILE"),
            (["a prompt", "--text", "text.txt", "-o", "new"], "--text FILE goes with -o FOLDER"),
            (["--text", "text.txt", "-o", "new", "--names", "layers.9.*"], "no tensor is named 'layers.9.*'"),
            (
                ["--text", "text.txt", "-o", "new", "--context", "1000"],
                "--context 1000: the model's own context is 512",
            ),
        ],
    )
    def test_refusals(
        self,
        options: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text("Once upon a time")
        assert main([*options, "--weights", "tiny"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("new").exists()
