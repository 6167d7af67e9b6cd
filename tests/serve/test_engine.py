"""The engine's thread: texts together, calls alone, and what goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch

from llama3_raw import Model, generate
from llama3_raw.backends.choose import ops_for
from llama3_raw.decoding.batch import Row
from llama3_raw.decoding.loop import StopReason
from llama3_raw.decoding.sampling import Sampling
from llama3_raw.errors import UserError
from llama3_raw.ops import Tap, no_tap
from llama3_raw.serve.engine import Asked, Busy, Closed, Engine
from tests.decoding.test_batch import PROMPTS
from tests.references import run


@asynccontextmanager
async def started(model: Model, **settings: Any) -> AsyncIterator[Engine]:
    settings = {"rows": 3, "context": 128, **settings}
    engine = Engine(model, ops_for(model.weights), name="tiny", **settings)
    engine.start()
    yield engine
    await asyncio.to_thread(engine.close)


def in_a_loop(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(function(), 120))


def row_of(model: Model, number: int, count: int = 20, **settings: Any) -> Row:
    assert model.tokenizer is not None
    return Row(model.tokenizer.encode(PROMPTS[number], bos=True), count, **settings)


@pytest.mark.usefixtures("cpu_kernels")
def test_texts_that_arrive_at_any_time_are_those_of_texts_alone(tiny: Model) -> None:
    """Some greedy, some sampled, some scored, more than there are rows; calls come between."""
    rows = [
        row_of(tiny, number % 7, 3 + 5 * number, sampling=Sampling(temperature=number % 2), seed=number)
        for number in range(9)
    ]

    async def body() -> None:
        async with started(tiny) as engine:

            async def ask(number: int) -> Asked:
                await asyncio.sleep(0.01 * number)
                scores: dict[str, Any] = {"n_top": 1, "with_prompt": number == 4} if number % 4 == 0 else {}
                asked = engine.submit([rows[number]], **scores)
                await engine.alone(lambda: None)
                await asked.end()
                return asked

            for number, asked in enumerate(await asyncio.gather(*map(ask, range(9)))):
                (job,) = asked.jobs
                row = rows[number]
                settings = {**asdict(row.sampling), "seed": row.seed}
                alone = run(generate(tiny, row.ids, max_new_tokens=row.max_new_tokens, **settings))
                assert (job.new, job.ended) == alone
                assert job.scored is None or [score.token for score in job.scored.new][: len(job.new)] == job.new

    in_a_loop(body)


def test_calls_run_alone_in_the_thread_of_the_model(tiny: Model) -> None:
    async def body() -> None:
        async with started(tiny) as engine:
            asked = engine.submit([row_of(tiny, 0, 60)])
            names = await asyncio.gather(*(engine.alone(lambda: threading.current_thread().name) for _ in range(3)))
            assert names == ["engine"] * 3
            with pytest.raises(ZeroDivisionError):
                await engine.alone(lambda: 1 // 0)
            await asked.end()
            assert asked.jobs[0].ended is StopReason.MAX_NEW_TOKENS

    in_a_loop(body)


def test_a_text_that_nobody_reads_gives_its_row_to_another(tiny: Model) -> None:
    async def body() -> None:
        async with started(tiny, rows=1) as engine:
            gone = engine.submit([row_of(tiny, 0, 100, stop_ids=())], streams=True)
            waits = engine.submit([row_of(tiny, 1, 3)])
            dropped = engine.submit([row_of(tiny, 1, 3)])
            dropped.is_gone = True
            async for _ in gone.progress():
                gone.is_gone = True
            await waits.end()
            assert 1 <= len(gone.jobs[0].new) < 100
            assert len(waits.jobs[0].new) == 3
            await engine.alone(lambda: None)
            assert dropped.jobs[0].new == []

    in_a_loop(body)


def test_what_nobody_waits_for_any_more_takes_no_place_in_the_queue(tiny: Model) -> None:
    async def body() -> None:
        async with started(tiny, rows=1, queue_length=2) as engine:
            running = engine.submit([row_of(tiny, 0, 100, stop_ids=())], streams=True)
            progress = running.progress()
            await anext(progress)
            gone = engine.submit([row_of(tiny, 1, 3)] * 2)
            with pytest.raises(Busy):
                engine.submit([row_of(tiny, 1, 3)])
            gone.is_gone = True
            for _ in range(3):  # tokens of the running text
                await anext(progress)
            assert engine.waiting == 0
            asked = engine.submit([row_of(tiny, 1, 3)] * 2)
            running.is_gone = True
            await asked.end()
            assert gone.jobs[0].new == []

    in_a_loop(body)


def test_only_so_many_wait(tiny: Model) -> None:
    async def body() -> None:
        async with started(tiny, rows=1, queue_length=2) as engine:
            held = threading.Event()
            call = asyncio.ensure_future(engine.alone(lambda: held.wait(60)))
            await asyncio.sleep(0.2)  # the thread is in the call
            lone = engine.submit([row_of(tiny, 0, 1)] * 3)  # more than may wait, but none waits
            with pytest.raises(Busy):
                engine.submit([row_of(tiny, 0, 1)])
            with pytest.raises(Busy):
                await engine.alone(lambda: None)
            held.set()
            await call
            await lone.end()
            await engine.submit([row_of(tiny, 0, 1)]).end()

    in_a_loop(body)


def test_an_error_ends_the_running_texts_only(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a lack of memory. The thread continues."""

    def fail(name: str, tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError("too large")

    async def body() -> None:
        async with started(tiny) as engine:
            fails: Tap = fail
            asked = [engine.submit([row_of(tiny, 0, 5, tap=tap)]) for tap in (fails, no_tap)]
            with pytest.raises(MemoryError, match="too large"):
                await asked[0].end()
            await asyncio.sleep(0.1)
            later = engine.submit([row_of(tiny, 0, 5)])
            await later.end()
            assert len(later.jobs[0].new) == 5

    in_a_loop(body)
    assert "MemoryError" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["is_over", "on_logits"])
def test_an_error_of_one_text_ends_that_text_only(tiny: Model, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> bool:
        raise UserError("not this one")

    async def body() -> None:
        async with started(tiny) as engine:
            asked = [engine.submit([row_of(tiny, 0, 5, **more)]) for more in ({}, {field: fail})]
            with pytest.raises(UserError, match="not this one"):
                await asked[1].end()
            await asked[0].end()
            assert len(asked[0].jobs[0].new) == 5
            assert len(asked[1].jobs[0].new) == 1

    in_a_loop(body)
    assert "not this one" in capsys.readouterr().err


def test_closing_ends_what_runs_and_takes_nothing_new(tiny: Model) -> None:
    async def body() -> None:
        async with started(tiny, rows=1) as engine:
            asked = [engine.submit([row_of(tiny, 0, 400, stop_ids=())]) for _ in range(2)]
            while not asked[0].jobs[0].new:
                await asyncio.sleep(0.001)
            call = asyncio.ensure_future(engine.alone(lambda: None))
            await asyncio.sleep(0)
            engine.stop()
            with pytest.raises(Closed):  # from now on
                engine.submit([row_of(tiny, 0, 1)])
        for one in [*(one.end() for one in asked), call]:
            with pytest.raises(Closed):
                await one
        with pytest.raises(Closed):
            engine.submit([row_of(tiny, 0, 1)])

    in_a_loop(body)
