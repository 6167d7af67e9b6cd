"""Chat: the format against Meta's and Hugging Face's, the cache over turns, and the tool as a user has it."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fetch
from hypothesis import given
from hypothesis import strategies as st
from references import cast, random_weights
from torch import Tensor

from llama3_raw import Model, Params, Tokenizer, UserError
from llama3_raw.__main__ import main as continue_text
from llama3_raw.chat import __main__ as chat
from llama3_raw.chat.__main__ import main, run_command
from llama3_raw.chat.conversation import Conversation
from llama3_raw.chat.dialog import Message, encode_dialog, encode_message, is_base_model, read_dialog, write_dialog
from llama3_raw.decoding import runner
from llama3_raw.decoding.loop import StopReason, generate
from llama3_raw.decoding.sampling import Sampling

ROOT = Path(__file__).parent.parent
TINY = ROOT / "weights" / "tiny"

DIALOGS = {
    "a question": [("user", "Why is the sky blue?")],
    "with system": [("system", "You are brief."), ("user", "Hi")],
    "turns": [("system", "Be kind."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And\n\n2 + 2?\n- tell me")],
    "unicode": [("user", "Größe 漢字 👩‍👩‍👧 \u0301e"), ("assistant", "naïve…"), ("user", "'s")],
    "empty": [("system", ""), ("user", ""), ("assistant", ""), ("user", "")],
    "space": [("system", "\n be \n"), ("user", "  hello\t\n"), ("assistant", "\u3000so \u00a0"), ("user", "\n\n\n")],
}


def messages(name: str) -> list[Message]:
    return [Message(*said) for said in DIALOGS[name]]


@pytest.fixture(scope="session")
def llama3(meta_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(meta_tokenizer_file)


@pytest.fixture(scope="session")
def hf_template() -> str:
    """The template of Llama 3 Instruct, as transformers 4 wrote it into converted models (5 no longer has it)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "transformers==4.43.4"]
    with zipfile.ZipFile(fetch("transformers-4.43.4-py3-none-any.whl", command)) as wheel:
        source = wheel.read("transformers/models/llama/convert_llama_weights_to_hf.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "chat_template":
            return str(ast.literal_eval(node.value))
    raise AssertionError("no chat_template in it")


@pytest.mark.parametrize("name", DIALOGS)
def test_the_format_is_that_of_the_template(llama3: Tokenizer, hf_template: str, name: str) -> None:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    renderer = PreTrainedTokenizerFast(tokenizer_object=HFTokenizer(BPE()), bos_token="<|begin_of_text|>")
    dialog = [message._asdict() for message in messages(name)]
    rendered = renderer.apply_chat_template(
        dialog, chat_template=hf_template, tokenize=False, add_generation_prompt=True
    )
    assert encode_dialog(llama3, messages(name)) == llama3.encode(rendered, allow_special=True)


@pytest.mark.parametrize("name", [*DIALOGS, "special names"])
def test_the_format_is_metas(llama3: Tokenizer, name: str) -> None:
    """llama-models leaves the space around a content where it is, so it gets it without."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    special = [Message("user", "what is <|eot_id|>?"), Message("assistant", "<|begin_of_text|>")]
    dialog = special if name == "special names" else messages(name)
    theirs = [RawMessage(role=role, content=content.strip()) for role, content in dialog]
    expected = ChatFormat(MetaTokenizer.get_instance()).encode_dialog_prompt(theirs).tokens
    assert encode_dialog(llama3, dialog) == expected


# A model whose cache holds the ids of its tokens, and whose next token depends on all of them.

VOCAB = 2048 + 256  # of the built-in tokenizer
PARAMS = Params.from_meta(
    {"dim": 2, "n_layers": 1, "n_heads": 1, "vocab_size": VOCAB, "norm_eps": 1e-5, "max_seq_len": 10_000}
)


class Fake:
    """A forward pass that keeps ids in place of keys, and may be interrupted."""

    def __init__(self, eot_id: int) -> None:
        self.eot_id = eot_id
        self.ends_in = 7  # one token in so many is the end of an answer
        self.calls: list[int] = []  # how many tokens
        self.rows: list[int] = []  # the ids that the last pass saw
        self.interrupt_in = -1  # passes

    def __call__(self, weights: Any, params: Any, tokens: Tensor, *, cache: Any, start: int, **_: Any) -> Tensor:
        rows = cache.keys[0][:, 0, 0]  # [max_seq_len]
        if self.interrupt_in == 0:
            rows[start:] = -1  # half done
            raise KeyboardInterrupt
        self.interrupt_in -= 1
        rows[start : start + len(tokens)] = tokens
        self.calls.append(len(tokens))
        self.rows = [int(row) for row in rows[: start + len(tokens)]]
        digest = hash(tuple(self.rows))
        token = self.eot_id if digest % self.ends_in == 0 else digest % 2048
        return torch.nn.functional.one_hot(torch.tensor(token), VOCAB).float()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, fake_model: Model) -> Fake:
    assert fake_model.tokenizer is not None
    fake = Fake(fake_model.tokenizer.eot_id)
    monkeypatch.setattr(runner, "forward", fake)
    return fake


@pytest.fixture(scope="session")
def fake_model(tiny: Model) -> Model:
    return Model(random_weights(PARAMS, torch.float32, seed=0), PARAMS, tiny.tokenizer)


def taught(model: Model) -> Model:
    """The built-in model as if trained on dialogs: <|eot_id|> has a row of its own. It also never ends an answer."""
    assert model.tokenizer is not None
    embeddings = model.weights.tok_embeddings.clone()
    embeddings[list(model.tokenizer.stop_ids)] = 0
    return model._replace(weights=model.weights._replace(tok_embeddings=embeddings, output=embeddings))


def dialog_ids(conversation: Conversation) -> list[int]:
    """Every token of the dialog, with the answers as they were generated."""
    system = [Message("system", conversation.system)] if conversation.system else []
    ids = [conversation.tokenizer.bos_id]
    for message in system:
        ids += encode_message(conversation.tokenizer, message)
    return ids + [token for exchange in conversation.exchanges for token in exchange.ids]


def ask(conversation: Conversation, question: str = "Why?") -> str:
    return "".join(conversation.answer(question))


def test_a_turn_computes_only_what_is_new(fake: Fake, fake_model: Model) -> None:
    conversation = Conversation(fake_model, system="Be brief.")
    for question in ("Why?", "And then?", "Really?"):
        before = len(fake.rows)  # all that the cache holds
        fake.calls.clear()
        ask(conversation, question)
        assert sum(fake.calls) == conversation.turn.computed == len(fake.rows) - before
        assert dialog_ids(conversation) == [*fake.rows, conversation.tokenizer.eot_id]
    conversation.system = "Be long."
    fake.calls.clear()
    ask(conversation)
    changed = 1 + len(encode_message(conversation.tokenizer, Message("system", "Be"))) - 1  # BOS and the same header
    assert sum(fake.calls) == len(fake.rows) - changed


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.text(max_size=30), st.integers(-1, 12)),
            st.tuples(st.just("system"), st.text(max_size=10)),
            st.tuples(st.just("load"), st.lists(st.text(max_size=10), max_size=3)),
            st.tuples(st.just("reset")),
        ),
        max_size=12,
    ),
    st.sampled_from([60, 100, 1000]),
)
def test_the_model_always_sees_the_whole_dialog(
    fake_model: Model, actions: list[tuple[Any, ...]], context: int
) -> None:
    """Whatever was said, stopped, loaded, changed and dropped before: its tokens are all in the cache, in order."""
    assert fake_model.tokenizer is not None
    fake = Fake(fake_model.tokenizer.eot_id)
    conversation = Conversation(fake_model, context=context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "forward", fake)
        for action, *details in actions:
            if action == "system":
                conversation.system = details[0]
            elif action == "reset":
                conversation.exchanges.clear()
            elif action == "load":
                pairs = [(Message("user", text), Message("assistant", text[::-1])) for text in details[0]]
                conversation.restore([message for pair in pairs for message in pair])
            else:
                question, fake.interrupt_in = details
                before = conversation.messages
                try:
                    ask(conversation, question)
                except (UserError, KeyboardInterrupt):
                    if not conversation.turn.new:
                        assert conversation.messages == before or conversation.turn.dropped
                    if not conversation.turn.new or conversation.turn.dropped:
                        continue  # perhaps stopped before a pass over what is left; the next turn shows what is cached
                assert conversation.exchanges[-1].question == question
                dialog = dialog_ids(conversation)
                assert dialog[: len(fake.rows)] == fake.rows
                rest = [*conversation.turn.new[-1:], conversation.tokenizer.eot_id]  # the last token is not computed
                ended = conversation.turn.reason is StopReason.END_TOKEN
                assert dialog[len(fake.rows) :] == (rest[-1:] if ended else rest)


def test_an_answer_from_a_kept_cache_is_that_from_a_fresh_one(tiny: Model) -> None:
    model = taught(tiny)
    model = model._replace(weights=cast(model.weights, torch.float32))  # where rounding does not decide
    kept = Conversation(model, max_new_tokens=20)
    ask(kept, "Once upon a time")
    in_cache = kept.length() - 2  # all but the last token of the answer and its <|eot_id|>
    fresh = Conversation(model, max_new_tokens=20)
    fresh.exchanges = list(kept.exchanges)
    assert ask(kept, "And then?") == ask(fresh, "And then?") != ""
    assert kept.exchanges == fresh.exchanges
    assert kept.turn.computed == fresh.turn.computed - in_cache


def test_an_answer_that_is_looked_at_no_further(fake: Fake, fake_model: Model) -> None:
    """close() does what Ctrl-C between two tokens does: what has come is the answer, and the next turn is right."""
    fake.ends_in = 10**9
    conversation = Conversation(fake_model)
    with closing(conversation.answer("Why?")) as pieces:
        text = next(pieces) + next(pieces)
    assert conversation.messages == [Message("user", "Why?"), Message("assistant", text)]
    assert conversation.turn.reason is None


def test_a_full_window_drops_the_oldest(fake: Fake, fake_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(fake_model, system="Be brief.", context=200)
    questions = [f"Question {i}?" for i in range(20)]
    dropped = 0
    for question in questions:
        chat.print_answer(conversation, question)
        dropped += conversation.turn.dropped
        said = capsys.readouterr().err
        assert ("is full; the" in said) == (conversation.turn.dropped > 0)
        assert conversation.length() <= 201  # the <|eot_id|> of the last answer needs no place yet
    assert dropped > 5
    assert [exchange.question for exchange in conversation.exchanges] == questions[dropped:]
    assert conversation.messages[0] == Message("system", "Be brief.")


def test_a_window_that_fills_in_mid_answer(fake: Fake, fake_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(fake_model, context=100)
    ask(conversation, "First")
    fake.ends_in = 10**9
    assert not chat.print_answer(conversation, "Second")
    out, err = capsys.readouterr()
    assert [exchange.question for exchange in conversation.exchanges] == ["Second"]
    assert out == conversation.exchanges[0].answer + "\n"
    assert err.splitlines() == [
        "llama3_raw: the window of 100 tokens is full; the oldest turn was dropped",
        "llama3_raw: stopped: the question and its answer fill the window of 100 tokens",
    ]
    assert len(fake.rows) == 99
    assert conversation.length() == 101


def test_a_question_that_fills_the_window(fake: Fake, fake_model: Model) -> None:
    conversation = Conversation(fake_model, context=100)
    ask(conversation)
    before = list(conversation.exchanges)
    with pytest.raises(UserError, match="fill the window of 100 tokens"):
        ask(conversation, "word " * 200)
    assert conversation.exchanges == before
    ask(conversation)
    assert conversation.exchanges[:-1] == before


def test_the_longest_answer(fake: Fake, fake_model: Model) -> None:
    fake.ends_in = 10**9
    conversation = Conversation(fake_model, max_new_tokens=5)
    ask(conversation)
    assert len(conversation.turn.new) == 5
    assert conversation.turn.reason is StopReason.MAX_NEW_TOKENS


def test_seeds(tiny: Model) -> None:
    def two_answers(seed: int | None) -> list[str]:
        conversation = Conversation(tiny, sampling=Sampling(temperature=1.5), seed=seed, max_new_tokens=20)
        first = ask(conversation)
        conversation.exchanges.clear()
        return [first, ask(conversation)]

    once = two_answers(1)
    assert once == two_answers(1)
    assert once[0] != once[1], "a question asked again is drawn anew"
    assert two_answers(2) != once


def test_what_a_conversation_needs(tiny: Model) -> None:
    with pytest.raises(UserError, match="needs a tokenizer"):
        Conversation(tiny._replace(tokenizer=None))
    with pytest.raises(UserError, match=r"^context 513: the model's own context is 512"):
        Conversation(tiny, context=513)
    assert Conversation(tiny).context == 512


# --- base or Instruct


@pytest.fixture(scope="session")
def taught_folder(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llama3_raw.checkpoint.loading import to_state_dict

    folder = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("chat") / "model"))
    torch.save(to_state_dict(tiny.params, taught(tiny).weights), folder / "consolidated.00.pth")
    return folder


def test_a_base_model_is_known_by_its_embeddings(tiny: Model) -> None:
    assert is_base_model(tiny)
    assert not is_base_model(taught(tiny))
    zero = tiny.weights.tok_embeddings.clone()
    zero[2048:] = 0  # as Llama 3 8B is said to be
    assert is_base_model(tiny._replace(weights=tiny.weights._replace(tok_embeddings=zero)))


Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def call(typed: str | bytes, *options: str, folder: Path = TINY) -> tuple[int, str, str]:
        """The tool with `typed` coming out of a pipe."""
        lines = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        status = main(["--weights", str(folder), "--temperature", "0", "--max-new-tokens", "8", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


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
    options = chat.build_parser().parse_args([])
    assert (options.temperature, options.top_p) == (0.6, 0.9)
    text = chat.build_parser().format_help()
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
def test_wrong_input_in_a_pipe_ends_it(talk: Talk, case: str) -> None:
    typed, options, message = WRONG[case]
    status, out, err = talk(typed, *options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("llama3_raw: error: ")


TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
WRONG_FILES = {
    "not JSON": ("nonsense", "not a dialog"),
    "not UTF-8": (b"\xff", "not a dialog"),
    "deep": ("[" * 99_999, "not a dialog"),
    "an object": ("{}", "not a dialog"),
    "other keys": ([{"from": "human", "value": "Hi"}], "not a dialog"),
    "numbers": ([{"role": "user", "content": 5}], "not a dialog"),
    "half a character": ('[{"role": "user", "content": "\\ud800"}]', "not a dialog"),
    "no answer": (TURN[:1], "the last question has no answer"),
    "out of order": (TURN[::-1], "message 1 should have the role 'user', has 'assistant'"),
    "another role": ([TURN[0], {"role": "tool", "content": ""}], "message 2 should have the role 'assistant'"),
    "system in the middle": ([*TURN, {"role": "system", "content": ""}, TURN[0]], "message 3 should have"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_file_that_is_no_dialog(fake: Fake, fake_model: Model, tmp_path: Path, case: str) -> None:
    """It is not loaded, the conversation is as before; and it is not written over."""
    content, message = WRONG_FILES[case]
    file = tmp_path / "file.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    before = file.read_bytes()
    conversation = Conversation(fake_model, system="Be brief.")
    ask(conversation)
    said = conversation.messages
    for command in ("/load", "/save"):
        with pytest.raises(UserError) as caught:
            run_command(conversation, f"{command} {file}")
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert conversation.messages == said
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_cannot_be(fake_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    conversation = Conversation(fake_model)
    for argument, message in (
        (str(tmp_path), "is not a file"),
        (str(tmp_path / "none" / "x.json"), "No such file or directory"),
        ("x" * 5000, "cannot be written"),
        ("a\0b", "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            run_command(conversation, f"/save {argument}")
        with pytest.raises(UserError, match=r"there is no such file|is not a file|cannot be read"):
            run_command(conversation, f"/load {argument}")
    assert list(tmp_path.iterdir()) == [], "something half done is left"


said = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.none() | said, st.lists(st.tuples(said, said), max_size=4))
def test_what_is_saved_can_be_loaded(
    tmp_path_factory: pytest.TempPathFactory, system: str | None, turns: list[tuple[str, str]]
) -> None:
    file = tmp_path_factory.getbasetemp() / "saved.json"
    dialog = [] if system is None else [Message("system", system)]
    for question, answer in turns:
        dialog += [Message("user", question), Message("assistant", answer)]
    write_dialog(file, dialog)
    assert read_dialog(file) == dialog


# --- one answer


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
def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert continue_text(["--weights", str(TINY), *options]) == 2
    assert message in capsys.readouterr().err


# --- at a terminal

PASTE = "\x1b[200~{}\x1b[201~"  # what a terminal sends for text that is pasted
ESCAPE_CODE = re.compile(r"\x1b\[[?0-9;]*[a-zA-Z]")
# makes the terminal on stdin the process's own, so that Ctrl-C typed there is a signal to it
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """The tool in a process of its own at a terminal."""

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
        """Waits for something new on the screen; -> False once the process has ended."""
        assert select.select([self.keyboard], [], [], 60)[0], f"nothing came for a minute after {self.seen!r}"
        try:
            new = os.read(self.keyboard, 4096)
        except OSError:  # what Linux says once nobody has the terminal open any more
            new = b""
        self.seen = ESCAPE_CODE.sub("", self.seen + new.decode(errors="replace"))
        return bool(new)

    def wait_for(self, text: str) -> str:
        """Reads until the text is on the screen; -> what was there before it."""
        while text not in self.seen:
            assert self.read(), f"it ended without {text!r}: {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_at_a_terminal(tiny: Model, taught_folder: Path, tmp_path: Path) -> None:
    """History, pasted lines, Ctrl-C in an answer and in a line, the tab key, Ctrl-D."""
    readline = pytest.importorskip("readline", reason="this Python has no readline, so there is no history")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit, in readline's place here, has other keys and another history file")
    history = tmp_path / "llama3_raw" / "chat_history"
    history.parent.mkdir()
    history.write_text("said before\n")
    dialog = tmp_path / "dialog.json"
    terminal = Terminal(tmp_path, "--weights", str(taught_folder), "--temperature", "0")
    try:
        assert "/help lists the commands" in terminal.wait_for("> ")
        terminal.type("\x10")  # Ctrl-P, the line before
        terminal.wait_for("said before")
        terminal.type("\x0e" + PASTE.format("Once\nupon a time") + "\n")  # Ctrl-N, the line after
        terminal.wait_for(ask(Conversation(taught(tiny), max_new_tokens=4), "Once\nupon a time").strip())
        terminal.type("\x03")
        terminal.wait_for("stopped by Ctrl-C")
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.type("\x03")
        while not select.select([terminal.keyboard], [], [], 1)[0]:
            terminal.type("\x03")  # Python overlooks one that comes while readline deals with the key before
        terminal.wait_for("> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("error: /nonsense: no such command")
        terminal.wait_for("> ")
        terminal.type(f"/save {dialog}\n")
        terminal.wait_for("2 messages")
        terminal.wait_for("> ")
        terminal.type("/sta\t\n")
        stats = terminal.wait_for("peak memory")
        tokens = int(re.search(r"tokens of the answer +(\d+)", stats)[1])
        assert 0 < tokens < 490, "the answer ended by itself"
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


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_pipe(taught_folder: Path) -> None:
    """There is nobody to go on with, and the lines that are left may be many."""
    command = [sys.executable, "-m", "llama3_raw.chat", "--weights", str(taught_folder), "--temperature", "0"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **streams, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("Once upon a time\nAnd then?\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "llama3_raw: stopped by Ctrl-C"
