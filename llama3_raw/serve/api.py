"""OpenAI's API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from .engine import Engine
from .guard import Settings


def routes(engine: Engine, settings: Settings) -> list[Route]:
    """Return the routes of OpenAI's API."""

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": engine.name, "object": "model"}]})

    return [Route("/v1/models", models)]
