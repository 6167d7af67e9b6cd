"""`serve`: an application over HTTP, by uvicorn, until a signal."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

_TO_ANSWER = 2  # seconds for the errors that answers get at the end


class Server(uvicorn.Server):
    """A server that, after a signal, lets the answers go on for `grace` seconds, and then calls `stop`."""

    def __init__(self, config: uvicorn.Config, grace: float, stop: Callable[[], None]):
        config.timeout_graceful_shutdown = math.ceil(grace) + _TO_ANSWER  # whatever has not ended then is cut off
        super().__init__(config)
        self._grace, self._stop = grace, stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers, and end."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._stop)
        await super().shutdown(sockets)
        timer.cancel()


def serve(app: ASGIApp, listener: socket.socket, grace: float, stop: Callable[[], None]) -> None:
    """Serve until a signal; then as `Server` does."""
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="on", log_level="error", access_log=False, server_header=False
    )
    # a request that is cut off is no defect, which a traceback is for
    logging.getLogger("uvicorn.error").addFilter(lambda record: not _is_cut_off(record))
    Server(config, grace, stop).run(sockets=[listener])


def _is_cut_off(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
