"""The tokenizer compared with Meta's own, with llama.cpp's test cases, and on arbitrary text."""

from __future__ import annotations

import base64
import functools
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_raw import Tokenizer, UserError
from llama3_raw.tokenizer import SPECIAL_TOKENS
from tests.paths import TINY

HERE = Path(__file__).parent
PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
PROMPT_IDS = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220]


@pytest.fixture(scope="module")
def meta_tokenizer(meta_tokenizer_file: Path):  # type: ignore[no-untyped-def]
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer(meta_tokenizer_file)


def test_the_47_cases_of_llama_cpp(llama3: Tokenizer) -> None:
    """tests/llama-bpe.inp and .out are models/ggml-vocab-llama-bpe.gguf.inp and .out of llama.cpp (MIT)."""
    texts = (HERE / "llama-bpe.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(number) for number in line.split()] for line in (HERE / "llama-bpe.out").read_text().split("\n")]
    assert len(expected) == 47
    for text, ids in zip(texts, expected, strict=True):
        assert llama3.encode(text) == ids
        assert llama3.decode(ids) == text


def test_the_prompt_of_the_ultimate_question(llama3: Tokenizer) -> None:
    assert llama3.encode(PROMPT, bos=True) == PROMPT_IDS


def test_special_tokens_are_those_of_meta(llama3: Tokenizer, meta_tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert llama3.special_tokens == meta_tokenizer.special_tokens
    assert llama3.n_words == meta_tokenizer.n_words == 128256
    assert sorted(llama3.stop_ids) == sorted(meta_tokenizer.stop_tokens) == [128001, 128008, 128009]
    assert (llama3.bos_id, llama3.eos_id, llama3.eot_id) == (128000, 128001, 128009)


TEXTS = [
    " " * 25_000,
    " " * 25_001,
    "a" * 60_001,
    "x" + "\t" * 50_000 + "y" * 25_001 + " z",
    "日本語" * 20_000,
    "wörter und\u00a0räume\u2003\x1c " * 3_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=[f"{text[:3]!r} {len(text)}" for text in TEXTS])
def test_long_runs_are_split_as_by_meta(llama3: Tokenizer, meta_tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert llama3.encode(text) == meta_tokenizer.encode(text, bos=False, eos=False)


def test_a_million_spaces(llama3: Tokenizer) -> None:
    start = time.monotonic()
    assert llama3.decode(llama3.encode(" " * 1_000_000)) == " " * 1_000_000
    assert time.monotonic() - start < 60


def test_long_text_is_not_split_at_400_000_characters(llama3: Tokenizer) -> None:
    """Meta's code splits it there, even within a word, which changes the ids."""
    text = "a word " * 60_000
    ids = llama3.encode(text)
    assert ids == llama3.encode("a word" + " a word" * 59_999 + " ")
    assert set(ids[1:-1]) == {llama3.encode(" a")[0], llama3.encode(" word")[0]}


def test_special_names_are_plain_text(llama3: Tokenizer) -> None:
    text = "<|eot_id|>hello<|begin_of_text|>"
    assert not set(llama3.encode(text)) & set(llama3.special_tokens.values())
    assert llama3.decode(llama3.encode(text)) == text
    assert llama3.encode(text, allow_special=True) == [128009, *llama3.encode("hello"), 128000]


def test_exactly_one_bos(llama3: Tokenizer) -> None:
    once = [128000, *llama3.encode("hello")]
    assert llama3.encode("hello", bos=True) == once
    assert llama3.encode("<|begin_of_text|>hello", bos=True, allow_special=True) == once
    assert llama3.encode("hello", bos=True, eos=True) == [*once, 128001]
    assert llama3.encode("") == []


@given(st.text())
def test_round_trip(text: str) -> None:
    tokenizer = _tiny()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


@given(st.lists(st.integers(0, 255)), st.text(max_size=3))
def test_stream_equals_decode(values: list[int], stop: str) -> None:
    """Single bytes in any order: the stream equals the decoded text, except an incomplete character at the end."""
    tokenizer = _tiny()
    assert [tokenizer.token_bytes(value) for value in (0, 128, 255)] == [b"\x00", b"\x80", b"\xff"]
    whole = tokenizer.decode(values)
    pieces = list(tokenizer.stream(values, [stop] if stop else []))
    assert all(pieces)
    streamed = "".join(pieces)
    if stop and stop in whole.rstrip("\ufffd"):
        assert streamed == whole.split(stop)[0]
    elif not (stop and stop in whole):
        assert whole.startswith(streamed)
        assert set(whole[len(streamed) :]) <= {"\ufffd"}


def test_an_incomplete_character_is_held_back(llama3: Tokenizer) -> None:
    ids = llama3.encode("🦙")
    assert len(ids) > 1
    assert list(llama3.stream(ids)) == ["🦙"]
    assert list(llama3.stream(ids[:-1])) == []


def test_the_beginning_of_a_stop_text_is_held_back() -> None:
    tokenizer = _tiny()

    def stream(text: str, *stops: str) -> list[str]:
        return list(tokenizer.stream(list(text.encode()), stops))

    assert stream("abcd", "bcx") == ["a", "bcd"]
    assert stream("abcd", "bc") == ["a"]
    assert stream("aab!", "ab") == ["a"]
    assert stream("xyz", "z", "y") == ["x"]
    assert stream("ab", "bc") == ["a", "b"]


def test_an_id_out_of_range(llama3: Tokenizer) -> None:
    for token in (-1, 128256):
        with pytest.raises(UserError, match=f"token id {token} "):
            llama3.decode([token])


def test_names_are_text_for_people(llama3: Tokenizer) -> None:
    names = [llama3.name(token) for token in (*llama3.encode(" a\n"), *llama3.encode("🦙")[:2], 128009)]
    assert names == [" a", "\n", "\\xf0\\x9f", "\\xa6", "<|eot_id|>"]


def test_padded(llama3: Tokenizer) -> None:
    padded = llama3.padded(128320)
    assert (padded.n_words, llama3.n_words) == (128320, 128256)
    assert (padded.name(128319), padded.decode([128319, *llama3.encode("a")])) == ("<|unused_128319|>", "a")
    assert not max(padded.encode("<|unused_128319|>", allow_special=True)) >= 128000
    with pytest.raises(UserError, match="vocab_size 128255 is less than the tokenizer's 128256"):
        llama3.padded(128255)


@functools.cache
def _tiny() -> Tokenizer:
    return Tokenizer(TINY / "tokenizer.model")


def lines(*tokens: bytes) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


BYTES = [bytes([byte]) for byte in range(256)]
GOOD = lines(*BYTES, b"ab")


def test_no_copy_is_kept_by_path(tmp_path: Path) -> None:
    """A changed file is another tokenizer (tiktoken's own reader would return the first one again)."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(GOOD))
    assert Tokenizer(file).encode("ab") == [256]
    file.write_bytes(b"\n".join(lines(*BYTES, b"xy")))
    assert Tokenizer(file).encode("ab") == [97, 98]


def test_there_are_256_special_tokens() -> None:
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS) == 256
