"""`Engine`: one model in one thread of its own, which continues all texts that arrive, together.

The thread runs `decode`. Between two passes it takes in texts that have arrived, and calls of `alone`. Everything else
of the server runs in the event loop, and touches no tensor.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..decoding.batch import Row, text_of
from ..decoding.logprobs import ScoredRow
from ..decoding.loop import OnLogits, StopReason, Text, decode, tokens_to_stop_at
from ..decoding.runner import BatchRunner
from ..model import KVCache
from ..ops import Ops
from ..weights import Model
from .metrics import Metrics

Result = TypeVar("Result")


class Busy(Exception):
    """As many texts wait as may wait."""

    def __init__(self) -> None:
        super().__init__("too many texts wait; ask again in a second")


class Closed(Exception):
    """The engine ends, and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the server is about to end")


class Job:
    """A text that the engine continues. Its thread alone writes the fields.

    new: the tokens so far. scored: their scores, if asked for. ended: why the text ended; None before. error: what
    went wrong with this text only, which then ends.
    """

    def __init__(self, asked: Asked, row: Row, scored: ScoredRow | None):
        self.asked = asked
        self.new: list[int] = []
        self.scored = scored
        self.ended: StopReason | Exception | None = None
        self.error: Exception | None = None
        self.row = row._replace(is_over=lambda new: asked.is_gone or self._guarded(row.is_over, new))
        if row.on_logits is not None:
            self.row = self.row._replace(on_logits=self._on_logits(row.on_logits))
        self.arrived = time.perf_counter()

    def _on_logits(self, function: OnLogits) -> OnLogits:
        def guarded(logits: Tensor, token: int) -> None:
            self._guarded(function, logits, token)

        return guarded

    def _guarded(self, function: Callable[..., bool | None], *values: Any) -> bool:
        """Call a function of the text; return whether the text is over, as it is after an error, which is kept."""
        try:
            return self.error is not None or bool(function(*values))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.error = error
            return True


class Asked:
    """The texts of one request, which `Engine.submit` returns. It belongs to the event loop.

    is_gone: whether nobody reads them any more. A text then ends after its next token.
    """

    def __init__(self, streams: bool):
        """streams: whether the reader is told of each token, or only of the end of a text."""
        self.jobs: list[Job] = []
        self.streams = streams
        self.is_gone = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Wake the reader, from the engine's thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def progress(self) -> AsyncIterator[None]:
        """Yield whenever a text has changed, until all have ended. Raises what ended one, if it was an error."""
        are_over = False
        while not are_over:
            await self._changed.wait()
            self._changed.clear()
            for job in self.jobs:
                if isinstance(job.ended, Exception):
                    raise job.ended
            are_over = all(job.ended is not None for job in self.jobs)  # then all of their tokens are there
            yield

    async def end(self) -> None:
        """Wait until all texts have ended."""
        async for _ in self.progress():
            pass


class _Call(NamedTuple):
    """A function that waits for the model's thread, and what its caller waits for."""

    future: asyncio.Future[Any]
    run: Callable[[], None]


class Engine:
    """A model that continues up to `rows` texts of `context` tokens at a time, in a thread of its own.

    `queue_length` texts may wait. `load_python` is the Python that loads the model, for the page. Raises UserError
    if the cache does not fit into memory.
    """

    def __init__(
        self,
        model: Model,
        ops: Ops,
        *,
        name: str,
        rows: int,
        context: int,
        queue_length: int = 256,
        load_python: str = "",
    ):
        self.load_python = load_python
        self.model, self.ops, self.name, self.rows, self.context = model, ops, name, rows, context
        self.queue_length = queue_length
        self.metrics = Metrics()
        cache = KVCache.allocate(model.params, max_seq_len=context, like=model.weights, batch=(rows,))
        self._runner = BatchRunner(model, cache, ops)
        self._inbox: queue.SimpleQueue[Job | _Call | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._calls: deque[_Call] = deque()
        self._running: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._changed: set[Asked] = set()
        self._is_closed = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after the pass that it computes; texts that have not ended get `Closed`."""
        self._is_closed = True
        self._inbox.put(None)  # wakes it

    def close(self) -> None:
        """Stop the thread, and wait for its end."""
        self.stop()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """The number of texts and calls that wait."""
        return len(self._waiting) + len(self._calls) + self._inbox.qsize()

    def submit(
        self, rows: Sequence[Row], *, n_top: int | None = None, with_prompt: bool = False, streams: bool = False
    ) -> Asked:
        """Give the engine texts that fit into its context, from the event loop. Raises Busy, or Closed.

        n_top: score the new tokens, with this many alternatives; with_prompt: those of the prompt too. streams: whether
        the reader is told of each token, or only of the end.
        """
        self.check_open(len(rows))
        asked = Asked(streams)
        for row in rows:
            scored = None
            if n_top is not None:
                scored = ScoredRow(row, n_top, (self.model, self.ops) if with_prompt else None)
            asked.jobs.append(Job(asked, scored.row if scored else row, scored))
        for job in asked.jobs:
            self._inbox.put(job)
        return asked

    def check_open(self, count: int = 1) -> None:
        """Raise Closed or Busy unless `count` more may wait. A request that finds none waiting is always taken."""
        if self._is_closed or not self._thread.is_alive():
            raise Closed
        if self.waiting and self.waiting + count > self.queue_length:
            raise Busy

    async def alone(self, function: Callable[[], Result]) -> Result:
        """Call a function in the model's thread, between two passes; return its result, or raise what it raises.

        Raises Busy or Closed as `submit` does.
        """
        self.check_open(1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(method: Callable[[Any], None], value: Any) -> None:
            if not future.done():  # cancelled: the caller went away
                method(value)

        def run() -> None:
            try:
                if self._is_closed:
                    raise Closed
                result = function()
            except BaseException as error:
                loop.call_soon_threadsafe(settle, future.set_exception, error)
            else:
                loop.call_soon_threadsafe(settle, future.set_result, result)

        self._inbox.put(_Call(future, run))
        return await future

    def _work(self) -> None:
        """Decode until the engine is closed. An error, such as a lack of memory, ends the running texts only."""
        torch.set_num_threads(self._threads)  # OpenMP counts them for each thread
        while not self._is_closed:
            error: Exception
            try:
                for number, event in decode([], self._runner, self._arrivals):
                    self._take(self._running[number], event)
                    if isinstance(event, StopReason):
                        del self._running[number]
            except Closed as caught:
                error = caught
            except Exception as caught:
                traceback.print_exc(file=sys.stderr)
                error = caught
            for job in self._running.values():
                self._end(job, error)
            self._running.clear()
            self._tell()
        self._receive(waits=False)
        for job in self._waiting:
            self._end(job, Closed())
        for call in self._calls:  # which only raise Closed now
            call.run()
        self._tell()

    def _arrivals(self, running: int) -> list[Text]:
        """Return the texts that join the running ones; wait for one if there are none. Raises Closed."""
        self._tell()
        while True:
            self.metrics.running.set(running)
            self._receive(waits=not (running or self._waiting or self._calls or self._is_closed))
            if self._is_closed:
                raise Closed
            if self._calls:
                self._calls.popleft().run()  # one between two passes, so that the texts go on
            joining: list[Text] = []
            while self._waiting and running + len(joining) < self.rows:
                joining.append(self._text(self._waiting.popleft()))
            self.metrics.waiting.set(len(self._waiting))
            if running or joining:
                self.metrics.running.set(running + len(joining))
                return joining

    def _receive(self, waits: bool) -> None:
        """Sort what has arrived, without what nobody waits for any more; wait first if there is nothing."""
        while waits or not self._inbox.empty():
            item = self._inbox.get()
            waits = False
            if isinstance(item, Job):
                self._waiting.append(item)
            elif item is not None:
                self._calls.append(item)
        self._waiting = deque(job for job in self._waiting if not job.asked.is_gone)
        self._calls = deque(call for call in self._calls if not call.future.cancelled())

    def _text(self, job: Job) -> Text:
        number = next(self._numbers)
        self._running[number] = job
        self.metrics.prompt_tokens.inc(len(job.row.ids))
        limit = max(self.context, len(job.row.ids) + 1)  # the last token of a text needs no place in the cache
        return text_of(self.model, number, job.row, limit, tokens_to_stop_at(self.model, None))

    def _take(self, job: Job, event: int | StopReason) -> None:
        if isinstance(event, StopReason):
            self._end(job, job.error or event)
            return
        if not job.new:
            self.metrics.first_token.observe(time.perf_counter() - job.arrived)
        job.new.append(event)
        self.metrics.count_token()
        if job.asked.streams:
            self._changed.add(job.asked)

    def _end(self, job: Job, reason: StopReason | Exception) -> None:
        job.ended = reason
        self.metrics.whole_text.observe(time.perf_counter() - job.arrived)
        self._changed.add(job.asked)

    def _tell(self) -> None:
        """Wake the readers of the texts that changed."""
        for asked in self._changed:
            asked.notify()
        self._changed.clear()
