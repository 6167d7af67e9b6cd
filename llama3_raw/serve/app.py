"""`build_app`: the routes of the server, behind the checks of every request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import UserError
from . import live
from .api import Api, NoSuchModel
from .engine import Busy, Closed, Engine
from .guard import Guard, Settings, error_body


def build_app(engine: Engine, settings: Settings = Settings()) -> Starlette:
    """Return the server's application, which starts the engine, and ends it.

    Raises UserError for a model without a tokenizer, and for a template that cannot be used.
    """

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": engine.name})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(engine.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        *Api(engine, settings).routes(),
        *live.routes(engine, settings.timeout),
    ]
    paths = frozenset(route.path for route in routes if not route.param_convertors)
    middleware = [Middleware(Guard, settings=settings, metrics=engine.metrics, paths=paths)]
    if settings.allow_origins:  # it answers the browser's question before a request, which has no key
        cors = Middleware(
            CORSMiddleware, allow_origins=[*settings.allow_origins], allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    handlers = {HTTPException: _refused, UserError: _wrong, Busy: _busy, Closed: _closed, Exception: _failed}
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={**handlers, ClientDisconnect: _gone},
    )


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, headers=headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        message = "there is no such path; see /openapi.json"
    if error.status_code == 405:
        message = f"{request.url.path} is not for {request.method}; see /openapi.json"
    param, code = ("model", "model_not_found") if isinstance(error, NoSuchModel) else (None, None)
    return _error(error.status_code, message, param, code, error.headers)


async def _wrong(request: Request, error: Exception) -> Response:
    return _error(400, str(error), error.argument if isinstance(error, UserError) else None)


async def _busy(request: Request, error: Exception) -> Response:
    return _error(429, str(error), headers={"Retry-After": "1"})


async def _closed(request: Request, error: Exception) -> Response:
    return _error(503, str(error))


async def _failed(request: Request, error: Exception) -> Response:
    return _error(500, "the answer could not be computed; the server's own output says why")


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
