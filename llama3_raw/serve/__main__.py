"""python -m llama3_raw.serve: the server, as parser.py says."""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar
from urllib.parse import quote

from ..cli.entry_point import answer_help
from .parser import DEFAULT_CONTEXT, KEY_VARIABLE, build_parser

answer_help(__name__, build_parser)

from ..backends.cpu import MAX_DECODE_ROWS
from ..batch.requests import model_name
from ..cli.entry_point import command_line_tool
from ..cli.memory_plan import MemoryPlan, RunShape, available, needed
from ..cli.models import ChosenModel, choose_model, load_model
from ..cli.options import check_context, chosen_stop_ids
from ..errors import UserError, needed_package

T = TypeVar("T")


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    options = build_parser().parse_args(arguments)
    key = _key(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # also of a server that has ended in an orderly way
    for name in ("uvicorn", "starlette", "prometheus_client"):
        needed_package(name, "the server", "serve")
    with _listener(options.host, options.port) as listener:  # taken before the model is loaded
        _serve(options, key, listener)
    return 0


def _serve(options: argparse.Namespace, key: str | None, listener: socket.socket) -> None:
    """Load the model, and serve it until a signal."""
    from .app import build_app
    from .engine import Engine
    from .guard import Settings
    from .http_server import serve

    chosen = choose_model(options)
    assert chosen.tokenizer is not None  # checked by choose_model
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    context = options.context or min(DEFAULT_CONTEXT, longest)
    settings = Settings(
        api_key=key,
        allow_hosts=frozenset(name.lower() for name in options.allow_host),
        allow_origins=frozenset(options.allow_origin),
        max_body=options.max_body,
        timeout=options.timeout,
        template=options.template,
        stop_ids=chosen_stop_ids(options, chosen.tokenizer, chosen.checkpoint.params.vocab_size),
    )
    shape = _shape(chosen, context, options.rows)
    name = model_name(chosen)

    def load() -> tuple[Engine, str]:
        model, ops, which = load_model(chosen, shape)
        more = {"queue_length": options.queue, "load_python": load_python(options, chosen)}
        return Engine(model, ops, name=name, rows=shape.rows, context=context, **more), which

    engine, which = _in_a_thread_that_ends(load)
    app = build_app(engine, settings)
    print(f"llama3_raw: {which}", file=sys.stderr)
    url = _url(listener)
    print(f"llama3_raw: {name} at {url}, {shape.rows} texts of {context} tokens at a time", file=sys.stderr)
    if options.open:
        page = f"{url}#key={quote(key, safe='')}" if key else url
        print(f"llama3_raw: the page: {page}", file=sys.stderr)
        # a browser may stay in the foreground until it is closed, and the page needs a server meanwhile
        threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
    serve(app, listener, options.grace, engine.stop)


def _in_a_thread_that_ends(load: Callable[[], T]) -> T:
    """Return what load() returns or raises.

    A thread that lives keeps the OpenMP threads that it computed with, and with more than cores all wait asleep. Ctrl-C
    and SIGTERM end this one after the operation that it is in: left alone, it would abort the process at its end.
    """
    loaded: Future[T] = Future()

    def run() -> None:
        try:
            result = load()
        except BaseException as error:  # raised where the result is asked for
            loaded.set_exception(error)
        else:
            loaded.set_result(result)

    thread = threading.Thread(target=run)
    try:
        thread.start()
        while not loaded.done():
            wait([loaded], timeout=0.5)  # on Windows, Ctrl-C does not end a longer one
        return loaded.result()
    except (KeyboardInterrupt, SystemExit):
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
        raise
    finally:
        thread.join()


def _key(options: argparse.Namespace) -> str | None:
    """Return the key. Raises UserError if there is none, and others than this machine may ask."""
    key: str | None = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"--api-key or ${KEY_VARIABLE}: should be ASCII characters without spaces, for an HTTP header")
    if key is None and not _is_loopback(options.host):
        raise UserError(f"--host {options.host}: others can reach it, so it needs --api-key KEY or ${KEY_VARIABLE}")
    return key


def load_python(options: argparse.Namespace, chosen: ChosenModel) -> str:
    """Return the Python that loads the model as it is served."""
    arguments = {
        "device": None if chosen.device.type == "cpu" else str(chosen.device),
        "dtype": chosen.dtype,
        "layers": options.layers,
        "tokenizer": options.tokenizer,
        "quantize": chosen.quantize,
        "gpu_layers": chosen.gpu_layers,
        "format": options.format,
        "adapter": options.adapter,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    texts = [f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in given.items()]
    return f"llama3_raw.load({', '.join([json.dumps(str(chosen.folder.path)), *texts])})"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UserError if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from error


def _shape(chosen: ChosenModel, context: int, rows: int | None) -> RunShape:
    """Return the shape of the batch: without --rows at most 16, as many as leave the weights in memory.

    If the weights are larger than the memory by themselves, as many as fit. Raises UserError for --rows that do not
    fit, where fewer do; `load_model` raises it where not even one fits.
    """
    most = RunShape(prompt=context, text=context, least=1, rows=rows or MAX_DECODE_ROWS, generated=context)

    def halved(with_mapped: bool) -> RunShape | None:
        shape = most
        while not _fits(chosen, shape, with_mapped):
            if shape.rows == 1:
                return None
            shape = shape._replace(rows=shape.rows // 2)
        return shape

    if rows is None:
        plan = _plan(chosen, one := most._replace(rows=1))
        fits_alone = needed(plan).mapped <= available(plan)
        return halved(with_mapped=True) or (None if fits_alone else halved(with_mapped=False)) or one
    fitting = halved(with_mapped=False)
    if fitting and fitting.rows < rows:
        raise UserError(
            f"--rows {rows}: a cache for {rows} texts of {context} tokens does not fit into memory; give --rows "
            f"{fitting.rows}, or a smaller --context"
        )
    return most


def _plan(chosen: ChosenModel, shape: RunShape) -> MemoryPlan:
    _, checkpoint, _, device, dtype, max_ram, quantize, gpu_layers, *_ = chosen
    return MemoryPlan(checkpoint, device, dtype, shape, max_ram, quantize, gpu_layers)


def _fits(chosen: ChosenModel, shape: RunShape, with_mapped: bool) -> bool:
    plan = _plan(chosen, shape)
    need = needed(plan)
    total = need.allocated + (need.mapped if with_mapped and chosen.device.type == "cpu" else 0)
    return total <= 0.9 * available(plan)  # which other programs may change


def _url(listener: socket.socket) -> str:
    """Return the URL of the server; for 0.0.0.0, with the address that others in the network see."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = _own_address(listener.family)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _own_address(family: int) -> str:
    """Return this machine's address towards other networks, or the loopback address; nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1" if family == socket.AF_INET else "::1"


if __name__ == "__main__":
    sys.exit(main())
