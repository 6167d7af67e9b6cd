"""A server with the live page, for its tests: real HTTP, and an engine of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import uvicorn
from starlette.applications import Starlette

from llama3_raw import Model
from llama3_raw.serve.live import routes
from tests.paths import TINY

Result = TypeVar("Result")


class OneThread:
    """An engine that runs one call at a time."""

    name = "tiny"
    source = str(TINY)

    def __init__(self, model: Model):
        self.model = model
        self._lock = threading.Lock()

    async def alone(self, function: Callable[[], Result]) -> Result:
        def call() -> Result:
            with self._lock:
                return function()

        return await asyncio.to_thread(call)


@contextlib.contextmanager
def serving(model: Model) -> Iterator[str]:
    """Serve the page with this model, and yield the address."""
    config = uvicorn.Config(Starlette(routes=routes(OneThread(model))), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
