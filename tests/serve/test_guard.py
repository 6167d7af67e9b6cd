"""Who may ask, and how much: hosts, origins, the key, sizes."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.testclient import TestClient

from llama3_raw import Model
from llama3_raw.backends.choose import ops_for
from llama3_raw.serve.app import build_app
from llama3_raw.serve.engine import Engine
from llama3_raw.serve.guard import Settings

from .servers import Server


def app_of(model: Model, **settings: object) -> Iterator[TestClient]:
    engine = Engine(model, ops_for(model.weights), name="tiny", rows=2, context=64)
    with TestClient(build_app(engine, Settings(**settings)), base_url="http://localhost:8000") as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture
def guarded(tiny: Model) -> Iterator[TestClient]:
    allowed = {"api_key": "s3cret", "allow_hosts": frozenset({"laptop.local"})}
    yield from app_of(tiny, **allowed, allow_origins=frozenset({"https://lessons.example"}))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "192.168.1.5", "LOCALHOST:1", "laptop.local")
        ),
        *((host, 421) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "[::1", "a b")),
    ],
)
def test_hosts(guarded: TestClient, host: str, status: int) -> None:
    """A name that somebody else's DNS may point here is refused."""
    answer = guarded.get("/health", headers={"Host": host})
    assert answer.status_code == status
    if status == 421:
        assert "start it with --allow-host NAME" in answer.json()["error"]["message"]


def test_the_key(guarded: TestClient) -> None:
    """Without it there is nothing but the page and the state of health."""
    for path in ("/v1/models", "/metrics", "/openapi.json", "/live/x", "/nothing", "/tokenizer_info"):
        assert guarded.get(path).status_code == 401
    for value in ("s3cret", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer s3cr\xe9t"):
        answer = guarded.get("/v1/models", headers={"Authorization": value.encode("latin-1")})  # type: ignore[arg-type]
        assert answer.status_code == 401
        assert (
            answer.json()["error"]["message"]
            == "the key is missing or wrong; send the header Authorization: Bearer KEY"
        )
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert guarded.get("/health").status_code == 200
    assert guarded.post("/page/x").status_code == 401


def test_origins(guarded: TestClient, server: Server) -> None:
    """A page elsewhere can neither read an answer nor make the server work."""
    known = {"Authorization": "Bearer s3cret"}
    for origin, status in (
        ("https://lessons.example", 200),
        ("http://localhost:8000", 200),
        ("https://localhost", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ):
        answer = guarded.get("/v1/models", headers={**known, "Origin": origin})
        assert answer.status_code == status
        allowed = answer.headers.get("access-control-allow-origin")
        assert allowed == (origin if origin == "https://lessons.example" else None)
    asked = {"Origin": "https://lessons.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization"
    assert guarded.options("/v1/models", headers=asked).status_code == 200
    own = httpx.get(f"{server.url}/v1/models", headers={"Origin": server.url})
    assert (own.status_code, "access-control-allow-origin" in own.headers) == (200, False)


def test_unknown_paths_and_methods(server: Server) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert "see /openapi.json" in answer.json()["error"]["message"]


def test_metrics_name_the_paths_that_there_are(guarded: TestClient) -> None:
    """And no others, of which clients could make up any number."""
    known = {"Authorization": "Bearer s3cret"}
    for path in ("/v1/models", "/v1/models/tiny", "/v1/models/a/b", "/nothing", "/v1"):
        guarded.get(path, headers=known)
    counted = re.findall(
        r'requests_total{path="(.*?)",status="(.*?)"} (.*)', guarded.get("/metrics", headers=known).text
    )
    assert sorted(counted) == [
        ("/v1/models", "200", "1.0"),
        ("/v1/models/NAME", "200", "1.0"),
        ("/v1/models/NAME", "404", "1.0"),
        ("other", "404", "2.0"),
    ]


def test_bodies_of_a_gigabyte(server: Server) -> None:
    """They are refused by their length, or when more has come in chunks, and none is kept in memory."""
    host, port = server.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    before = server.memory
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: 1000000000\r\n\r\n".encode())
        answer = connection.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(1_000_000_000 // 0x10000):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        answer = connection.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    assert json.loads(answer.split("\r\n\r\n")[1])["error"]["message"].startswith(
        "the body is larger than 1000000 bytes;"
    )
    assert server.memory < before + 20_000_000
