"""An imitation of the Hugging Face hub on loopback: HTTP servers that answer like the hub and its storage host."""

from __future__ import annotations

import hashlib
import json
import math
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MIB = 1 << 20
TOKEN = "hf_good"


@dataclass
class Request:
    """A request to a server, and how many bytes of a file it sent."""

    host: str  # "hub" or "storage"
    method: str
    path: str
    headers: dict[str, str]
    start: int = 0
    sent: int = 0


@dataclass
class Fault:
    """A fault in one GET of a file at the storage host. Positions are bytes of the file."""

    cut_at: int | None = None  # the connection ends before this byte
    status: int | None = None  # answer with this status instead of the file
    change: Callable[[bytes], bytes] | None = None  # send other content than the hub describes
    content_type: str = "application/octet-stream"
    has_length: bool = True  # send Content-Length; otherwise the end of the connection is the end of the file
    ignores_range: bool = False
    content_range: str | None = "bytes {start}-{end}/{total}"
    pause: float = 0.0  # seconds between pieces of 64 KiB


@dataclass
class FakeHub:
    """The servers. files: (repository, revision) -> path -> content. Changes apply from the next request on."""

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    refusal: Callable[[str | None], tuple[int, dict[str, str]] | None] = lambda token: None  # token -> status, headers
    faults: list[Fault] = field(default_factory=list)  # for the next GETs at the storage host, one each
    always: Fault = field(default_factory=Fault)  # for all later GETs
    expired: set[str] = field(default_factory=set)  # signatures that are no longer valid
    etag: Callable[[bytes], str] = lambda content: hashlib.sha256(content).hexdigest()
    storage_etag: str = "v1"
    large: int = 1000  # bytes; smaller files come from the hub itself
    plain_page: bool = False  # answer like the login page of a network
    page_etag: str | None = None  # of that page
    pushed_after: float = math.inf  # number of requests until another commit is pushed
    requests: list[Request] = field(default_factory=list)

    def start(self, certificate: str | None = None) -> None:
        """Start the servers."""
        self.hub = self._serve(_HubHandler, certificate)
        self.storage = self._serve(_StorageHandler, None)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.hub.server_port}"
        # of another name than the hub: huggingface_hub 1.33 follows a redirect to the same one
        self.storage_url = f"http://localhost:{self.storage.server_port}"

    def _serve(self, handler: type[_Handler], certificate: str | None) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"fake": self}))
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def stop(self) -> None:
        """Stop the servers."""
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()

    def gets(self, name: str) -> list[Request]:
        """Return the GETs of a file, at either host."""
        return [r for r in self.requests if r.method == "GET" and unquote(urlsplit(r.path).path).endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    host: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def record(self) -> Request:
        request = Request(self.host, self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.fake.requests.append(request)
        return request

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


class _HubHandler(_Handler):
    host = "hub"

    def do_GET(self) -> None:
        fake = self.fake
        path = urlsplit(self.path).path  # a proxy is asked for whole addresses
        if path.startswith("/api/"):
            return self.answer_api(path)
        request = self.record()
        if fake.plain_page:
            etag = {"ETag": fake.page_etag} if fake.page_etag else {}
            return self.answer(200, {"Content-Type": "text/html", **etag}, b"<html>Please log in</html>")
        token = request.headers.get("authorization", "").removeprefix("Bearer ") or None
        refused = fake.refusal(token)
        if refused:
            return self.answer(refused[0], refused[1])
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        assert match, f"the fake hub does not know {path}"
        repo, revision, file = match[1], unquote(match[2]), unquote(match[3])
        if not any(known == repo for known, _ in fake.files):
            code = 404 if token else 401
            return self.answer(code, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commits = {hashlib.sha1(r.encode()).hexdigest(): r for known, r in fake.files if known == repo}
        revision = commits.get(revision, revision)
        if (repo, revision) not in fake.files:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        content = fake.files[repo, revision].get(file)
        pushed = sum(r.host == "hub" for r in fake.requests) > fake.pushed_after
        commit = {"X-Repo-Commit": hashlib.sha1((revision + pushed * "'").encode()).hexdigest()}
        if content is None:
            return self.answer(404, {**commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if len(content) < fake.large:
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self.answer(200, {**commit, "ETag": f'"{blob}"'}, content)
        linked = {"X-Linked-Etag": f'"{fake.etag(content)}"', "X-Linked-Size": str(len(content))}
        signature = f"s{sum(r.host == 'hub' for r in fake.requests)}"
        location = f"{fake.storage_url}/{repo}/{revision}/{file}?signature={signature}"
        self.answer(302, {**commit, **linked, "ETag": '"of the redirect"', "Location": location})

    do_HEAD = do_GET

    def answer_api(self, path: str) -> None:
        """List the files of a repository; nothing else of the API is there."""
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        files = self.fake.files.get((match[1], unquote(match[2]))) if match else None
        if files is None:
            return self.answer(404, {})
        entries = [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())


class _StorageHandler(_Handler):
    host = "storage"
    wbufsize = 0

    def do_GET(self) -> None:
        request = self.record()
        fake = self.fake
        fault = fake.faults.pop(0) if fake.faults else fake.always
        parts = urlsplit(self.path)
        _, org, name, revision, file = unquote(parts.path).split("/", 4)
        content = fake.files[f"{org}/{name}", revision][file]
        if fault.status or parse_qs(parts.query)["signature"][0] in fake.expired:
            return self.answer(fault.status or 403, {}, b"no")
        if fault.change:
            content = fault.change(content)
        etag = f'"{fake.storage_etag}"'
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        if match and request.headers.get("if-range", etag) == etag and not fault.ignores_range:
            request.start = int(match[1])
            if request.start >= len(content):
                return self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
        self.send_response(206 if request.start else 200)
        if request.start and fault.content_range:
            described = fault.content_range.format(start=request.start, end=len(content) - 1, total=len(content))
            self.send_header("Content-Range", described)
        if fault.has_length:
            self.send_header("Content-Length", str(len(content) - request.start))
        self.send_header("Content-Type", fault.content_type)
        self.send_header("ETag", etag)
        self.end_headers()
        end = len(content) if fault.cut_at is None else fault.cut_at
        for position in range(request.start, end, MIB // 16):
            piece = content[position : min(position + MIB // 16, end)]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return  # the client is gone
            request.sent += len(piece)
            if fault.pause:
                time.sleep(fault.pause)
        self.close_connection = True
