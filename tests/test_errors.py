"""Errors of the library name arguments; commands show the option instead."""

from __future__ import annotations

import pytest

from llama3_raw import UserError
from llama3_raw.cli.entry_point import describe
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.errors import in_short


def test_an_error_names_the_argument() -> None:
    first = UserError("should be 0 or more, and is -1", argument="top_k")
    assert str(first) == "top_k should be 0 or more, and is -1"
    assert describe(first) == "--top-k should be 0 or more, and is -1"
    within = UserError("x: too long; give a smaller {argument}", argument="max_new_tokens")
    assert str(within) == "x: too long; give a smaller max_new_tokens"
    assert describe(within) == "x: too long; give a smaller --max-new-tokens"
    assert describe(UserError("a file named {argument}: is not there")) == "a file named {argument}: is not there"


def test_sampling_names_its_fields() -> None:
    with pytest.raises(UserError, match=r"^top_k ") as raised:
        Sampling(top_k=-1)
    assert describe(raised.value).startswith("--top-k ")


def test_one_line_that_a_terminal_can_show() -> None:
    assert describe(UserError("two\nlines, \x1b[31mred")) == "two lines, \ufffd[31mred"
    assert in_short(ValueError("a\n b")) == "a b"
    assert in_short(ValueError()) == "ValueError"
    assert len(in_short("x" * 1000)) == 202
