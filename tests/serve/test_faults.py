"""Clients that go away, read slowly or send nonsense; and the server's own end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from typing import Any

import httpx2 as httpx
import pytest

from .servers import Server, running


def connection_to(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def everything_from(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(100_000), b""))


def long_text(**fields: Any) -> dict[str, Any]:
    """Return a request for many long texts, which keeps the server busy for a while."""
    return {"prompt": "Once upon a time", "temperature": 1, "n": 16, "max_tokens": 500, **fields}


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server: Server, streams: bool) -> None:
    """16 texts on 4 rows would take a while; when the client goes, the next pass has none of them."""
    with connection_to(server) as connection:
        connection.sendall(request_of(long_text(stream=streams)))
        if streams:
            connection.recv(1000)
        server.wait_for("running_texts", 4)
    start = time.monotonic()
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "One day", "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200
    server.wait_for("running_texts", 0)
    assert time.monotonic() - start < 10
    assert server.metric("waiting_texts") == 0


def test_a_slow_reader_keeps_nobody_waiting(server: Server) -> None:
    """Its texts are computed, and wait for it; the rows are free for others."""
    with connection_to(server) as connection:
        connection.sendall(request_of(long_text(stream=True, max_tokens=100)))
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "One day", "max_tokens": 2}, timeout=120)
        assert answer.status_code == 200
        server.wait_for("running_texts", 0)
        received = b""
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = connection.recv(500)
            assert piece
            received += piece
    assert received.count(b'"finish_reason": "length"') + received.count(b'"finish_reason": "stop"') == 16


def test_too_many_wait(server: Server) -> None:
    with connection_to(server) as connection:
        connection.sendall(request_of(long_text(n=64)))
        server.wait_for("running_texts", 4)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 8}, timeout=60)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["message"] == "too many texts wait; ask again in a second"
    server.wait_for("running_texts", 0)


def test_prompts_that_are_html(server: Server) -> None:
    """They are text like any other, and come back as JSON."""
    page = "<!doctype html><script>alert('é')</script>"
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": page, "echo": True, "max_tokens": 1}, timeout=60
    )
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["text"].startswith(page)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%zz%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ],
)
def test_what_is_hardly_http(server: Server, sent: bytes) -> None:
    with connection_to(server) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(10_000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("most", [100, pytest.param(1000, marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_malformed_requests(server: Server, most: int) -> None:
    """Schemathesis: whatever is sent, the answer is one that the description names, and never a 5xx."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    cases = st.one_of(
        *(
            operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
            for operation in operations
            for mode in (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE)
        )
    )
    count = 0

    @seed(23)
    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def ask(case: Any) -> None:
        nonlocal count
        if isinstance(case.body, dict) and "completions" in case.path:  # short: the answer is not what this is about
            for name in ("max_tokens", "n"):
                if type(case.body.setdefault(name, 1)) is int:
                    case.body[name] = min(case.body[name], 2)
        answer = case.call(timeout=120)
        count += 1
        # a description cannot say how long a context is, or that one field needs another
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])
        assert answer.status_code < 500
        if answer.status_code >= 400:
            message = answer.json()["error"]["message"]
            assert message.isprintable()
            assert len(message) < 1000

    ask()
    assert count >= most


@pytest.mark.slow
def test_sigterm_finishes_what_runs() -> None:
    """The answer comes, and then the exit status is 0."""
    with running("--grace", "60") as server:
        answers: list[httpx.Response] = []
        body = long_text(n=2, max_tokens=300)
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120))
        )
        thread.start()
        server.wait_for("running_texts", 2)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert server.process.wait(60) == 0
        assert answers[0].status_code == 200
        assert len(answers[0].json()["choices"]) == 2
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_the_end_of_grace() -> None:
    """Answers that still run end with an error, and requests that are not whole are cut off."""
    with running("--grace", "1") as server, contextlib.ExitStack() as stack:
        whole, stream, half = (stack.enter_context(connection_to(server)) for _ in range(3))
        whole.sendall(request_of(long_text(n=128)))
        stream.sendall(request_of(long_text(n=8, stream=True)))
        half.sendall(request_of(long_text())[:-1])
        server.wait_for("running_texts", 16)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        error = b'{"error":{"message":"the server is about to end","type":"server_error","param":null,"code":null}}'
        answer = everything_from(whole)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert answer.endswith(error)
        last = everything_from(stream).removesuffix(b"\r\n0\r\n\r\n").strip().split(b"data: ")[-1]
        assert json.loads(last) == json.loads(error)
        assert server.process.wait(60) == 0
        assert time.monotonic() - start < 20
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_kill_and_restart() -> None:
    """After kill -9, a server on the same port answers as before."""
    body = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    with running() as server:
        port = int(server.url.rsplit(":")[-1])
        before = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
        with connection_to(server) as connection:
            connection.sendall(request_of(long_text(stream=True)))
            connection.recv(100)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait(60)
            while connection.recv(100_000):
                pass
    with running(port=port) as server:
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"] == before


@pytest.mark.slow
def test_timeouts() -> None:
    """An answer that takes too long, and a body that does not arrive."""
    with running("--timeout", "0.5", "--rows", "1") as server:
        asked = long_text(n=64)
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 408
        assert answer.json()["error"]["message"].startswith("the answer took longer than 0.5 s; ask for fewer tokens")
        events = httpx.post(f"{server.url}/v1/completions", json={**asked, "stream": True}, timeout=60).text
        assert json.loads(events.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["message"].startswith(
            "the answer"
        )
        with connection_to(server) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert connection.recv(10_000).startswith(b"HTTP/1.1 408 ")
        server.wait_for("running_texts", 0)
