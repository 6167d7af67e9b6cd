"""Meta's dialog format, and dialogs in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_raw import Model, Tokenizer, UserError
from llama3_raw.chat.__main__ import run_command
from llama3_raw.chat.conversation import Conversation
from llama3_raw.chat.dialog import Message, encode_dialog, is_base_model, read_dialog, write_dialog
from tests.chat.fakes import Fake, ask, taught

DIALOGS = {
    "a question": [("user", "Why is the sky blue?")],
    "with system": [("system", "You are brief."), ("user", "Hi")],
    "turns": [("system", "Be kind."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And\n\n2 + 2?\n- tell me")],
    "unicode": [("user", "Größe 漢字 👩‍👩‍👧 \u0301e"), ("assistant", "naïve…"), ("user", "'s")],
    "empty": [("system", ""), ("user", ""), ("assistant", ""), ("user", "")],
    "space": [("system", "\n be \n"), ("user", "  hello\t\n"), ("assistant", "\u3000so \u00a0"), ("user", "\n\n\n")],
}


def messages(name: str) -> list[Message]:
    return [Message(*pair) for pair in DIALOGS[name]]


@pytest.mark.parametrize("name", DIALOGS)
def test_the_format_is_that_of_the_template(llama3: Tokenizer, hf_template: str, name: str) -> None:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    renderer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=HFTokenizer(BPE()), bos_token="<|begin_of_text|>"
    )
    dialog = [message._asdict() for message in messages(name)]
    rendered = renderer.apply_chat_template(
        dialog, chat_template=hf_template, tokenize=False, add_generation_prompt=True
    )
    assert encode_dialog(llama3, messages(name)) == llama3.encode(rendered, allow_special=True)


@pytest.mark.parametrize("name", [*DIALOGS, "special names"])
def test_the_format_is_metas(llama3: Tokenizer, name: str) -> None:
    """llama-models keeps space around the content, so it is stripped here first."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    special = [Message("user", "what is <|eot_id|>?"), Message("assistant", "<|begin_of_text|>")]
    dialog = special if name == "special names" else messages(name)
    theirs = [RawMessage(role=role, content=content.strip()) for role, content in dialog]
    expected = ChatFormat(MetaTokenizer.get_instance()).encode_dialog_prompt(theirs).tokens
    assert encode_dialog(llama3, dialog) == expected


def test_a_base_model_is_known_by_its_embeddings(tiny: Model) -> None:
    assert is_base_model(tiny)
    assert not is_base_model(taught(tiny))
    zero = tiny.weights.tok_embeddings.clone()
    zero[2048:] = 0  # as reported for Llama 3 8B
    assert is_base_model(tiny._replace(weights=tiny.weights._replace(tok_embeddings=zero)))


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
def test_a_file_that_is_not_a_dialog(fake: Fake, fake_model: Model, tmp_path: Path, case: str) -> None:
    """It is neither loaded nor overwritten, and the conversation is unchanged."""
    content, message = WRONG_FILES[case]
    file = tmp_path / "file.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    before = file.read_bytes()
    conversation = Conversation(fake_model, system="Be brief.")
    ask(conversation)
    messages_before = conversation.messages
    for command in ("/load", "/save"):
        with pytest.raises(UserError) as caught:
            run_command(conversation, f"{command} {file}")
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert conversation.messages == messages_before
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_cannot_be_used(fake_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert list(tmp_path.iterdir()) == [], "an incomplete file is left"


content = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.none() | content, st.lists(st.tuples(content, content), max_size=4))
def test_a_saved_dialog_can_be_loaded(
    tmp_path_factory: pytest.TempPathFactory, system: str | None, turns: list[tuple[str, str]]
) -> None:
    file = tmp_path_factory.getbasetemp() / "saved.json"
    dialog = [] if system is None else [Message("system", system)]
    for question, answer in turns:
        dialog += [Message("user", question), Message("assistant", answer)]
    write_dialog(file, dialog)
    assert read_dialog(file) == dialog
