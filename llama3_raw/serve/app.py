"""`build_app`: the routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ..errors import UserError
from . import api, live
from .engine import Engine
from .guard import Guard, Settings, error_body


def build_app(engine: Engine, settings: Settings = Settings()) -> Starlette:
    """Return the server's application. It starts the engine, and ends it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    middleware = [Middleware(Guard, settings=settings)]
    if settings.allow_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=[*settings.allow_origins], allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    routes: list[BaseRoute] = [
        Route("/health", lambda request: JSONResponse({"status": "ok", "model": engine.name})),
        Route(
            "/metrics",
            lambda request: Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST),
        ),
        *api.routes(engine, settings),
        *live.routes(engine),
    ]
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            HTTPException: _http_error,
            UserError: _user_error,
        },
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code, headers=error.headers)


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return JSONResponse(error_body(400, str(error), error.argument), 400)
