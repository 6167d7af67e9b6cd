"""python -m llama3_raw as a user runs it: real processes for streams and signals, main() itself for the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama3_raw import REFERENCE, Model, UserError
from llama3_raw.__main__ import main
from llama3_raw.checkpoint import locate
from llama3_raw.cli.models import find_model
from llama3_raw.decoding.loop import generate
from tests.paths import ROOT, TINY

COMMAND = [sys.executable, "-m", "llama3_raw", "--weights", str(TINY)]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=120, **options
    )


def expected_text(model: Model, prompt: str, count: int) -> str:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(prompt, bos=True)
    return model.tokenizer.decode(list(generate(model, ids, max_new_tokens=count)))


@pytest.mark.slow
def test_stdout_has_the_text_only(tiny: Model) -> None:
    done = run("Once upon a time", "--max-new-tokens", "20", "--stats", "--top", "2")
    assert done.returncode == 0
    assert done.stdout == expected_text(tiny, "Once upon a time", 20)
    assert "stopped after 20 new tokens, the most that --max-new-tokens allows" in done.stderr
    assert len(re.findall(r"<- .* \d+\.\d%  .* \d+\.\d%", done.stderr)) == 20


@pytest.mark.slow
def test_without_weights_the_built_in_model_tells_a_story(tmp_path: Path) -> None:
    """README's command, in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA3_RAW_WEIGHTS"}
    done = subprocess.run(
        [sys.executable, "-m", "llama3_raw", "Once upon a time"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    if "built-in" not in done.stderr:
        pytest.skip("there are other models in weights/, so the built-in one is not the default")
    assert len(done.stdout.split()) > 40
    assert done.stdout.count(".") >= 3


@pytest.mark.slow
def test_stdin(tiny: Model) -> None:
    text = expected_text(tiny, "Tom had a dog", 8)
    assert run("-", "--max-new-tokens", "8", input="Tom had a dog\n").stdout == text


@pytest.mark.slow
def test_stats_as_json() -> None:
    done = run("--max-new-tokens", "5", "--stats", "json", "Once upon a time")
    stats = json.loads(done.stderr.splitlines()[-1])
    assert stats["new_tokens"] == 5
    assert stats["dtype"] == "bfloat16"
    assert 0 < stats["seconds_to_first_token"] < 60
    assert stats["tokens_per_second"] > 0
    assert stats["weights_gb_per_second"] > 0
    assert 50e6 < stats["peak_ram_bytes"] < 5e9
    assert run("--max-new-tokens", "1", "--stats", "Once upon a time").returncode == 0  # the prompt is not its value


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_keeps_the_printed_text() -> None:
    arguments = ["--temperature", "1", "--seed", "3", "--repetition-penalty", "1.5", "--max-new-tokens", "450"]
    command = [*COMMAND, "Once", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the text ended before the signal came")
    assert process.returncode == 130
    assert "stopped by Ctrl-C after" in errors
    assert "Traceback" not in errors
    assert len(out) < 2000


@pytest.mark.slow
def test_console_script() -> None:
    script = shutil.which("llama3-raw", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed: pip install -e '.[test]'")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for option in ("--weights", "--ids", "--top", "--stats", "--temperature", "--max-new-tokens", "example:"):
        assert option in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main([*arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def tiny_call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return call(capsys, "--weights", str(TINY), *arguments)


def test_ids_in_and_out(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Model) -> None:
    for file in ("params.json", "consolidated.00.pth"):
        shutil.copy(TINY / file, tmp_path)
    expected = list(generate(tiny, [2048, 300, 301], max_new_tokens=6, stop_ids=()))
    status, out, _ = call(
        capsys, "--weights", str(tmp_path), "--ids", "2048, 300 301", "--max-new-tokens", "6", "--top", "2"
    )
    assert status == 0
    assert [int(word) for word in out.split(" ")] == expected


def test_ids_stop_at_the_stop_tokens(capsys: pytest.CaptureFixture[str], tiny: Model) -> None:
    """The stop tokens of the tokenizer in the folder count."""
    assert tiny.tokenizer is not None
    prompt = tiny.tokenizer.encode("Once upon a time", bos=True)
    status, out, err = tiny_call(capsys, "--ids", " ".join(map(str, prompt)), "--max-new-tokens", "400")
    assert status == 0
    assert "the model ended the text" in err
    assert [int(word) for word in out.split()] == list(generate(tiny, prompt, max_new_tokens=400))


def test_ids_with_a_tokenizer_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "tokenizer.model").write_text("nonsense")
    assert call(capsys, "--weights", str(folder), "--ids", "5 6", "--max-new-tokens", "2")[0] == 0
    status, _, err = call(capsys, "--weights", str(folder), "text")
    assert status == 2
    assert "line 1: should be base64" in err


def test_reference_uses_the_exact_operations(capsys: pytest.CaptureFixture[str], tiny: Model) -> None:
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode("Once upon a time", bos=True)
    expected = tiny.tokenizer.decode(list(generate(tiny, ids, max_new_tokens=30, ops=REFERENCE)))
    assert tiny_call(capsys, "Once upon a time", "--max-new-tokens", "30", "--reference")[1] == expected


def test_stop_text(capsys: pytest.CaptureFixture[str], tiny: Model) -> None:
    text = expected_text(tiny, "Once upon a time", 40)
    stop = text[10:14]
    status, out, err = tiny_call(capsys, "Once upon a time", "--stop", "zebra", "--stop", stop)
    assert status == 0
    assert out == text[: text.index(stop)]
    assert "at a --stop text" in err


def test_the_context_limits_the_text(capsys: pytest.CaptureFixture[str], tiny: Model) -> None:
    assert tiny.tokenizer is not None
    length = len(tiny.tokenizer.encode("Once upon a time", bos=True))
    status, out, err = tiny_call(capsys, "Once upon a time", "--context", str(length + 2))
    assert status == 0
    assert out == expected_text(tiny, "Once upon a time", 2)
    assert "stopped after 2 new tokens: prompt and text together are as long as --context allows" in err


def test_seed_layers_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    draw = ["One day", "--max-new-tokens", "12", "--temperature", "1.2", "--top-k", "50", "--top-p", "0.95"]
    draw += ["--min-p", "0.01", "--repetition-penalty", "1.1", "--dtype", "float32", "--threads", "1", "--seed"]
    first, again, other = (tiny_call(capsys, *draw, seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other
    assert tiny_call(capsys, *draw, "1", "--layers", "1")[1] != first


def test_special_names(capsys: pytest.CaptureFixture[str]) -> None:
    """As text the prompt is about ten tokens, as special tokens two, of which one is the BOS that is added anyway."""
    prompt = "<|begin_of_text|><|end_of_text|>"
    as_text = json.loads(tiny_call(capsys, prompt, "--max-new-tokens", "1", "--stats", "json")[2].splitlines()[-1])
    special = tiny_call(capsys, prompt, "--special", "--max-new-tokens", "1", "--stats", "json")[2]
    assert as_text["prompt_tokens"] > 5
    assert json.loads(special.splitlines()[-1])["prompt_tokens"] == 2


class TestWhichModel:
    """The default, step by step, in a fake source tree."""

    @pytest.fixture(autouse=True)
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "package").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(locate, "PACKAGE", tmp_path / "package")
        monkeypatch.delenv("LLAMA3_RAW_WEIGHTS", raising=False)
        self.add("tiny")
        return tmp_path

    def add(self, name: str, file: str = "params.json") -> None:
        path = Path("weights", name, file)
        path.parent.mkdir(parents=True)
        path.write_text("{}")

    def test_nothing_else(self) -> None:
        assert find_model().path.name == "tiny"
        assert "built-in" in find_model().why

    def test_the_only_other(self) -> None:
        self.add("mine", "original/params.json")
        assert find_model().path.name == "mine"

    def test_several(self) -> None:
        self.add("mine")
        self.add("yours", "config.json")
        with pytest.raises(UserError, match="several models in weights/: mine, yours; choose one"):
            find_model()
        self.add("Meta-Llama-3-8B")
        assert find_model().path.name == "Meta-Llama-3-8B"

    def test_the_environment_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.add("Meta-Llama-3-8B")
        self.add("mine")
        monkeypatch.setenv("LLAMA3_RAW_WEIGHTS", "mine")
        assert find_model().path.name == "mine"
        assert find_model("tiny").path.name == "tiny"
        monkeypatch.setenv("LLAMA3_RAW_WEIGHTS", "lost")
        with pytest.raises(UserError, match=r"\$LLAMA3_RAW_WEIGHTS lost"):
            find_model()

    def test_the_hugging_face_cache(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tree / "hub"))
        repo = tree / "hub" / "models--somebody--cached"
        snapshot = repo / "snapshots" / ("0" * 40)
        (snapshot / "original").mkdir(parents=True)
        (snapshot / "original" / "params.json").write_text("{}")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        assert find_model("somebody/cached").path == snapshot
        with pytest.raises(UserError, match="nor in the Hugging Face cache"):
            find_model("somebody/else")


@pytest.mark.slow
def test_text_is_printed_while_it_is_generated() -> None:
    """Also into a pipe."""
    command = [*COMMAND, "Once upon a time", "--max-new-tokens", "200"]
    arrivals = 0
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while os.read(process.stdout.fileno(), 4096):
            arrivals += 1
    assert arrivals > 20


@pytest.mark.slow
def test_slow_imports_are_deferred() -> None:
    """torch.compile alone takes two seconds to import."""
    code = "import sys, llama3_raw.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"torch._dynamo", "sympy", "transformers", "matplotlib", "huggingface_hub"} & set(loaded)
