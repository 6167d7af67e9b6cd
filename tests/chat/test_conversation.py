"""Conversations: what a turn computes, and what the model sees."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama3_raw import Model, UserError
from llama3_raw.chat import __main__ as chat
from llama3_raw.chat.conversation import Conversation
from llama3_raw.chat.dialog import Message, encode_message
from llama3_raw.decoding import runner
from llama3_raw.decoding.loop import StopReason
from llama3_raw.decoding.sampling import Sampling
from tests.chat.fakes import Fake, ask, dialog_ids, taught
from tests.references import cast


def test_a_turn_computes_only_what_is_new(fake: Fake, fake_model: Model) -> None:
    conversation = Conversation(fake_model, system="Be brief.")
    for question in ("Why?", "And then?", "Really?"):
        before = len(fake.rows)  # all tokens in the cache
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
    """Whatever was asked, stopped, loaded, changed or dropped before, the cache has all of its tokens in order."""
    assert fake_model.tokenizer is not None
    fake = Fake(fake_model.tokenizer.special_tokens["<|eot_id|>"])
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
                        continue  # perhaps stopped before a pass; the next turn shows what is cached
                assert conversation.exchanges[-1].question == question
                dialog = dialog_ids(conversation)
                assert dialog[: len(fake.rows)] == fake.rows
                rest = [*conversation.turn.new[-1:], conversation.tokenizer.eot_id]  # the last token is not computed
                ended = conversation.turn.reason is StopReason.END_TOKEN
                assert dialog[len(fake.rows) :] == (rest[-1:] if ended else rest)


def test_a_kept_cache_and_a_new_one_give_the_same_answer(tiny: Model) -> None:
    model = taught(tiny)
    model = model._replace(weights=cast(model.weights, torch.float32))  # so that rounding does not decide
    kept = Conversation(model, max_new_tokens=20)
    ask(kept, "Once upon a time")
    in_cache = kept.length() - 2  # all but the last token of the answer and its <|eot_id|>
    fresh = Conversation(model, max_new_tokens=20)
    fresh.exchanges = list(kept.exchanges)
    assert ask(kept, "And then?") == ask(fresh, "And then?") != ""
    assert kept.exchanges == fresh.exchanges
    assert kept.turn.computed == fresh.turn.computed - in_cache


def test_an_answer_that_the_caller_closes(fake: Fake, fake_model: Model) -> None:
    """close() acts like Ctrl-C between two tokens: the text so far is the answer."""
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
        err = capsys.readouterr().err
        assert ("is full; the" in err) == (conversation.turn.dropped > 0)
        assert conversation.length() <= 201  # the <|eot_id|> of the last answer needs no position yet
    assert dropped > 5
    assert [exchange.question for exchange in conversation.exchanges] == questions[dropped:]
    assert conversation.messages[0] == Message("system", "Be brief.")


def test_a_window_that_fills_during_an_answer(
    fake: Fake, fake_model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_max_new_tokens_ends_an_answer(fake: Fake, fake_model: Model) -> None:
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
    assert once[0] != once[1], "a repeated question should be sampled with new random numbers"
    assert two_answers(2) != once


def test_what_a_conversation_needs(tiny: Model) -> None:
    with pytest.raises(UserError, match="needs a tokenizer"):
        Conversation(tiny._replace(tokenizer=None))
    with pytest.raises(UserError, match=r"^context 513: the model's own context is 512"):
        Conversation(tiny, context=513)
    assert Conversation(tiny).context == 512
