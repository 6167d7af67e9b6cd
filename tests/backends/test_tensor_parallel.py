"""One model in several processes, started by torchrun, with gloo on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import llama3_raw
from llama3_raw import Model, convert, generate
from llama3_raw.compare.references import hf_model
from tests.backends.of_ranks import all_logits
from tests.paths import TINY
from tests.references import dense

pytestmark = pytest.mark.slow  # most start processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
STORY = "Once upon a time"


def torchrun(size: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as `size` processes. Return their output and torchrun's."""
    return subprocess.run([*TORCHRUN, str(size), *command], capture_output=True, text=True, timeout=300)


def own_lines(stderr: str) -> list[str]:
    """Return the lines that the processes themselves wrote, without torchrun's reports."""
    return [line for line in stderr.splitlines() if line.startswith("llama3_raw:")]


def with_more_heads(model: Model) -> Model:
    """Return the same function with 8 query heads instead of 6: each kv head gets one more, whose output is zero."""
    params = model.params

    def padded(matrix: Tensor, dimension: int) -> Tensor:
        by_group = matrix.unflatten(dimension, (params.n_kv_heads, -1, params.head_dim)).movedim(dimension + 1, 0)
        return (
            torch.cat([by_group, torch.zeros_like(by_group[:1])])
            .movedim(0, dimension + 1)
            .flatten(dimension, dimension + 2)
        )

    layers = tuple(
        layer._replace(wq=padded(dense(layer.wq), 0), wo=padded(dense(layer.wo), 1)) for layer in model.weights.layers
    )
    return Model(model.weights._replace(layers=layers), replace(params, n_heads=8), model.tokenizer)


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with 8 heads, for 2 kv heads, in fp32 and Hugging Face's format."""
    folder = tmp_path_factory.mktemp("parallel") / "eight-heads"
    hf_model(with_more_heads(llama3_raw.load(TINY, dtype=torch.float32)), "eager").save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


def without_end(model: Path, folder: Path) -> Path:
    """Return a copy of a model without its tokenizer, so that no token ends its text."""
    return Path(shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("tokenizer.model")))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_logits(eight_heads: Path, tmp_path: Path, size: int) -> None:
    """4 processes share 2 kv heads, so two of them hold each kv head."""
    done = torchrun(size, str(Path(__file__).with_name("of_ranks.py")), str(eight_heads), str(tmp_path))
    assert done.returncode == 0, done.stderr
    alone = all_logits(eight_heads)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(size))
    squares: dict[str, list[tuple[float, float]]] = {}  # of the errors in bf16, ours and of one process
    for name, logits in first.items():
        assert all(torch.equal(logits, other[name]) for other in others), name  # so that all sample the same token
        exact = alone[name.replace("bfloat16", "float32").replace("fast", "exact")]
        if "float32" in name:
            assert (logits - exact).abs().max() <= 5e-6 * exact.abs().max(), name
            continue
        ours, reference = (float((x - exact).square().mean()) for x in (logits, alone[name.replace("fast", "exact")]))
        squares.setdefault(" ".join(name.split()[:2]), []).append((ours, reference))
    for name, pairs in squares.items():  # of all tokens: the errors of a single one differ by half
        ours, reference = map(sum, zip(*pairs, strict=True))
        assert ours <= 1.5**2 * reference, name


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_same_text(eight_heads: Path, size: int) -> None:
    """Also: only the first process writes, and all of them get the text from stdin."""
    model = llama3_raw.load(TINY, dtype=torch.float32)
    assert model.tokenizer is not None
    ids = list(generate(model, model.tokenizer.encode(STORY, bos=True), max_new_tokens=60))
    weights = str(TINY if size == 2 else eight_heads)
    command = ["-m", "llama3_raw", "--weights", weights, "--dtype", "float32", "--max-new-tokens", "60", "-"]
    done = subprocess.run(
        [*TORCHRUN, str(size), *command], input=STORY, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == model.tokenizer.decode(ids)
    which, end = own_lines(done.stderr)
    assert which.endswith(f"on cpu, shared by {size} processes")
    assert "60 new tokens" in end


def test_all_processes_sample_the_same() -> None:
    """Without a seed. A process that sampled another token would have other keys, and less likely tokens would come."""
    model = llama3_raw.load(TINY, dtype=torch.float32)
    assert model.tokenizer is not None
    prompt = model.tokenizer.encode(STORY, bos=True)
    command = ["-m", "llama3_raw", "--weights", str(TINY), "--dtype", "float32", "--max-new-tokens", "60"]
    sampling = ["--temperature", "5", "--top-k", "50", "--stats", "json"]
    done = torchrun(2, *command, *sampling, "--ids", " ".join(map(str, prompt)))
    assert done.returncode == 0
    assert re.search(r'"processes": 2', done.stderr)
    ids = torch.tensor([*prompt, *map(int, done.stdout.split())])
    with torch.no_grad():
        logits = llama3_raw.forward(model.weights, model.params, ids)[len(prompt) - 1 : -1]
    assert len(logits) >= 30
    sampled = logits.gather(-1, ids[len(prompt) :, None])
    assert (sampled >= logits.topk(50).values[:, -1:] - 1e-4).all()


def test_an_error_of_all_is_reported_once() -> None:
    done = torchrun(4, "-m", "llama3_raw", "--weights", str(TINY), STORY)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = own_lines(done.stderr)
    assert line.startswith("llama3_raw: error: 4 processes cannot share 6 heads evenly")


def test_other_tools_run_as_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert convert.main(["tiny", "elsewhere"]) == 2
    assert "this tool runs as one process" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["at work", pytest.param("as it starts", marks=pytest.mark.exhaustive)])
def test_an_error_of_one_is_reported_by_it(tmp_path: Path, where: str) -> None:
    """The second process has no GPU, or a full disk; the first one, which waits for it, ends without a message."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch\n"
        "from llama3_raw.cli.entry_point import command_line_tool, for_several_processes\n"
        "from llama3_raw.errors import UserError\n"
        "from llama3_raw.system.process_groups import init\n"
        "def fail(now):\n"
        f"    if now == {where!r} and os.environ['RANK'] == '1':\n"
        "        raise UserError('its disk is full; free some space')\n"
        "def choose_device():\n"
        "    fail('as it starts')\n"
        "    return torch.device('cpu')\n"
        "@command_line_tool\n"
        "@for_several_processes\n"
        "def main(arguments):\n"
        "    with init(choose_device) as ranks:\n"
        "        fail('at work')\n"
        "        ranks.tensor.all_reduce(torch.ones(1))\n"
        "raise SystemExit(main())\n"
    )
    done = torchrun(2, str(script))
    assert done.returncode != 0
    assert own_lines(done.stderr) == ["llama3_raw: error: rank 1: its disk is full; free some space"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize(("size", "rank"), [(2, 0), pytest.param(4, 2, marks=pytest.mark.exhaustive)])
def test_a_killed_process_ends_the_rest(eight_heads: Path, tmp_path: Path, size: int, rank: int) -> None:
    command = ["-m", "llama3_raw", "--weights", str(without_end(eight_heads, tmp_path)), "--ids", "1 2 3"]
    with open(tmp_path / "stdout", "wb") as stdout, open(tmp_path / "stderr", "wb") as stderr:
        run = subprocess.Popen(
            [*TORCHRUN, str(size), *command, "--max-new-tokens", "500"], stdout=stdout, stderr=stderr
        )
        try:
            while (tmp_path / "stdout").stat().st_size < 50:
                assert run.poll() is None, (tmp_path / "stderr").read_text()
                time.sleep(0.05)
            workers = {int(child.environ()["RANK"]): child for child in psutil.Process(run.pid).children()}
            assert workers.keys() == set(range(size))
            workers[rank].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            assert run.wait(timeout=60) != 0
            seconds = time.monotonic() - killed
        finally:
            run.kill()
    assert seconds < 30
    assert not any(worker.is_running() for worker in workers.values())
    stderr_text = (tmp_path / "stderr").read_text()
    assert re.search(rf"failed \(exitcode: -9\) local_rank: {rank} \(pid: {workers[rank].pid}\)", stderr_text)
    assert len(own_lines(stderr_text)) == 1  # which model it is; the others end without a message


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C works differently on Windows")
def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    command = ["-m", "llama3_raw", "--weights", str(without_end(TINY, tmp_path)), "--ids", "1 2 3"]
    with open(tmp_path / "stdout", "wb") as stdout, open(tmp_path / "stderr", "wb") as stderr:
        run = subprocess.Popen([*TORCHRUN, "2", *command, "--max-new-tokens", "500"], stdout=stdout, stderr=stderr)
        try:
            while (tmp_path / "stdout").stat().st_size < 50:
                assert run.poll() is None, (tmp_path / "stderr").read_text()
                time.sleep(0.05)
            workers = psutil.Process(run.pid).children()
            os.kill(run.pid, signal.SIGINT)
            run.wait(timeout=20)  # torchrun kills the workers after 30 seconds
        finally:
            run.kill()
    assert not any(worker.is_running() for worker in workers)
    _, end = own_lines((tmp_path / "stderr").read_text())
    assert re.fullmatch(r"llama3_raw: stopped by Ctrl-C after \d+ new tokens", end)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """Arguments that compute some prompts, and the result of one process."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = [
        json.dumps({"prompt": f"{STORY}, {name}", "max_tokens": 30}) for name in ["Tom", "Lily", "Sam", "Ben", "Mia"]
    ]
    (folder / "prompts.jsonl").write_text("\n".join([*lines, "not JSON"]))
    command = ["-m", "llama3_raw.batch", str(folder / "prompts.jsonl"), "--weights", str(TINY), "--dtype", "float32"]
    command += ["--batch-size", "2"]
    subprocess.run([sys.executable, *command, "-o", str(folder / "alone")], capture_output=True)
    return command, (folder / "alone").read_bytes()


def test_prompts_with_one_model(prompts: tuple[list[str], bytes], tmp_path: Path) -> None:
    command, expected = prompts
    done = torchrun(2, *command, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == expected
    which, written, bad = own_lines(done.stderr)
    assert which.endswith("shared by 2 processes")
    assert re.fullmatch(r"llama3_raw: wrote .*: 5 texts", written)
    assert "1 of 6 lines could not be computed; line 6" in bad


def test_prompts_with_two_models_one_of_which_is_killed(prompts: tuple[list[str], bytes], tmp_path: Path) -> None:
    command, expected = prompts
    command = [*command, "--tp", "1", "-o", str(tmp_path / "out")]
    with open(tmp_path / "stderr", "wb") as stderr:
        run = subprocess.Popen([*TORCHRUN, "2", *command], stderr=stderr)
        try:
            journals = [tmp_path / "out.part", tmp_path / "out.part.1"]
            while not all(file.exists() and file.stat().st_size for file in journals):  # both are at work
                assert run.poll() is None, (tmp_path / "stderr").read_text()
                time.sleep(0.01)
            next(child for child in psutil.Process(run.pid).children() if child.environ()["RANK"] == "1").kill()
            assert run.wait(timeout=60) != 0
        finally:
            run.kill()
    assert not (tmp_path / "out").exists()
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.run", "stderr"]
