"""Answers in the form of OpenAI's API: where tokens are in a text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from llama3_raw import Model
from llama3_raw.decoding.logprobs import TokenScore
from llama3_raw.decoding.loop import StopReason
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.openai_api.answers import Answer, choice
from llama3_raw.openai_api.requests import Defaults, parse_request
from llama3_raw.tokenizer import Tokenizer

DEFAULTS = Defaults(16, Sampling())
BOS = 2048


def scores_of(tokens: Sequence[int]) -> list[TokenScore]:
    return [TokenScore(token, -1.0, []) for token in tokens]


def offsets_of(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> tuple[str, list[int]]:
    """Return the text of an answer with its prompt, and the offsets of the tokens."""
    request = parse_request({"prompt": prompt, "echo": True, "logprobs": 0}, "completion", DEFAULTS)
    answer = Answer(prompt, new, StopReason.MAX_NEW_TOKENS, scores_of(prompt[1:]), scores_of(new))
    body = choice(request, 0, answer, tokenizer)
    return body["text"], body["logprobs"]["text_offset"]


def test_only_the_first_begin_of_text_is_hidden(tiny: Model) -> None:
    assert tiny.tokenizer is not None
    text, offsets = offsets_of(tiny.tokenizer, [BOS, 97, BOS, 98], [BOS, 99])
    assert text.count("<|begin_of_text|>") == 2
    assert offsets == [0, 0, 1, 18, 19, 36]


@pytest.mark.parametrize("seed", range(5))
def test_offsets_are_those_of_first_bytes(tiny: Model, seed: int) -> None:
    """Of random tokens, many of which are parts of characters, whole or broken."""
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    choose = random.Random(seed)
    single = [tokenizer.encode(chr(number))[0] for number in (0x20AC, 0x1F642, 0xE9)]
    partial = [token for token in range(256) if tokenizer.token_bytes(token)[0] >= 128]
    tokens = [choose.choice([choose.choice(partial), choose.choice(single), 97, 300]) for _ in range(400)]
    prompt, new = tokens[:200], tokens[200:]
    text, offsets = offsets_of(tokenizer, prompt, new)
    expected = []
    for part, begin in ((prompt, 0), (new, len(tokenizer.decode(prompt)))):
        before = b""
        for token in part:
            # the character of the first byte is the last one, once that byte is there
            content = tokenizer.token_bytes(token)
            expected.append(begin + len((before + content[:1]).decode("utf-8", errors="replace")) - 1)
            before += content
    assert offsets == expected
    assert offsets[-1] <= len(text)


def test_scores_go_on_to_the_end_of_a_stop_text(tiny: Model) -> None:
    """The offsets tell which tokens the text does not have."""
    assert tiny.tokenizer is not None
    request = parse_request({"prompt": [1], "logprobs": 0, "stop": " play"}, "completion", DEFAULTS)
    new = tiny.tokenizer.encode("They like to play")
    body = choice(request, 0, Answer([1], new, StopReason.END_TOKEN, (), scores_of(new)), tiny.tokenizer)
    kept = [offset < len(body["text"]) for offset in body["logprobs"]["text_offset"]]
    assert body["text"] == "They like to"
    assert tiny.tokenizer.decode([token for token, is_kept in zip(new, kept, strict=True) if is_kept]) == body["text"]
    assert not kept[-1]
