"""What the tests of `compare` share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llama3_raw import Model

PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are not faster on two threads, and four times slower if the machine is busy."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as context:
        context.setenv("OMP_NUM_THREADS", "1")  # so that the command keeps one thread
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode(PROMPT, bos=True)
