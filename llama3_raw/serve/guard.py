"""`Guard`: what every request is checked for before anything else: its host, origin, key and size."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

LARGE_BODY = 10_000  # bytes of JSON, which take long to parse
_TO_READ = 10.0  # seconds for a slow reader after an answer has timed out


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    api_key: None asks for none. allow_hosts: names that a Host header may have besides localhost and addresses.
    allow_origins: pages of other hosts that may ask. max_body: bytes. timeout: seconds for a whole answer, and for its
    request to arrive. template: the dialog format; None takes the model's own. stop_ids: tokens that end a text besides
    the model's own.
    """

    api_key: str | None = None
    allow_hosts: frozenset[str] = frozenset()
    allow_origins: frozenset[str] = frozenset()
    max_body: int = 4_000_000
    timeout: float = 600.0
    template: str | None = None
    stop_ids: frozenset[int] = frozenset()


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """Return an error in OpenAI's form, its message on one line."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(message.split()))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware that refuses what the settings do not allow.

    A page elsewhere whose name is made to point to this machine (DNS rebinding) has that name as its Host; one that
    sends a form here has an Origin of its own. Both are refused before anything is read.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: frozenset[str]):
        """paths: those that metrics name, besides those of models; all others are counted together."""
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or pass the request on with a body of limited size."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._counted(scope["path"], send)
        headers = Headers(scope=scope)
        refused = self._refused(scope, headers)
        if refused is not None:
            status, message = refused
            response = JSONResponse(error_body(status, message), status)
            if status == 401:
                response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Return the status and reason of a request that is not allowed, or None."""
        settings, host = self._settings, headers.get("host", "")
        if not _is_local_name(host, settings.allow_hosts):
            return 421, f"this server does not answer to the host {host[:100]!r}; start it with --allow-host NAME"
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != host and origin not in settings.allow_origins:
            return 403, f"pages of {origin[:100]!r} may not use this server; start it with --allow-origin ORIGIN"
        if settings.api_key is not None and not _is_public(scope):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), settings.api_key.encode())
            if not right:
                return 401, "the key is missing or wrong; send the header Authorization: Bearer KEY"
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:18]) > settings.max_body:
            return 413, _too_large(settings.max_body)
        return None

    def _counted(self, path: str, send: Send) -> Send:
        """Return `send`, which counts the answer."""
        if path not in self._paths:  # what a client makes up is no label
            path = "/v1/models/NAME" if path.startswith("/v1/models/") else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        return counted

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive`, which refuses a body that is too large, as one in chunks does not say, or too slow."""
        total, is_whole = 0, False
        deadline = time.monotonic() + self._settings.timeout

        async def limited() -> Message:
            nonlocal total, is_whole
            if is_whole:  # now it waits until the client goes away
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "the body did not arrive in time; send it again") from error
            total += len(message.get("body", b""))
            if total > self._settings.max_body:
                raise HTTPException(413, _too_large(self._settings.max_body))
            is_whole = not message.get("more_body", False)
            return message

        return limited


class TimedStream(StreamingResponse):
    """A stream to a reader that takes it in time."""

    def __init__(self, parts: AsyncIterator[str], media_type: str, seconds: float, headers: Mapping[str, str]):
        super().__init__(parts, media_type=media_type, headers=headers)
        self._seconds = seconds + _TO_READ

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a reader that is too slow gets no more."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes; send a shorter one, or start the server with --max-body"


def _is_public(scope: Scope) -> bool:
    """Whether a path needs no key: the page, which holds none until its user gives it one, and the state of health."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/page/"))


def _host_of(origin: str) -> str | None:
    """Return the host and port of an Origin header, or None if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_local_name(host: str, allowed: frozenset[str]) -> bool:
    """Whether a Host header, with or without a port, is an address, localhost, or an allowed name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name in allowed:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
