"""The live page at `/` and the JSON under `/live/` that it asks for.

All state is in the page: each request brings the token ids and the changes, so any number of pages share one model
and none disturbs another. A pass reads the weights once however many tokens it has, so that a prompt of a sentence
takes about as long as one token with a cache, which would be state.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import UserError, in_short
from ..weights import dtype_name, tensor_specs
from .engine import Busy, Closed, Engine
from .guard import LARGE_BODY, TimedStream
from .live_pass import MAX_TOKENS, PassRequest, read_request, run_pass, token_json

Result = TypeVar("Result")

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
_MODEL_HEADER = "Model-Id"
_LARGE = 500_000_000  # multiplications for a token, the logit lens included; from here on the lens begins closed


def routes(engine: Engine, timeout: float) -> list[Route]:
    """Return the routes of the page; a pass may take `timeout` seconds.

    `/` and `/page/` hold no secret: a page must load before it can send a key.
    """
    files = {f"/page/{file.name}": file for file in sorted(_PAGE.iterdir()) if file.suffix in _TYPES}
    files["/page/base.css"] = _SHARED / "base.css"
    facts = _facts(engine)
    return [
        Route("/", partial(_file, _PAGE / "index.html", "text/html"), methods=["GET"]),
        *(Route(path, partial(_file, file, _TYPES[file.suffix]), methods=["GET"]) for path, file in files.items()),
        Route("/live/model", partial(_model, facts), methods=["GET"]),
        Route("/live/tokens", partial(_tokens, engine, facts["id"]), methods=["POST"]),
        Route("/live/pass", partial(_pass, engine, facts["id"], timeout), methods=["POST"]),
    ]


async def _file(file: Path, media_type: str, _: Request) -> Response:
    return Response(file.read_bytes(), media_type=media_type, headers=_HEADERS)


def _facts(engine: Engine) -> dict[str, Any]:
    """Return what the page says of the model, with an id by which its requests name it."""
    params, weights = engine.model.params, engine.model.weights
    is_tied = weights.output is weights.tok_embeddings
    n_weights = sum(math.prod(spec.shape) for spec in tensor_specs(params, is_tied))
    facts = {
        "name": engine.name,
        "load": engine.load_python,
        "n_weights": n_weights,
        "is_large": n_weights + (params.n_layers + 1) * params.vocab_size * params.dim >= _LARGE,
        "max_tokens": min(MAX_TOKENS, params.max_seq_len),
        "dtype": dtype_name(weights.norm.dtype),
        **{name: getattr(params, name) for name in ("n_layers", "n_heads", "vocab_size")},
    }
    return {**facts, "id": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}


async def _model(facts: dict[str, Any], _: Request) -> Response:
    return JSONResponse(facts)


def _check_model(model_id: str, request: Request) -> None:
    """Raise UserError if a page asks that has loaded the facts of another model, before the server was restarted."""
    if request.headers.get(_MODEL_HEADER, model_id) != model_id:
        raise UserError("the server has another model now; reload the page")


async def _tokens(engine: Engine, model_id: str, request: Request) -> Response:
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None  # build_app refuses a model without one
    _check_model(model_id, request)

    def read(body: Any) -> list[dict[str, Any]]:
        if not isinstance(body, dict) or not isinstance(body.get("text"), str):
            raise UserError("text: should be a string")
        text = body["text"].encode("utf-8", "replace").decode()  # half of a pair of surrogates is no text
        if len(text) > 100 * MAX_TOKENS:  # no token is so long
            raise UserError(
                f"text: has {len(text)} characters, but the page takes {MAX_TOKENS} tokens; shorten the prompt"
            )
        return [token_json(tokenizer, token) for token in tokenizer.encode(text, bos=True)]

    return JSONResponse({"tokens": await _read(request, read)})


async def _pass(engine: Engine, model_id: str, timeout: float, request: Request) -> Response:
    _check_model(model_id, request)
    wanted = await _read(request, partial(read_request, params=engine.model.params))
    engine.check_open()  # while the answer can still have a status, upon which the page asks again
    return TimedStream(_lines(engine, wanted, timeout), "application/x-ndjson", timeout, _HEADERS)


async def _read(request: Request, read: Callable[[Any], Result]) -> Result:
    """Return what `read` makes of the JSON in the body, or of None if it is none; of a large one in a thread."""
    content = await request.body()

    def work() -> Result:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        return read(body)

    return await asyncio.to_thread(work) if len(content) > LARGE_BODY else work()


def _error_line(message: str) -> str:
    return json.dumps({"error": {"message": message}}) + "\n"


class _GoneError(Exception):
    """The page no longer waits for the pass."""


async def _lines(engine: Engine, wanted: PassRequest, timeout: float) -> AsyncIterator[str]:
    """Yield a line of JSON now and then while the pass runs: progress, and in the end the result or an error."""
    deadline = time.monotonic() + timeout
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
        while (line := await asyncio.wait_for(lines.get(), deadline - time.monotonic())) is not None:
            yield json.dumps(line) + "\n"
        yield await running + "\n"
    except asyncio.TimeoutError:
        yield _error_line(f"the pass took longer than {timeout:g} s; close views, or ask again later")
    except (UserError, Busy, Closed) as error:
        yield _error_line(in_short(error))
    except Exception as error:  # a defect, or a lack of memory
        traceback.print_exc(file=sys.stderr)
        yield _error_line(f"the pass failed: {in_short(error)}")
    finally:
        gone.set()  # ends the pass at its next layer
        running.cancel()
