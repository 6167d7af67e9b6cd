"""--break and break_at: a real pdb, in its own process and in this one, shows the tensors of a trace."""

from __future__ import annotations

import ast
import bdb
import contextlib
import inspect
import io
import os
import pdb
import re
import subprocess
import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from llama3_raw import REFERENCE, Model, Trace, break_at, chain, forward, generate, model, trace
from llama3_raw.__main__ import main
from tests.paths import ROOT

MODEL_FILE = ROOT / "llama3_raw" / "model.py"
COMMAND = [sys.executable, "-m", "llama3_raw", "--weights", str(ROOT / "weights" / "tiny"), "Once upon a time"]
# the name of each tensor where pdb stops
LOCALS = {
    "tok_embeddings": "x",
    "layers.2.attention_norm": "normed",
    "layers.2.attention.q": "q",
    "layers.2.attention.k": "k",
    "layers.2.attention.v": "v",
    "layers.2.attention.q_rope": "q",
    "layers.2.attention.k_rope": "k",
    "layers.2.attention.scores": "scores",
    "layers.2.attention.probs": "probs",
    "layers.2.attention.heads": "heads",
    "layers.2.attention.out": "__return__",
    "layers.2.attention.residual": "x",
    "layers.2.ffn_norm": "normed",
    "layers.2.feed_forward.gate": "gate",
    "layers.2.feed_forward.up": "up",
    "layers.2.feed_forward.hidden": "hidden",
    "layers.2.feed_forward.out": "__return__",
    "layers.2.residual": "__return__",
    "norm": "x",
    "logits": "__return__",
}


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode("Once upon a time", bos=True)


@pytest.fixture
def pdb_in_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a plain process: pytest sets its own debugger."""
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)


def line_of(function: Callable[..., Any], local: str, place: int = 0) -> int:
    """Return the line where a function of model.py assigns a local for the place-th time, or "return"s."""
    lines, first = inspect.getsourcelines(function)
    found: list[int] = []
    for node in ast.walk(ast.parse("".join(lines))):
        is_it = isinstance(node, ast.Return) and local == "return"
        is_it |= isinstance(node, ast.Assign) and local in {target.id for target in names_in(node.targets)}
        if is_it:
            found.append(first + node.lineno - 1)  # type: ignore[attr-defined]
    return sorted(found)[place]


def names_in(targets: list[ast.expr]) -> list[ast.Name]:
    return [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def run(command: list[str], commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process, with commands for pdb in a pipe."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    return subprocess.run(
        command, input="\n".join(commands) + "\n", capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.slow
def test_a_session_over_a_pipe(tiny: Model, ids: list[int]) -> None:
    """Two stops, with values, shapes, neighbours and the caller's locals; after the last command the run continues."""
    at_the_prompt = ["p scores.shape", "p float(scores[0, 0, 0])", "p n_rep", "p q.shape", "u", "p k.shape", "c"]
    done = run(
        [*COMMAND, "--break", "layers.3.attention.scores", "--max-new-tokens", "6", "--top", "1"],
        [*at_the_prompt, "p scores.shape, float(scores[5, 0, 5])"],
    )
    whole = trace(tiny, ids, "layers.3.attention.scores")
    warm = Trace("layers.3.attention.scores")
    tokens = list(generate(tiny, ids, max_new_tokens=6, ops=REFERENCE))
    list(generate(tiny, ids, max_new_tokens=2, ops=REFERENCE, tap=warm))
    assert tiny.tokenizer is not None
    assert done.stdout == tiny.tokenizer.decode(tokens)
    assert done.returncode == 0
    answers = [line.removeprefix("(Pdb) ") for line in done.stderr.splitlines() if line.startswith("(Pdb) ")]
    scores, later = whole["layers.3.attention.scores"], warm["layers.3.attention.scores"]
    assert answers[:4] == ["torch.Size([6, 5, 5])", str(float(scores[0, 0, 0])), "3", "torch.Size([6, 5, 32])"]
    assert answers[4].endswith("attention()")
    assert answers[5] == "torch.Size([5, 2, 32])"
    assert answers[7] == str((later.shape, float(later[5, 0, 5])))
    assert f"model.py({line_of(model.attend, 'probs')})attend()" in done.stderr
    assert "layers.3.attention.scores [6, 5, 5] in bfloat16, here scores; c continues, q quits" in done.stderr
    assert done.stderr.count("here scores") == 2
    assert "no more commands for pdb" in done.stderr
    assert len(re.findall(r"<- .*%", done.stderr)) == 6  # --top still prints its lines


@pytest.mark.usefixtures("pdb_in_here")
def test_every_tensor_has_a_name_at_its_stop(
    tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stop is not in a tap after break_at in a chain."""
    commands = [
        f"p {local}.isfinite().sum().item(), {local}.nan_to_num(0, 0, 0).double().sum().item()\nc"
        for local in LOCALS.values()
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(commands)))
    kept = []
    with torch.no_grad():
        forward(
            tiny.weights,
            tiny.params,
            torch.tensor(ids),
            tap=chain(
                break_at("layers.2.*", "tok_embeddings", "norm", "logits"), lambda name, x: kept.append(name) or x
            ),
        )
    whole = trace(tiny, ids, ops=REFERENCE)
    out, err = capsys.readouterr()
    answers = re.findall(r"^\(Pdb\) (\(.*\))$", err, re.MULTILINE)
    assert out == ""
    assert kept == list(whole)
    assert re.findall(r"llama3_raw: (\S+) .*, here (\w+);", err) == list(LOCALS.items())
    for name, answer in zip(LOCALS, answers, strict=True):
        tensor = whole[name]
        expected = tensor.isfinite().sum().item(), tensor.nan_to_num(0, 0, 0).double().sum().item()
        assert answer == str(expected), name


@pytest.mark.usefixtures("pdb_in_here")
def test_changes_at_a_stop_stay(
    tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breakpoints stay, a step skips the tap, and the pass continues with a changed tensor."""
    commands = [
        "!__return__.zero_()",
        f"b {MODEL_FILE}:{line_of(model.feed_forward, 'hidden')}",
        "s",
        "s",
        "c",
        "p tap.prefix",
        "c",
    ]
    commands += ["!scores = torch.zeros_like(scores)", "c", "p tap.prefix"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(commands)))
    kept = Trace("*.residual", "layers.2.attention.probs")
    breaking = break_at("layers.1.attention.out", "layers.2.attention.scores", "layers.3.*")
    with torch.no_grad():
        forward(tiny.weights, tiny.params, torch.tensor(ids), tap=chain(breaking, kept))
    err = capsys.readouterr().err
    stops = [
        line_of(model.attention, "return"),
        line_of(model.layer, "normed", 1),  # ffn_norm
        model.rms_norm.__code__.co_firstlineno,  # the second step goes into it
        line_of(model.feed_forward, "hidden"),
        line_of(model.attend, "probs"),
        line_of(model.feed_forward, "hidden"),
    ]
    assert [int(line) for line in re.findall(r"model\.py\((\d+)\)\w+\(\)", err)] == stops
    assert re.findall(r"\(Pdb\) '(layers\S+)'", err) == ["layers.1.feed_forward.", "layers.2.feed_forward."]
    assert torch.equal(kept["layers.1.attention.residual"], kept["layers.0.residual"])
    assert kept["layers.2.attention.probs"].unique().tolist() == pytest.approx([0.2], rel=1e-2)  # five equal ones
    assert err.count("no more commands for pdb") == 1  # and no stop in layer 3
    assert sys.gettrace() is None


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal() -> None:
    """With readline, Ctrl-D quits; the generated text stays in one piece."""
    import pty

    leader, follower = pty.openpty()
    command = [*COMMAND, "--break", "layers.0.attention.q", "--max-new-tokens", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    output = b""
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        for prompts, answer in enumerate((b"p 1000 + q.shape[-2]\n", b"c\n", b"\x04"), start=1):
            while output.count(b"(Pdb) ") < prompts:
                output += os.read(leader, 4096)
            os.write(leader, answer)
        while True:
            try:
                output += os.read(leader, 4096)
            except OSError:  # on Linux: the other end is closed
                break
    os.close(leader)
    assert b"1006" in output
    assert output.count(b"here q;") == 2
    assert b"Traceback" not in output
    assert b"," in output.rpartition(b"(Pdb) ")[2]  # the one new token, kept until pdb is done
    assert b"stopped by q in the debugger after 1 new token" in output
    assert process.returncode == 130


@pytest.mark.usefixtures("pdb_in_here")
def test_quitting_is_not_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    assert main([*COMMAND[3:], "--break", "norm"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].endswith("llama3_raw: stopped by q in the debugger after 0 new tokens")


@pytest.mark.slow
def test_a_run_cannot_be_restarted() -> None:
    """pdb would end it with a traceback."""
    done = run([*COMMAND, "--break", "norm", "--max-new-tokens", "2"], ["run", "restart", "c"])
    assert (done.stdout + done.stderr).count("the run cannot be restarted from here; q quits") == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0), reason="its pdb takes no options of a module (gh-125115)")
def test_plain_pdb() -> None:
    """Breakpoints work in every line of model.py; the run ends as pdb ends it."""
    line = line_of(model.attend, "scores")
    commands = [f"b llama3_raw/model.py:{line}", "c", "p start, q.shape", "import llama3_raw.model as model"]
    commands += ["b model.rope", "c", "p tuple(x.shape)", "q"]
    done = run([sys.executable, "-m", "pdb", *COMMAND[1:], "--reference"], commands)
    assert f"Breakpoint 1 at {MODEL_FILE}:{line}" in done.stdout
    assert "(0, torch.Size([6, 5, 32]))" in done.stdout
    assert "(5, 6, 32)" in done.stdout
    assert done.stdout.count("(Pdb)") == len(commands)  # and does not restart
    assert "Traceback" not in done.stdout + done.stderr


def test_another_debugger(
    tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is called in the tap's frame, and the frame of model.py is as many frames up as the printed line says."""
    stopped: list[tuple[str, FrameType | None]] = []

    def stop() -> None:
        frame = sys._getframe(1)
        name = frame.f_locals["name"]
        stopped.append((name, frame.f_back and frame.f_back.f_back))

    def pass_over_the_prompt() -> list[str]:
        stopped.clear()
        breaking = break_at("layers.1.attention.scores", "logits")
        forward(tiny.weights, tiny.params, torch.tensor(ids), tap=breaking)
        assert all(frame and frame.f_code.co_filename == str(MODEL_FILE) for _, frame in stopped)
        return [name for name, _ in stopped]

    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", stop)  # as notebooks and editors do
    assert pass_over_the_prompt() == ["layers.1.attention.scores", "logits"]
    monkeypatch.setattr(sys, "breakpointhook", sys.__breakpointhook__)
    monkeypatch.setitem(sys.modules, "other_debugger", SimpleNamespace(stop=stop))
    monkeypatch.setenv("PYTHONBREAKPOINT", "other_debugger.stop")
    assert pass_over_the_prompt() == ["layers.1.attention.scores", "logits"]
    lines = capsys.readouterr().err.splitlines()  # the tap's frame does not show it at once
    assert lines[-2:] == [
        "llama3_raw: layers.1.attention.scores [6, 5, 5] in bfloat16, 2 frames up",
        "llama3_raw: logits [5, 2304] in float32, 2 frames up",
    ]
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")  # no debugger
    assert pass_over_the_prompt() == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["Hi", "--break", "layers.0.atention.q"], "the nearest are layers.0.attention.q,"),
        (["Hi", "--break", "norm", "--break", "layers.4.*"], "'layers.4.*' in a pass of layers 0 to 3"),
        (["-", "--break", "norm"], "--break: stdin is for the debugger; give the prompt as an argument"),
        (["Hi", "--break", ""], "should not be empty"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama3_raw.__main__.load_model", None)  # reported before the weights are read
    assert main(["--weights", str(ROOT / "weights" / "tiny"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_a_breakpoint_in_the_model_stops_in_the_real_pass_first(
    tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`trace` checks its memory before the pass, but without running the model."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\np q.device\nq\n"))
    debugger = pdb.Pdb(nosigint=True, readrc=False)
    debugger.set_break(str(MODEL_FILE), line_of(model.attend, "scores"))
    with contextlib.suppress(bdb.BdbQuit):
        debugger.runcall(trace, tiny, ids, "logits", ops=REFERENCE)
    debugger.clear_all_breaks()  # every Pdb shares them
    assert "device(type='cpu')" in capsys.readouterr().out
