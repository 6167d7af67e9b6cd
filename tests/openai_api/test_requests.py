"""Requests: what becomes of their fields."""

from __future__ import annotations

import pytest

from llama3_raw import Model
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.openai_api.requests import Defaults, parse_request, rows
from llama3_raw.tokenizer import Tokenizer

DEFAULTS = Defaults(None, Sampling())


def test_stop_texts_end_in_the_newest_token(tiny: Model) -> None:
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    request = parse_request({"prompt": [1], "stop": ["garden", "é", "a ball. He"]}, "completion", DEFAULTS)
    (row,) = rows(request, [[1]], tokenizer, frozenset(), 512)
    for text in ("Tom had a ball. He", "They went to the garden", "café"):
        tokens = tokenizer.encode(text)
        ends = [row.is_over(tokens[:length]) for length in range(1, len(tokens) + 1)]
        assert ends == [False] * (len(tokens) - 1) + [True]


def test_long_stop_texts_read_each_token_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of them."""
    tokenizer, count = tiny.tokenizer, 0
    assert tokenizer is not None
    a, z = tokenizer.encode("a"), tokenizer.encode("z")
    original = Tokenizer.token_bytes

    def counted(self: Tokenizer, token: int) -> bytes:
        nonlocal count
        count += 1
        return original(self, token)

    stop = [letter * 1000 for letter in "abcdefghijklmnop"]
    request = parse_request({"prompt": [1], "stop": stop}, "completion", DEFAULTS)
    (row,) = rows(request, [[1]], tokenizer, frozenset(), 4096)
    monkeypatch.setattr(Tokenizer, "token_bytes", counted)
    assert not row.is_over(z * 2000)
    assert count <= 1002
    assert row.is_over(z + a * 1000)
    assert not row.is_over(a + z + a * 999)
