"""The live page."""

from __future__ import annotations

from starlette.routing import Route

from .engine import Engine


def routes(engine: Engine) -> list[Route]:
    """Return the routes of the page, `/` and `/page/…`, which need no key, and of what it asks for, `/live/…`."""
    return []
