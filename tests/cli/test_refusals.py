"""Wrong options and unsuitable machines, one row of a table each; closed streams."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llama3_raw import perplexity
from llama3_raw.bench import __main__ as bench
from llama3_raw.chat import __main__ as chat
from llama3_raw.cli.entry_point import command_line_tool
from llama3_raw.system.processes import PeerLost
from tests.damage import CHECKPOINT, copy_tiny, cut, write, write_int8
from tests.paths import TINY
from tests.refusals import Case, check_refused

USE = {
    "no prompt": Case(("give a prompt", "or - to read it from stdin"), arguments=("--top", "2")),
    "empty prompt": Case(("the prompt is empty", "give at least one character"), arguments=("",)),
    "empty stdin": Case(("the prompt is empty", "give at least one character"), arguments=("-",), stdin=b"\n"),
    "prompt longer than the context": Case(
        ("the prompt needs", "but the context holds 512", "shorten the prompt"), arguments=("word " * 600,)
    ),
    "prompt longer than --context": Case(
        ("the prompt needs", "but the context holds 2", "shorten the prompt"), arguments=("Once upon", "--context", "2")
    ),
    "invalid UTF-8 on stdin": Case(
        ("stdin: not valid UTF-8 at byte 2", "convert the text to UTF-8"), arguments=("-",), stdin=b"ab\xff"
    ),
    "unknown device": Case(
        ("--device abacus: there is no such device; use cpu, cuda",), arguments=("x", "--device", "abacus")
    ),
    "CUDA absent": Case(("--device cuda: torch sees 0", "use --device cpu"), arguments=("x", "--device", "cuda")),
    "CUDA GPU absent": Case(("--device cuda:77: torch sees 0",), arguments=("x", "--device", "cuda:77")),
    "Apple GPU absent": Case(("--device mps: torch sees no", "--device cpu"), arguments=("x", "--device", "mps")),
    "temperature below 0": Case(("--temperature should be 0",), arguments=("x", "--temperature", "-1")),
    "temperature that is no number": Case(("--temperature should be",), arguments=("x", "--temperature", "nan")),
    "top-p above 1": Case(("--top-p should be",), arguments=("x", "--top-p", "1.5")),
    "top-p of 0": Case(("--top-p should be",), arguments=("x", "--top-p", "0")),
    "min-p": Case(("--min-p should be",), arguments=("x", "--min-p", "-1")),
    "top-k": Case(("--top-k should be",), arguments=("x", "--top-k", "-1")),
    "top-k that is no number": Case(("--top-k", "--help"), arguments=("x", "--top-k", "many")),
    "unwritable folder: below a file": Case(
        ("params.json/new: cannot be created: Not a directory", "name a folder that you can write to"),
        arguments=("--make-synthetic", "1b", "{folder}/params.json/new"),
        tool=bench.main,
    ),
    "unwritable folder: a file": Case(
        ("params.json: cannot be created: File exists", "name a folder that you can write to"),
        arguments=("--make-synthetic", "1b", "{folder}/params.json"),
        tool=bench.main,
    ),
    "folder that holds a model": Case(
        ("consolidated.00.pth: already exists", "name another folder, or remove it first"),
        arguments=("--make-synthetic", "1b", "{folder}"),
        tool=bench.main,
    ),
    "--weights: nothing": Case(("--weights: should not be empty",), arguments=("x", "--weights", "")),
    "chat: --context above the model's": Case(
        ("--context 99999: the model's own context is 512",), arguments=("--context", "99999"), tool=chat.main
    ),
    "chat: --system that is not UTF-8": Case(
        ("--system: not valid UTF-8", "convert the text"), arguments=("--system", "\udcff"), tool=chat.main
    ),
    "--weights: no such folder": Case(
        ("--weights lost: there is no such folder, and weights/ holds",), arguments=("x", "--weights", "lost")
    ),
    "--weights: not in the Hugging Face cache": Case(
        ("--weights nobody/nothing: neither a folder here nor in the Hugging Face cache",),
        arguments=("x", "--weights", "nobody/nothing"),
    ),
    "--weights: a file": Case(
        ("--weights", "params.json: is a file, but no GGUF; give the folder it is in"),
        arguments=("x", "--weights", "{folder}/params.json"),
    ),
    "--weights: a folder without a model": Case(("/: no model here",), arguments=("x", "--weights", "/")),
    "--weights: a name of 5,000 letters": Case(("File name too long",), arguments=("x", "--weights", "x" * 5000)),
    "--max-new-tokens": Case(("--max-new-tokens should be 0 or more",), arguments=("x", "--max-new-tokens", "-1")),
    "--context 0": Case(("--context", "should be 1 or more"), arguments=("x", "--context", "0")),
    "--context above the model's": Case(
        ("--context 99999: the model's own context is 512",), arguments=("x", "--context", "99999")
    ),
    "--threads 0": Case(("--threads", "should be 1 or more"), arguments=("x", "--threads", "0")),
    "--threads above the machine's": Case(
        ("--threads 99999: this process may use", "give at most that"), arguments=("x", "--threads", "99999")
    ),
    "--layers": Case(("--layers 99:", "4 layers; give a number from 1"), arguments=("x", "--layers", "99")),
    "--dtype": Case(("--dtype", "bfloat16"), arguments=("x", "--dtype", "int3")),
    "--seed": Case(("--seed: should be from 0",), arguments=("x", "--seed", "9" * 23)),
    "--stats": Case(("--stats", "json"), arguments=("x", "--stats=loud")),
    "--stop that is empty": Case(("--stop should not be empty",), arguments=("x", "--stop", "")),
    "--stop that looks like an option": Case(
        ("--stop", "write --option=VALUE for a value that begins with -"), arguments=("x", "--stop", "---")
    ),
    "--ids: words": Case(("--ids: 'one' is not a token id", "give numbers"), arguments=("one two", "--ids")),
    "--ids: outside the vocabulary": Case(
        ("token id 99999 is outside the model's vocabulary of 2304",), arguments=("5 99999", "--ids")
    ),
    "--ids with --stop": Case(("--stop needs text", "leave one of them out"), arguments=("5", "--ids", "--stop", "x")),
    "perplexity: no file": Case(("FILE", "--help"), arguments=(), tool=perplexity.main),
    "perplexity: a file that is not there": Case(
        ("lost.txt: cannot be read: No such file", "check its name"), arguments=("lost.txt",), tool=perplexity.main
    ),
    "perplexity: an empty file": Case(
        ("text: is empty", "give a text"), write("text", b""), ("{folder}/text",), tool=perplexity.main
    ),
    "perplexity: empty stdin": Case(
        ("stdin: is empty", "give a text"), arguments=("-",), stdin=b"", tool=perplexity.main
    ),
    "perplexity: a file that is not UTF-8": Case(
        ("text: not valid UTF-8 at byte 2", "convert the text"),
        write("text", b"ab\xff"),
        ("{folder}/text",),
        tool=perplexity.main,
    ),
    "perplexity: text for --ids": Case(
        ("text: 'Once' is not a token id", "give numbers"),
        write("text", "Once upon"),
        ("{folder}/text", "--ids"),
        tool=perplexity.main,
    ),
    "perplexity: a lone id": Case(
        ("there is nothing to score", "give at least two"), arguments=("-", "--ids"), stdin=b"5", tool=perplexity.main
    ),
    "perplexity: an id outside the vocabulary": Case(
        ("token id 2304 is outside the model's vocabulary of 2304",),
        arguments=("-", "--ids"),
        stdin=b"5 2304",
        tool=perplexity.main,
    ),
    "perplexity: a stride beyond the context": Case(
        ("--stride 257: should be from 1 to the context of 256",),
        arguments=("-", "--context", "256", "--stride", "257"),
        stdin=b"Once",
        tool=perplexity.main,
    ),
    "perplexity: --context above the model's": Case(
        ("--context 513: the model's own context is 512",),
        arguments=("-", "--context", "513"),
        stdin=b"Once",
        tool=perplexity.main,
    ),
    "perplexity: --context of one token": Case(
        ("--context 1: should be 2 or more",), arguments=("-", "--context", "1"), stdin=b"Once", tool=perplexity.main
    ),
    "--quantize": Case(("--quantize", "int8"), arguments=("x", "--quantize", "int3")),
    "--quantize: with --max-ram": Case(
        ("--max-ram leaves the weights in their file", "with --save-quantized"),
        arguments=("x", "--quantize", "int8", "--max-ram", "9GB"),
    ),
    "--quantize: in int8 already": Case(
        ("--quantize int8: ", "model is quantized already; leave it out"),
        arguments=("x", "--quantize", "int8"),
        start=write_int8,
    ),
    "--save-quantized: nothing": Case(("--save-quantized: should not be empty",), arguments=("--save-quantized", "")),
    "--save-quantized: the model's own folder": Case(
        ("model: already exists and is not empty", "name another folder"), arguments=("--save-quantized", "{folder}")
    ),
    "--save-quantized: below a file": Case(
        ("params.json/new: cannot be written: ", "name another folder"),
        arguments=("--save-quantized", "{folder}/params.json/new"),
    ),
    "--save-quantized: a part of the layers": Case(
        ("--save-quantized writes the whole model", "leave --layers out"),
        arguments=("--save-quantized", "{folder}/new", "--layers", "2"),
    ),
    "unknown option": Case(("--nonsense", "--help"), arguments=("x", "--nonsense")),
    "half an option": Case(("--deb", "--help"), arguments=("x", "--deb")),
}

MACHINE = {
    "too little RAM for another dtype": Case(
        (
            CHECKPOINT,
            "MB are needed on cpu (weights in float32",
            "7.0 MB are free; what fits: no --dtype, or --layers 2",
        ),
        arguments=("x", "--dtype", "float32"),
        free={"RAM": 7_000_000},
    ),
    "too little left of the container": Case(
        (
            CHECKPOINT,
            "MB are needed on cpu (weights in float32",
            "7.0 MB are free; what fits: no --dtype, or --layers 2",
        ),
        arguments=("x", "--dtype", "float32"),
        free={"RAM": 10**10, "container": 7_000_000},
    ),
    "too little GPU memory": Case(
        (CHECKPOINT, "needed on cuda", "502.0 MB are free; what fits: --gpu-layers 1, or --device cpu, or --layers 1"),
        arguments=("x", "--device", "cuda"),
        free={"GPU": 502_000_000},
    ),
    "too little RAM for the cache": Case(
        (CHECKPOINT, "a cache for 512 tokens", "1.2 MB are free; what fits: --context 4"),
        arguments=("x", "--max-new-tokens", "999"),
        free={"RAM": 1_200_000},
    ),
    "too little RAM for the window of a chat": Case(
        (CHECKPOINT, "a cache for 512 tokens", "10.0 MB are free; what fits: --context 24"),
        arguments=(),
        stdin=b"hi\n",
        free={"RAM": 10_000_000},
        tool=chat.main,
    ),
    "too little RAM for the logits of a text to score": Case(
        (
            CHECKPOINT,
            "a cache for 512 tokens 0.5 MB, activations 27.1 MB",
            "15.0 MB are free; what fits: --context 238",
        ),
        arguments=("-",),
        stdin=b"Once upon a time " * 200,
        free={"RAM": 15_000_000},
        tool=perplexity.main,
    ),
    "too little RAM for anything": Case(
        (CHECKPOINT, "no option makes it fit, choose a smaller model"), free={"RAM": 1_000}
    ),
}


@pytest.mark.parametrize("name", USE)
@pytest.mark.usefixtures("_no_gpu")
def test_a_wrong_use_is_refused(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(USE[name], tmp_path, capfd, monkeypatch)


@pytest.mark.parametrize("name", MACHINE)
@pytest.mark.usefixtures("_no_gpu")
def test_missing_hardware_is_reported(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(MACHINE[name], tmp_path, capfd, monkeypatch)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llama3_raw", "--weights", str(TINY), *arguments]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["-"], b"ab\xff", "stdin: not valid UTF-8 at byte 2"),
        (["x", "--weights", "{folder}"], b"", "consolidated.00.pth: damaged or cut short"),
    ],
)
def test_a_process_reports_the_same(tmp_path: Path, arguments: list[str], stdin: bytes, says: str) -> None:
    """Here the lines that Python and torch print count too."""
    copy_tiny(tmp_path)
    cut(CHECKPOINT, lambda length: length // 2)(tmp_path)
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr.decode()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_is_one_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    """For example, if other programs take it after the check."""

    @command_line_tool
    def tool(arguments: Sequence[str]) -> int:
        raise kind("CUDA out of memory.\nTried to allocate 20 GB")

    assert tool([]) == 2
    line = "llama3_raw: error: out of memory (CUDA out of memory. Tried to allocate 20 GB); lower --max-new-tokens or "
    assert capsys.readouterr().err.startswith(line)
    with pytest.raises(kind):
        tool(["--debug"])


def test_a_failed_exchange_between_processes_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an error of NCCL, where no other process has one to report."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    @command_line_tool
    def tool(arguments: Sequence[str]) -> int:
        raise PeerLost("NCCL error: unhandled system error")

    assert tool([]) == 1
    assert capsys.readouterr().err.endswith("with other processes failed: NCCL error: unhandled system error\n")
    with pytest.raises(PeerLost):
        tool(["--debug"])


@pytest.mark.slow
def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(command("x", "--top-p", "7", "--debug"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback")


@pytest.mark.slow
def test_a_closed_pipe_ends_it_silently() -> None:
    long = command("Once upon a time", "--max-new-tokens", "400")
    with subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 141
    assert errors.splitlines() == [
        f"llama3_raw: {TINY} (--weights) on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    ]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "prompt", "status", "says"),
    [
        ("2>&-", "Once upon a time", 0, ""),
        (">&-", "Once upon a time", 0, "llama3_raw: stopped after 3 new tokens"),
        ("<&-", "-", 2, "llama3_raw: error: stdin is closed; redirect a file to it with < FILE"),
        (">/dev/full", "Once upon a time", 2, "llama3_raw: error: output: No space left on device"),
    ],
)
def test_closed_or_full_streams(redirection: str, prompt: str, status: int, says: str) -> None:
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command(prompt, "--max-new-tokens", "3")]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert bool(done.stdout) == (redirection == "2>&-")
    assert says in (done.stderr.splitlines() or [""])[-1]
