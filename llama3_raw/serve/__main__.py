"""Serve a model: OpenAI's API, and a page to look inside it, at http://127.0.0.1:8000/."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

from ..backends.cpu import MAX_DECODE_ROWS
from ..batch.requests import model_name
from ..cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ..cli.memory_plan import MemoryPlan, RunShape, available, needed
from ..cli.models import ChosenModel, choose_model, load_model
from ..cli.options import (
    add_model_options,
    add_stop_token_option,
    add_template_option,
    byte_size,
    check_context,
    chosen_stop_ids,
    positive_int,
)
from ..errors import UserError, needed_package

_DEFAULT_CONTEXT = 4096  # tokens of a text
_KEY_VARIABLE = "LLAMA3_RAW_API_KEY"


def build_parser() -> ArgumentParser:
    """Return the parser of `python -m llama3_raw.serve`."""
    parser = ArgumentParser(prog="python -m llama3_raw.serve", description=__doc__)
    parser.add_argument("--open", action="store_true", help="open the page in the browser, and print its URL")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        type=not_empty,
        metavar="ADDRESS",
        help="where to listen; any but the default needs --api-key, 0.0.0.0 is for everybody in the network "
        "(default: %(default)s)",
    )
    parser.add_argument("--port", default=8000, type=_port, metavar="N", help="0: a free one (default: %(default)s)")
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--api-key", type=not_empty, metavar="KEY", help=f"what requests must know (default: ${_KEY_VARIABLE}, or none)"
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        type=not_empty,
        metavar="NAME",
        help="answer to this name, too, besides localhost and addresses (repeatable)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        type=_origin,
        metavar="ORIGIN",
        help="let pages of e.g. https://example.org ask (repeatable)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--rows",
        type=positive_int,
        metavar="N",
        help=f"texts in the batch (default: {MAX_DECODE_ROWS}, or as many as fit into memory)",
    )
    group.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help=f"tokens of a text, prompt included (default: the model's context, at most {_DEFAULT_CONTEXT})",
    )
    group.add_argument(
        "--queue", type=positive_int, default=256, metavar="N", help="texts that may wait (default: %(default)s)"
    )
    group.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="S", help="seconds for an answer (default: %(default)g)"
    )
    group.add_argument(
        "--max-body", type=byte_size, default=4_000_000, metavar="SIZE", help="of a request (default: 4MB)"
    )
    group.add_argument(
        "--grace",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds for running answers after SIGTERM or Ctrl-C (default: %(default)g)",
    )
    group = parser.add_argument_group("text")
    add_stop_token_option(group)
    add_template_option(group)
    add_model_options(parser)
    return parser


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
    import uvicorn

    from .app import build_app
    from .engine import Engine
    from .guard import Settings

    chosen = choose_model(options)
    assert chosen.tokenizer is not None  # checked by choose_model
    longest = chosen.checkpoint.params.max_seq_len
    check_context(options.context, longest)
    context = options.context or min(_DEFAULT_CONTEXT, longest)
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
    model, ops, which = load_model(chosen, shape)
    name = model_name(chosen)
    engine = Engine(
        model,
        ops,
        name=name,
        rows=shape.rows,
        context=context,
        queue_length=options.queue,
        load_python=load_python(options, chosen),
    )
    config = uvicorn.Config(
        build_app(engine, settings),
        http="h11",
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.grace)),
    )
    print(f"llama3_raw: {which}", file=sys.stderr)
    url = _url(listener)
    print(f"llama3_raw: {name} at {url}, {shape.rows} texts of {context} tokens at a time", file=sys.stderr)
    if options.open:
        page = f"{url}#key={quote(key, safe='')}" if key else url
        print(f"llama3_raw: the page: {page}", file=sys.stderr)
        webbrowser.open(page)
    uvicorn.Server(config).run(sockets=[listener])


def _key(options: argparse.Namespace) -> str | None:
    """Return the key. Raises UserError if there is none, and others than this machine may ask."""
    key: str | None = options.api_key or os.environ.get(_KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"--api-key or ${_KEY_VARIABLE}: should be ASCII characters without spaces, for an HTTP header")
    if key is None and not _is_loopback(options.host):
        raise UserError(f"--host {options.host}: others can reach it, so it needs --api-key KEY or ${_KEY_VARIABLE}")
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
    """Return the shape of the batch: without --rows, with as many rows as fit into memory, and at most 16.

    Raises UserError for --rows that do not fit, where fewer do; `load_model` raises it where not even one fits.
    """
    shape = RunShape(prompt=context, text=context, least=1, rows=rows or MAX_DECODE_ROWS, generated=context)
    while shape.rows > 1 and not _fits(chosen, shape):
        shape = shape._replace(rows=shape.rows // 2)
    if rows is not None and shape.rows < rows and _fits(chosen, shape):
        raise UserError(
            f"--rows {rows}: a cache for {rows} texts of {context} tokens does not fit into memory; give --rows "
            f"{shape.rows}, or a smaller --context"
        )
    return shape


def _fits(chosen: ChosenModel, shape: RunShape) -> bool:
    _, checkpoint, _, device, dtype, max_ram, quantize, gpu_layers, *_ = chosen
    plan = MemoryPlan(checkpoint, device, dtype, shape, max_ram, quantize, gpu_layers)
    return needed(plan).allocated <= 0.9 * available(plan)  # which other programs may change


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


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"should be from 0 to 65535, is {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"should be seconds above 0, is {text}")
    return value


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"should be such as https://example.org, without a path, is {text!r}")
    return text


if __name__ == "__main__":
    sys.exit(main())
