"""The live page at `/` and the JSON under `/live/` that it asks for.

All state is in the page: each request brings the token ids and the changes, so any number of pages share one model
and none disturbs another. A pass reads the weights once however many tokens it has, so that a prompt of a sentence
takes about as long as one token with a cache, which would be state.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import UserError, in_short
from ..weights import dtype_name, tensor_specs
from .engine import Closed, Engine
from .live_pass import MAX_TOKENS, PassRequest, read_request, run_pass, token_json

_PAGE = Path(__file__).parent / "page"
_SHARED = Path(__file__).parents[1] / "explain" / "page_parts"
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",  # the browser itself refuses any other host, and any script in the text
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PROGRESS_EVERY = 0.1  # seconds
_LARGE = 500_000_000  # multiplications for a token, the logit lens included; from here on the lens begins closed


def routes(engine: Engine) -> list[Route]:
    """Return the routes of the page. `/` and `/page/` hold no secret: a page must load before it can send a key."""
    files = {f"/page/{file.name}": file for file in sorted(_PAGE.iterdir()) if file.suffix in _TYPES}
    files["/page/base.css"] = _SHARED / "base.css"
    return [
        Route("/", partial(_file, _PAGE / "index.html", "text/html"), methods=["GET"]),
        *(Route(path, partial(_file, file, _TYPES[file.suffix]), methods=["GET"]) for path, file in files.items()),
        Route("/live/model", partial(_model, engine), methods=["GET"]),
        Route("/live/tokens", partial(_tokens, engine), methods=["POST"]),
        Route("/live/pass", partial(_pass, engine), methods=["POST"]),
    ]


async def _file(file: Path, media_type: str, _: Request) -> Response:
    return Response(file.read_bytes(), media_type=media_type, headers=_HEADERS)


async def _model(engine: Engine, _: Request) -> Response:
    params, weights = engine.model.params, engine.model.weights
    is_tied = weights.output is weights.tok_embeddings
    n_weights = sum(math.prod(spec.shape) for spec in tensor_specs(params, is_tied))
    return JSONResponse(
        {
            "name": engine.name,
            "load": engine.load_python,
            "n_weights": n_weights,
            "is_large": n_weights + (params.n_layers + 1) * params.vocab_size * params.dim >= _LARGE,
            "dtype": dtype_name(weights.norm.dtype),
            **{name: getattr(params, name) for name in ("n_layers", "n_heads", "vocab_size")},
        }
    )


async def _tokens(engine: Engine, request: Request) -> Response:
    body = await _json(request)
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None  # build_app refuses a model without one
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        return _error("text: should be a string")
    text = body["text"].encode("utf-8", "replace").decode()  # half of a pair of surrogates is no text
    if len(text) > 100 * MAX_TOKENS:  # no token is so long
        return _error(f"text: has {len(text)} characters, but the page takes {MAX_TOKENS} tokens; shorten the prompt")
    ids = tokenizer.encode(text, bos=True)
    return JSONResponse({"tokens": [token_json(tokenizer, token) for token in ids]})


async def _pass(engine: Engine, request: Request) -> Response:
    try:
        wanted = read_request(await _json(request), engine.model.params)
    except UserError as error:
        return _error(str(error))
    return StreamingResponse(_lines(engine, wanted), media_type="application/x-ndjson", headers=_HEADERS)


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        return None


def _error(message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, 400)


class _GoneError(Exception):
    """The page no longer waits for the pass."""


async def _lines(engine: Engine, wanted: PassRequest) -> AsyncIterator[str]:
    """Yield a line of JSON now and then while the pass runs: progress, and in the end the result or an error."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    gone = threading.Event()
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if gone.is_set():
            raise _GoneError
        if time.monotonic() - last >= _PROGRESS_EVERY:
            last = time.monotonic()
            loop.call_soon_threadsafe(lines.put_nowait, {"progress": [done, total]})

    def run() -> str:
        return json.dumps({"result": run_pass(engine.model, wanted, report)})

    running = asyncio.ensure_future(engine.alone(run))
    running.add_done_callback(lambda _: lines.put_nowait(None))
    try:
        while (line := await lines.get()) is not None:
            yield json.dumps(line) + "\n"
        yield await running + "\n"
    except (UserError, Closed) as error:
        message = "the server ends, and takes nothing new" if isinstance(error, Closed) else in_short(error)
        yield json.dumps({"error": {"message": message}}) + "\n"
    except Exception as error:  # a defect, or a lack of memory
        traceback.print_exc(file=sys.stderr)
        yield json.dumps({"error": {"message": f"the pass failed: {in_short(error)}"}}) + "\n"
    finally:
        gone.set()  # ends the pass at its next layer
        running.cancel()
