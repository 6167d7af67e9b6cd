"""python -m llama3_raw.chat in a pipe and at a terminal, and --chat of the main command."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama3_raw import Model
from llama3_raw.__main__ import main as continue_text
from llama3_raw.chat.conversation import Conversation
from llama3_raw.chat.dialog import Message, encode_dialog, read_dialog
from llama3_raw.chat.parser import build_parser
from llama3_raw.decoding.loop import generate
from tests.chat.conftest import Talk
from tests.chat.fakes import ask, taught
from tests.paths import TINY


def expected_answers(model: Model, *questions: str, system: str = "") -> str:
    conversation = Conversation(model, system=system, max_new_tokens=8)
    return "".join(ask(conversation, question) + "\n" for question in questions)


def test_lines_of_a_pipe_are_turns(talk: Talk, tiny: Model) -> None:
    status, out, err = talk("Who is Tom?\n\n  /usr?\r\nWhy", "--system", "Grüße")
    assert status == 0
    assert out == expected_answers(tiny, "Who is Tom?", "  /usr?", "Why", system="Grüße")
    assert "warning: a base model" in err
    assert "Traceback" not in err
    assert "> " not in err


def test_an_instruct_model_gets_no_warning(talk: Talk, taught_folder: Path) -> None:
    assert "base model" not in talk("Hi\n", folder=taught_folder)[2]


def test_commands(talk: Talk, tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "dialog.json"
    first = f"Hello\n/save {file}\nMore\n/stats\n/system Be kind.\n/system\n/reset\nHello\n/help\n/exit\nnot asked\n"
    status, out, err = talk(first)
    assert status == 0
    assert out == expected_answers(tiny, "Hello", "More") + expected_answers(tiny, "Hello")
    for text in (
        "2 messages",
        "tokens in the window",
        " of 512",
        "a new system message",
        "it was 'Be kind.'",
        "/load F",
    ):
        assert text in err
    assert json.loads(file.read_text())[0] == {"role": "user", "content": "Hello"}
    status, out, _ = talk(f"/load {file}\nMore\n/save {file}\n")
    assert status == 0
    assert len(read_dialog(file)) == 4


def test_sampling_is_as_in_metas_example() -> None:
    options = build_parser().parse_args([])
    assert (options.temperature, options.top_p) == (0.6, 0.9)
    text = build_parser().format_help()
    assert "default: 0.6" in text
    assert max(map(len, text.splitlines())) <= 100


WRONG = {
    "no such command": ("/nonsense\n", [], "/nonsense: no such command (see /help)"),
    "no file": ("/save\n", [], "/save: give the name of a file"),
    "too long": ("word " * 600, [], "fill the window of 512 tokens"),
    "not UTF-8": (b"Hi\xff\n", [], "stdin: the line is not valid UTF-8"),
    "context": ("", ["--context", "513"], "--context 513: the model's own context is 512"),
    "temperature": ("", ["--temperature", "-1"], "--temperature should be 0"),
    "max new tokens": ("", ["--max-new-tokens", "0"], "--max-new-tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_in_a_pipe_ends_the_chat(talk: Talk, case: str) -> None:
    typed, options, message = WRONG[case]
    status, out, err = talk(typed, *options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("llama3_raw: error: ")


def test_one_answer(capsys: pytest.CaptureFixture[str], tiny: Model) -> None:
    assert tiny.tokenizer is not None
    arguments = ["--weights", str(TINY), "--chat", "--system", "Be kind.", "--max-new-tokens", "8", "--stats", "json"]
    assert continue_text([*arguments, "Who is Tom?"]) == 0
    out, err = capsys.readouterr()
    prompt = encode_dialog(tiny.tokenizer, [Message("system", "Be kind."), Message("user", "Who is Tom?")])
    assert out == tiny.tokenizer.decode(list(generate(tiny, prompt, max_new_tokens=8)))
    assert "warning: a base model" in err
    assert json.loads(err.splitlines()[-1])["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat", "--ids", "5"], "--chat asks in plain text; leave --ids out"),
        (["--chat", "--special", "x"], "--chat asks in plain text; leave --special out"),
        (["--system", "x", "y"], "--system belongs to a question; give --chat with it"),
    ],
)
def test_options_that_contradict_each_other(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert continue_text(["--weights", str(TINY), *options]) == 2
    assert message in capsys.readouterr().err


PASTE = "\x1b[200~{}\x1b[201~"  # what a terminal sends for pasted text

ESCAPE_CODE = re.compile(r"\x1b\[[?0-9;]*[a-zA-Z]")

# makes stdin the controlling terminal, so that Ctrl-C typed there sends a signal to the process
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """The command in a separate process at a pseudo-terminal."""

    def __init__(self, state: Path, *options: str):
        self.keyboard, screen = os.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, sys.executable, "-m", "llama3_raw.chat", *options],
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm"},
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
        )
        os.close(screen)

    def read(self) -> bool:
        """Wait for new output. Return False if the process has ended."""
        assert select.select([self.keyboard], [], [], 60)[0], f"nothing came for a minute after {self.seen!r}"
        try:
            new = os.read(self.keyboard, 4096)
        except OSError:  # on Linux, no process has the terminal open any more
            new = b""
        self.seen = ESCAPE_CODE.sub("", self.seen + new.decode(errors="replace"))
        return bool(new)

    def wait_for(self, text: str) -> str:
        """Read until the text is on the screen. Return what was there before it."""
        while text not in self.seen:
            assert self.read(), f"it ended without {text!r}: {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_at_a_terminal(tiny: Model, taught_folder: Path, tmp_path: Path) -> None:
    """History, pasted lines, Ctrl-C in an answer and in a line, Tab, Ctrl-D."""
    readline = pytest.importorskip("readline", reason="this Python has no readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit, used instead of readline, has other keys and another history file")
    history = tmp_path / "llama3_raw" / "chat_history"
    history.parent.mkdir()
    history.write_text("said before\n")
    dialog = tmp_path / "dialog.json"
    terminal = Terminal(tmp_path, "--weights", str(taught_folder), "--temperature", "0")
    try:
        assert "/help lists the commands" in terminal.wait_for("> ")
        terminal.type("\x10")  # Ctrl-P, the previous line
        terminal.wait_for("said before")
        terminal.type("\x0e" + PASTE.format("Once\nupon a time") + "\n")  # Ctrl-N, the next line
        terminal.wait_for(ask(Conversation(taught(tiny), max_new_tokens=4), "Once\nupon a time").strip())
        terminal.type("\x03")
        terminal.wait_for("stopped by Ctrl-C")
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.type("\x03")
        while not select.select([terminal.keyboard], [], [], 1)[0]:
            terminal.type("\x03")  # Python misses one while readline handles the previous key
        terminal.wait_for("> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("error: /nonsense: no such command")
        terminal.wait_for("> ")
        terminal.type(f"/save {dialog}\n")
        terminal.wait_for("2 messages")
        terminal.wait_for("> ")
        terminal.type("/sta\t\n")
        stats = terminal.wait_for("peak memory")
        (tokens,) = map(int, re.findall(r"tokens of the answer +(\d+)", stats))
        assert 0 < tokens < 490, "the answer ended before Ctrl-C"
        terminal.wait_for("> ")
        terminal.type("\x04")
        while terminal.read():
            pass
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.keyboard)
    assert history.read_text().splitlines() == [
        *("said before", "Once", "upon a time", "/nonsense", f"/save {dialog}", "/stats")
    ]
    question, answer = read_dialog(dialog)
    assert question.content == "Once\nupon a time"
    assert answer.content


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_pipe(taught_folder: Path) -> None:
    """Nobody is there to continue, and many lines may be left."""
    command = [sys.executable, "-m", "llama3_raw.chat", "--weights", str(taught_folder), "--temperature", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("Once upon a time\nAnd then?\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "llama3_raw: stopped by Ctrl-C"
