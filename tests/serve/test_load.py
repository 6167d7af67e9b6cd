"""Many clients at once: no answer is lost or mixed up, and memory stays flat."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import Any

import httpx2 as httpx
import pytest

from llama3_raw import Model, generate
from tests.decoding.test_batch import PROMPTS

from .servers import Server

LENGTHS = (1, 3, 8, 15, 24)


@pytest.fixture(scope="module")
def expected(tiny: Model) -> dict[tuple[str, int], str]:
    """The text of each prompt and length, computed alone."""
    assert tiny.tokenizer is not None
    texts: dict[tuple[str, int], str] = {}
    for prompt in PROMPTS:
        new = [*generate(tiny, tiny.tokenizer.encode(prompt, bos=True), max_new_tokens=max(LENGTHS))]
        texts |= {(prompt, length): tiny.tokenizer.decode(new[:length]) for length in LENGTHS}
    return texts


async def client(url: str, number: int, until: float, expected: dict[tuple[str, int], str]) -> int:
    """Ask until the time has come; return how many answers were right. Raises AssertionError for a wrong one."""
    choose = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=300, verify=False) as session:
        for count in itertools.count():
            if count and time.monotonic() > until:
                return count
            prompt, length = choose.choice([*expected])
            asked: dict[str, Any] = {"prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": None}
            if choose.random() < 0.1:  # goes away in the middle
                async with session.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
                    async for _ in answer.aiter_bytes():
                        break
                continue
            answer = await session.post("/v1/completions", json=asked)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected[prompt, length]
    raise AssertionError


async def load(url: str, clients: int, seconds: float, expected: dict[tuple[str, int], str]) -> list[int]:
    until = time.monotonic() + seconds
    return await asyncio.gather(*(client(url, number, until, expected) for number in range(clients)))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_64_clients(server: Server, expected: dict[tuple[str, int], str], seconds: float) -> None:
    asyncio.run(load(server.url, 64, 2, expected))  # what is allocated once
    before = server.memory
    asyncio.run(load(server.url, 64, seconds, expected))
    assert server.memory < before + 30_000_000
    server.wait_for("running_texts", 0)
    assert server.metric("waiting_texts") == 0
