"""A server with the live page, for its tests, over real HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from llama3_raw import REFERENCE, Model
from llama3_raw.serve.app import build_app
from llama3_raw.serve.engine import Engine
from llama3_raw.serve.guard import Settings
from tests.paths import TINY


@contextlib.contextmanager
def serving(model: Model, **settings: Any) -> Iterator[str]:
    """Serve a model, and yield the address."""
    engine = Engine(model, REFERENCE, name="tiny", load_python=f'llama3_raw.load("{TINY}")', rows=2, context=64)
    app = build_app(engine, Settings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
