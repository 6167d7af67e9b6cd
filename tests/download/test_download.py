"""download.py, run in separate processes against an imitation of the hub on loopback, with its faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama3_raw import UserError
from llama3_raw.download import fetch, records
from llama3_raw.download.__main__ import build_parser, verify
from llama3_raw.download.catalog import MODELS, wanted_files
from llama3_raw.download.records import Record
from llama3_raw.download.sources import Digest, Interrupted, RemoteFile, Stream, mirror
from tests.download.fake_hub import MIB, TOKEN, FakeHub, Fault
from tests.paths import ROOT

REPO = "meta-llama/Meta-Llama-3-8B"
CHECKPOINT = "consolidated.00.pth"
BIG = random.Random(0).randbytes(24 * MIB + 12345)
FILES = {
    "original/params.json": b'{"dim": 64}',
    "original/tokenizer.model": random.Random(1).randbytes(200_000),
    f"original/{CHECKPOINT}": BIG,
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub with one model that needs a token."""
    fake = FakeHub(files={(REPO, "main"): dict(FILES)}, refusal=lambda token: None if token == TOKEN else GATED)
    fake.start()
    yield fake
    fake.stop()


GATED = (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."})


class Tool:
    """Run download.py in an empty folder."""

    def __init__(self, folder: Path, hub: FakeHub):
        self.folder = folder
        self.target = folder / "weights" / "Meta-Llama-3-8B"
        environment = {n: v for n, v in os.environ.items() if not re.match(r"HF_|HUGGING|.*_proxy$", n, re.IGNORECASE)}
        self.environment = {**environment, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "hf")}

    def start(self, *arguments: str, **environment: str | None) -> subprocess.Popen[str]:
        """Start the command in a separate process. An environment variable that is None is unset."""
        merged = {**self.environment, **environment}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "download.py"), *arguments],
            cwd=self.folder,
            env={name: value for name, value in merged.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        with self.start(*arguments, **environment) as process:
            out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def ok(self, *arguments: str, **environment: str | None) -> str:
        """Run the command, which must succeed, and return its stderr."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def fails(self, *arguments: str, **environment: str | None) -> str:
        """Run the command, which must end with status 2, and return the one line of its error."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        errors = [line for line in re.split(r"[\r\n]", done.stderr) if "llama3_raw: error: " in line]
        assert len(errors) == 1, done.stderr
        assert done.stderr.rstrip().endswith(errors[0])
        return errors[0]

    def files(self) -> dict[str, bytes]:
        """Return the files in the target folder that have their final names."""
        if not self.target.exists():
            return {}
        return {f.name: f.read_bytes() for f in self.target.iterdir() if f.is_file() and f.suffix != ".part"}

    def has_no_wrong_file(self, files: dict[str, bytes] = FILES) -> bool:
        """Whether each file is either correct or missing."""
        return self.files().items() <= {Path(path).name: content for path, content in files.items()}.items()

    def complete(self, files: dict[str, bytes] = FILES) -> bool:
        """Whether all files are complete and correct, and no .part is left."""
        expected = {Path(path).name: content for path, content in files.items()}
        return self.files() == expected and not list(self.target.glob("*.part"))


@pytest.fixture
def tool(tmp_path: Path, hub: FakeHub) -> Tool:
    return Tool(tmp_path, hub)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_download(hub: FakeHub, tool: Tool) -> None:
    done = tool.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert tool.complete()
    assert "is complete; try: python -m llama3_raw" in done.stderr
    for request in hub.requests:  # the token is sent to the hub only
        assert request.headers.get("authorization") == (f"Bearer {TOKEN}" if request.host == "hub" else None)
        assert request.headers["accept-encoding"] == "identity"  # lengths and positions are those of the file


@pytest.mark.slow
def test_second_run_fetches_and_hashes_nothing(hub: FakeHub, tool: Tool) -> None:
    tool.ok()
    hub.requests.clear()
    start = time.monotonic()
    assert "checking" not in tool.ok()
    assert time.monotonic() - start < 3
    assert [request.method for request in hub.requests] == ["HEAD"] * 4  # the fourth looks for a second shard


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_connection_is_resumed(hub: FakeHub, tool: Tool, share: float) -> None:
    hub.faults = [Fault(), Fault(cut_at=int(share * len(BIG)))]
    tool.ok()
    assert tool.complete()
    first, second = hub.gets(CHECKPOINT)
    assert (first.sent, second.start) == (int(share * len(BIG)), first.sent)
    assert second.headers["if-range"] == '"v1"'
    assert first.sent + second.sent - len(BIG) <= MIB


@pytest.mark.slow
def test_server_that_is_down_for_a_while(hub: FakeHub, tool: Tool) -> None:
    hub.faults = [Fault(), Fault(cut_at=len(BIG) // 3), Fault(status=503), Fault(status=500)]
    err = tool.ok()
    assert err.count("answered 50") == err.count("; trying again") - 1 == 2
    assert tool.complete()
    assert sum(request.sent for request in hub.gets(CHECKPOINT)) - len(BIG) <= MIB


def test_server_that_stays_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gives up after a minute and keeps its bytes; the next run continues there."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    source = Unsteady(pieces=3)
    file = RemoteFile("weights", "weights", len(BIG), Digest("sha256", hashlib.sha256(BIG).hexdigest()), "v1")
    with pytest.raises(UserError, match=r"weights.part: it hung up; 3,000 of 25,\d+,\d+ bytes are here, run the same"):
        fetch.download(source, [file], tmp_path)
    assert 55 < sum(slept) < 65
    assert [name.name for name in tmp_path.glob("weights*")] == ["weights.part"]
    source.pieces = 10**9
    fetch.download(source, [file], tmp_path)
    assert (tmp_path / "weights").read_bytes() == BIG
    assert source.starts[-1] == 3000


class Unsteady:
    """A source of one file that hangs up after every piece of 1000 bytes, and for good after `pieces` of them."""

    def __init__(self, pieces: int):
        self.pieces = pieces
        self.starts_over = False
        self.starts: list[int] = []

    def find(self, path: str) -> RemoteFile | None:
        raise NotImplementedError

    def names(self) -> list[str]:
        raise NotImplementedError

    def local_copy(self, file: RemoteFile) -> Path | None:
        return None

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, validator: str | None) -> Iterator[Stream]:
        self.starts.append(start)
        self.pieces -= 1
        if self.pieces < 0:
            raise Interrupted("it hung up")
        if self.starts_over:
            start = 0
        length = 1000 if self.pieces < 1000 else len(BIG)
        yield Stream(start, None, None, iter([BIG[start : start + length]]))


@pytest.mark.slow
def test_kill_and_resume(hub: FakeHub, tool: Tool) -> None:
    hub.always = Fault(pause=0.003)
    for share in (0.3, 0.6):
        process = tool.start()
        part = tool.target / f"{CHECKPOINT}.part"
        wait_for(lambda: part.exists() and part.stat().st_size > share * len(BIG))  # noqa: B023
        process.kill()
        process.communicate()
        assert tool.has_no_wrong_file()
        assert CHECKPOINT not in tool.files()
    hub.always = Fault()
    tool.ok()
    assert tool.complete()
    assert len(hub.gets(CHECKPOINT)) == 3
    assert sum(request.sent for request in hub.gets(CHECKPOINT)) - len(BIG) <= 2 * MIB  # 1 MiB for each kill


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_keeps_the_bytes(hub: FakeHub, tool: Tool) -> None:
    hub.always = Fault(pause=0.003)
    process = tool.start()
    part = tool.target / f"{CHECKPOINT}.part"
    wait_for(lambda: part.exists() and part.stat().st_size > MIB)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert part.stat().st_size > MIB


@pytest.mark.slow
def test_file_that_changes_between_two_runs(hub: FakeHub, tool: Tool) -> None:
    hub.faults = [Fault(), Fault(cut_at=len(BIG) // 2)]
    hub.always = Fault(status=429)
    tool.fails()
    newer = {**FILES, f"original/{CHECKPOINT}": BIG[::-1]}
    assert f"{CHECKPOINT}.part: the download is not complete; run it again" in tool.fails("--verify")
    hub.files[REPO, "main"] = newer
    hub.storage_etag = "v2"
    hub.always = Fault()
    assert "is of another version; starting again" in tool.ok()
    assert tool.complete(newer)


@pytest.mark.slow
def test_file_that_changes_at_the_storage_host(hub: FakeHub, tool: Tool) -> None:
    """If-Range no longer matches: the whole file is sent, and replaces the .part."""
    hub.faults = [Fault(), Fault(cut_at=len(BIG) // 2)]
    hub.always = Fault(status=429)
    tool.fails()
    hub.storage_etag = "v2"
    hub.always = Fault()
    tool.ok()
    assert tool.complete()
    assert hub.gets(CHECKPOINT)[-1].sent == len(BIG)


@pytest.mark.slow
def test_wrong_length(hub: FakeHub, tool: Tool) -> None:
    for change in (lambda content: content[:-1], lambda content: content + b"x"):
        hub.always = Fault(change=change)
        assert re.search(
            r"the server offers [\d,]+ bytes, but \S+ at main reports [\d,]+; try again later", tool.fails()
        )
        assert tool.has_no_wrong_file()
    hub.always = Fault(change=lambda content: content + b"x", has_length=False)
    assert re.search(r"more than [\d,]+ bytes were sent; run the same command again", tool.fails())
    assert tool.has_no_wrong_file()
    hub.always = Fault(has_length=False)
    tool.ok()
    assert tool.complete()


@pytest.mark.slow
def test_wrong_hash(hub: FakeHub, tool: Tool) -> None:
    hub.faults = [Fault(), Fault(change=lambda content: content[:1000] + b"\0" + content[1001:])]
    error = tool.fails()
    assert f"{CHECKPOINT}: sha256 is " in error
    assert hashlib.sha256(BIG).hexdigest() in error
    assert tool.has_no_wrong_file()
    assert not list(tool.target.glob("*.part"))
    tool.ok()
    assert tool.complete()


@pytest.mark.slow
def test_small_files_are_hashed_as_git_does(hub: FakeHub, tool: Tool) -> None:
    tool.ok()
    assert tool.complete()
    (tool.target / "params.json").write_bytes(b'{"dim": 65}')
    assert "params.json: differs from" in tool.ok()
    assert tool.complete()


@pytest.mark.slow
def test_signed_address_that_expires(hub: FakeHub, tool: Tool) -> None:
    hub.expired = {"s3"}  # that of the third request, for the checkpoint
    tool.ok()
    assert tool.complete()
    assert [request.sent > 0 for request in hub.gets(CHECKPOINT)] == [False, True]


@pytest.mark.slow
def test_two_downloads_at_once(hub: FakeHub, tool: Tool) -> None:
    hub.always = Fault(pause=0.005)
    first = tool.start()
    wait_for(lambda: (tool.target / f"{CHECKPOINT}.part").exists())
    assert "another download is running in this folder" in tool.fails()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert tool.complete()
    assert len(hub.gets(CHECKPOINT)) == 1


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mount a file system of this size at `folder`, or skip the test if that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_is_too_small(hub: FakeHub, tool: Tool) -> None:
    with small_disk(tool.folder / "weights", 8):
        assert re.search(r"0\.0254 GB are needed, 0\.008\d* GB are free on that disk", tool.fails())
        assert hub.gets(CHECKPOINT) == []
        assert tool.has_no_wrong_file()


@pytest.mark.slow
def test_disk_that_fills_up(hub: FakeHub, tool: Tool) -> None:
    with small_disk(tool.folder / "weights", 30):
        hub.always = Fault(pause=0.005)
        process = tool.start()
        part = tool.target / f"{CHECKPOINT}.part"
        wait_for(lambda: part.exists() and part.stat().st_size > MIB)
        filler = tool.folder / "weights" / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as opened:
            opened.write(bytes(20 * MIB))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "the disk is full; free some space and run the same command again to continue" in err
        assert "Traceback" not in err
        assert tool.has_no_wrong_file()
        filler.unlink()
        hub.always = Fault()
        tool.ok()
        assert tool.complete()
        assert sum(request.sent for request in hub.gets(CHECKPOINT)) - len(BIG) <= MIB


def error(status: int, code: str = "", message: str = "", **headers: str) -> Callable[[Any], Any]:
    return lambda token: (status, {"X-Error-Code": code, "X-Error-Message": message, **headers})


PENDING = "Your request to access model is awaiting a review from the repo authors."
FINE_GRAINED = "Please enable access to public gated repositories in your fine-grained token settings."
PAGE = {"always": Fault(change=lambda content: b"\xef\xbb\xbf\n<!-- --><html>Please log in</html>", has_length=False)}
# name: (attributes to set on the hub, arguments, environment, the message)
REFUSALS: dict[str, tuple[dict[str, Any], list[str], dict[str, str | None], str]] = {
    "no token": (
        {},
        [],
        {"HF_TOKEN": None},
        r"needs a token.* accept the licence at \S+, create a token at .*hf auth login",
    ),
    "bad token": (
        {"refusal": error(401, message="Invalid credentials in Authorization header")},
        [],
        {},
        "the token is not valid .*create one at",
    ),
    "a token with a line end in it": (
        {},
        ["--token", "hf_\ngood"],
        {},
        "--token: contains characters that no token has",
    ),
    "licence not accepted": (
        {"refusal": error(403, "GatedRepo", "not in the authorized list")},
        [],
        {},
        "accept it at",
    ),
    "access pending": ({"refusal": error(403, "GatedRepo", PENDING)}, [], {}, "request for access is pending; wait"),
    "a token without permission": (
        {"refusal": error(403, "", FINE_GRAINED)},
        [],
        {},
        "may not read gated repositories",
    ),
    "forbidden": ({"refusal": error(403)}, [], {}, "refuses .*check the token's permissions"),
    "no such repository": ({}, ["--model", "meta-llama/Llama-9"], {}, "there is no such repository; check the name"),
    "private, without a token": (
        {"refusal": error(401, "RepoNotFound")},
        [],
        {"HF_TOKEN": None},
        "if it is private, give a token",
    ),
    "no repository name": ({}, ["--model", "a/b/c"], {}, "--model a/b/c: not a repository name"),
    "no such short name": ({}, ["--model", "8b-instrct"], {}, "did you mean 8b-instruct"),
    "no such revision": ({}, ["--revision", "v9"], {}, "--revision v9: .* has no such branch, tag or commit"),
    "a push in between": ({"pushed_after": 2}, [], {}, "main changed just now; run the same command again"),
    "no such file": (
        {},
        ["--format", "safetensors"],
        {},
        r"no model .*looked for config\.json with model\.safetensors or pytorch_model\.bin\); leave --format out",
    ),
    "rate limited": ({"refusal": error(429, **{"Retry-After": "42"})}, [], {}, "too many requests; try again in 42 s"),
    "rate limited, by the draft": (
        {"refusal": error(429, **{"RateLimit": '"api";r=0;t=55'})},
        [],
        {},
        "too many requests; try again in 55 s",
    ),
    "rate limited in the middle": ({"always": Fault(status=429)}, [], {}, "too many requests"),
    "server down": ({"refusal": error(503)}, [], {}, r"the server is down \(it answered 503\); try again later"),
    "no server": ({}, [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the server is down or out of reach"),
    "offline": ({}, [], {"HF_ENDPOINT": "http://hub.invalid"}, "seems to be offline"),
    "HF_HUB_OFFLINE": ({}, [], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and the .* cache has no model"),
    "a proxy that is not there": ({}, [], {"HTTP_PROXY": "http://127.0.0.1:9"}, "out of reach|proxy"),
    "a page instead of an answer": ({"plain_page": True}, [], {}, "does not answer like a hub"),
    "a page instead of the file": (PAGE, [], {}, "sent an HTML page .*; if it is a login page of this"),
    "a folder that is a file": (
        {},
        ["--to", "there is a file/model"],
        {},
        "there is a file.*give another folder with --to",
    ),
    "nothing to verify": ({}, ["--verify"], {}, "nothing to check against"),
    "a mirror of an unknown kind": ({}, ["--from", "s3://bucket/x"], {}, "--from s3://bucket/x: should be gs://"),
    "a mirror out of reach": (
        {},
        ["--from", "gs://no-bucket/x"],
        {},
        "--from gs://no-bucket/x/orig.* check the address",
    ),
    "access pending, by the message": (
        {"refusal": error(403, message=PENDING)},
        [],
        {},
        "request for access is pending",
    ),
    "bad token for a gated model": (
        {"refusal": error(401, "GatedRepo", "Access is restricted. Please log in.")},
        [],
        {},
        "the token is not valid",
    ),
    "a date to try again": (
        {"refusal": error(429, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})},
        [],
        {},
        "try again in a few minutes",
    ),
    "a page for everything": ({"plain_page": True, "page_etag": '"abc"'}, [], {}, "does not answer like a hub"),
    "an empty model": ({}, ["--model", ""], {}, "--model: should not be empty"),
    "an empty folder": ({}, ["--to="], {}, "--to: should not be empty"),
    "an endpoint without a scheme": ({}, [], {"HF_ENDPOINT": "127.0.0.1:8000"}, "HF_ENDPOINT 127.0.0.1:8000: "),
    "a proxy of an unknown kind": (
        {},
        [],
        {"HTTP_PROXY": "ftp://127.0.0.1:9"},
        "network settings cannot",
    ),
    "certificates that are not there": ({}, [], {"SSL_CERT_FILE": "/nowhere.pem"}, "check SSL_CERT_FILE"),
    "a mirror without the files": (
        {},
        ["--from", "."],
        {},
        r"looked for original/params\.json with .*; it has there is a file",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(hub: FakeHub, tool: Tool, case: str) -> None:
    settings, arguments, environment, message = REFUSALS[case]
    if "gs://no-bucket/x" in arguments:
        pytest.importorskip("blobfile")
    (tool.folder / "there is a file").touch()
    for name, value in settings.items():
        setattr(hub, name, value)
    error = tool.fails(*arguments, **environment)
    assert re.search(message, error), error
    assert tool.has_no_wrong_file()
    if "always" not in settings:
        assert not (tool.folder / "weights").exists()


@pytest.mark.slow
def test_certificate_that_is_not_trusted(tmp_path: Path, hub: FakeHub) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl here to make a certificate")
    file = tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(file), "-out", f"{file}.crt"]
    subprocess.run([openssl, "req", *options, *subject], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    secure = FakeHub(files=hub.files)
    secure.start(certificate=str(file))
    try:
        tool = Tool(tmp_path, secure)
        assert "its certificate is not trusted" in tool.fails()
        tool.ok(SSL_CERT_FILE=f"{file}.crt")  # what the error suggests
        assert tool.complete()
    finally:
        secure.stop()


def test_through_a_proxy(hub: FakeHub, tool: Tool) -> None:
    """The imitation hub is the proxy: it gets whole addresses, of a host that only it can reach."""
    hub.large = 1 << 40  # all files come from the hub itself
    tool.ok(HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url)
    assert tool.complete()
    assert all(request.path.startswith("http://hub.invalid/") for request in hub.requests)


@pytest.mark.slow
def test_stored_login_and_token_option(hub: FakeHub, tool: Tool) -> None:
    (tool.folder / "hf").mkdir()
    (tool.folder / "hf" / "token").write_text(TOKEN)
    tool.ok("--dry-run", HF_TOKEN=None)
    tool.ok("--dry-run", "--token", TOKEN, HF_TOKEN="hf_other")


def fill_cache(tool: Tool, files: dict[str, bytes] = FILES) -> list[Path]:
    """Put the files into the Hugging Face cache by its library, and return their blobs."""
    code = "import sys; from huggingface_hub import hf_hub_download\n"
    code += "for path in sys.argv[2:]: print(hf_hub_download(sys.argv[1], path))"
    command = [sys.executable, "-c", code, REPO, *files]
    done = subprocess.run(command, env=tool.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line).resolve() for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_hugging_face_cache_is_linked(hub: FakeHub, tool: Tool, offline: bool) -> None:
    blobs = fill_cache(tool)
    hub.requests.clear()
    assert "taken from" in tool.ok(HF_HUB_OFFLINE="1" if offline else None)
    assert tool.complete()
    assert all(request.method == "HEAD" for request in hub.requests)
    assert bool(hub.requests) is not offline
    checkpoint = next(blob for blob in blobs if blob.stat().st_size == len(BIG))
    assert checkpoint.samefile(tool.target / CHECKPOINT)


@pytest.mark.slow
def test_damaged_copy_in_the_cache_is_not_used(hub: FakeHub, tool: Tool) -> None:
    blobs = fill_cache(tool)
    checkpoint = next(blob for blob in blobs if blob.stat().st_size == len(BIG))
    checkpoint.write_bytes(BIG[:-1] + b"\0")
    assert "and HF_HUB_OFFLINE is set; unset it" in tool.fails(HF_HUB_OFFLINE="1")
    assert tool.has_no_wrong_file()
    tool.ok()
    assert tool.complete()


@pytest.mark.slow
def test_cache_on_another_disk_is_copied(hub: FakeHub, tool: Tool) -> None:
    fill_cache(tool)
    hub.requests.clear()
    with small_disk(tool.folder / "weights", 40):
        tool.ok()
        assert tool.complete()
        assert all(request.method == "HEAD" for request in hub.requests)


def test_a_bucket_without_blobfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blobfile", None)
    with pytest.raises(UserError, match=r"--from gs://bucket/x: needs the package blobfile .*; pip install blobfile"):
        mirror("gs://bucket/x")


@pytest.mark.slow
@pytest.mark.parametrize("original", [True, False], ids=["in original/", "at the top"])
def test_local_folder_as_mirror(tmp_path: Path, tool: Tool, original: bool) -> None:
    mirror = tmp_path / "llama3-8b"
    for path, content in FILES.items():
        file = mirror / (path if original else Path(path).name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    offline = {"HF_TOKEN": None, "HF_ENDPOINT": "http://hub.invalid"}
    assert "reports no hash; only the length was checked" in tool.ok("--from", f"{mirror}/", "--model", "8b", **offline)
    assert tool.complete()
    tool.ok("--from", "llama3-8b", "--dry-run", **offline)
    assert not (tool.folder / "weights" / "llama3-8b").exists()
    tool.ok("--from", "llama3-8b", **offline)
    assert (tool.folder / "weights" / "llama3-8b" / CHECKPOINT).read_bytes() == BIG


@pytest.mark.slow
def test_revision_and_folder(hub: FakeHub, tool: Tool) -> None:
    older = {**FILES, "original/params.json": b'{"dim": 32}'}
    hub.files[REPO, "v1"] = older
    tool.target = tool.folder / "my model"
    err = tool.ok("--revision", "v1", "--to", "my model")
    assert tool.complete(older)
    assert '--weights "my model"' in err
    tool.ok("--to", "my model")
    assert tool.complete()
    assert len(hub.gets(CHECKPOINT)) == 1  # both revisions have the same


def test_shards(hub: FakeHub, tool: Tool) -> None:
    shards = {f"original/consolidated.{i:02}.pth": random.Random(i).randbytes(MIB) for i in range(3)}
    hub.files[REPO, "main"] = {**FILES, **shards}
    tool.ok()
    assert tool.complete({**FILES, **shards})


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_safetensors(hub: FakeHub, tool: Tool, sharded: bool) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {"config.json": b"{}", "original/tokenizer.model": FILES["original/tokenizer.model"]}
    if sharded:
        index = {"weight_map": {"b": names[1], "a": names[0], "c": names[1]}}
        files |= {
            "model.safetensors.index.json": json.dumps(index).encode() + b" " * 2000
        }  # large: at the storage host
        files |= {name: random.Random(name).randbytes(MIB) for name in names}
    else:
        files |= {"model.safetensors": BIG[:MIB]}
    hub.files[REPO, "main"] = {**files, "pytorch_model.bin": b"not wanted"}
    tool.ok("--format", "safetensors")
    assert tool.complete(files)
    fill_cache(tool, files)
    tool.target = tool.folder / "offline"
    tool.ok("--format", "safetensors", "--to", "offline", HF_HUB_OFFLINE="1")
    assert tool.complete(files)


# name: (repository, its files, those that are wanted)
LAYOUTS: dict[str, tuple[str, str, str]] = {
    "a fine-tune with its base": (
        "some/fine-tune",
        "config.json model.safetensors generation_config.json tokenizer.json tokenizer_config.json "
        "special_tokens_map.json chat_template.jinja README.md original/params.json original/tokenizer.model "
        "original/consolidated.00.pth",
        "config.json model.safetensors generation_config.json tokenizer.json tokenizer_config.json "
        "special_tokens_map.json chat_template.jinja",
    ),
    "with two tokenizers": (
        "some/model",
        "config.json model.safetensors tokenizer.json tokenizer.model params.json consolidated.safetensors",
        "config.json model.safetensors tokenizer.json tokenizer.model",
    ),
    "without a tokenizer": ("some/model", "config.json model.safetensors", "config.json model.safetensors"),
    "a pickle": (
        "some/model",
        "config.json pytorch_model.bin tokenizer.json training_args.bin optimizer.bin",
        "config.json pytorch_model.bin tokenizer.json",
    ),
    "Meta's at the root": (
        "some/model",
        "params.json tokenizer.model consolidated.00.pth consolidated.01.pth config.json",
        "params.json tokenizer.model consolidated.00.pth consolidated.01.pth",
    ),
    "Meta's as safetensors": (
        "some/model",
        "params.json tokenizer.model consolidated.safetensors",
        "params.json tokenizer.model consolidated.safetensors",
    ),
    "Meta's in original/ only": (
        "some/model",
        "original/params.json original/tokenizer.model original/consolidated.00.pth",
        "original/params.json original/tokenizer.model original/consolidated.00.pth",
    ),
    "Meta's own, both": (
        REPO,
        "config.json model.safetensors original/params.json original/tokenizer.model original/consolidated.00.pth",
        "original/params.json original/tokenizer.model original/consolidated.00.pth",
    ),
    "Meta's own, without original/": (
        REPO,
        "config.json model.safetensors tokenizer.json",
        "config.json model.safetensors tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_files_of_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """By a local folder, because these are the same for every source."""
    repo, there, wanted = LAYOUTS[case]
    for name in there.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = wanted_files(FolderSource(tmp_path), repo)
    assert sorted(file.path for file in files) == sorted(wanted.split())
    assert ("has no tokenizer" in capsys.readouterr().err) is (case == "without a tokenizer")


class FolderSource(Unsteady):
    """A source with exactly the files of a folder."""

    def __init__(self, root: Path):
        super().__init__(0)
        self.root = root

    def find(self, path: str) -> RemoteFile | None:
        return RemoteFile(Path(path).name, path, 0, None, "v1") if (self.root / path).exists() else None


@pytest.mark.slow
def test_any_repository(hub: FakeHub, tool: Tool) -> None:
    """A fine-tune with its own tokenizer and a copy of its base."""
    files = {name: name.encode() for name in ("config.json", "tokenizer.json", "model.safetensors")}
    hub.files["some/fine-tune", "main"] = {**FILES, **files}
    tool.target = tool.folder / "weights" / "fine-tune"
    assert f'--weights "{Path("weights/fine-tune")}"' in tool.ok("--model", "some/fine-tune")
    assert tool.complete(files)


def test_gguf(hub: FakeHub, tool: Tool) -> None:
    parts = {f"Q8/m-Q8-{number:05}-of-00003.gguf": random.Random(number).randbytes(2000) for number in (1, 2, 3)}
    hub.files["some/GGUF", "main"] = {"m-Q4.gguf": b"GGUF", **parts}
    tool.target = tool.folder / "weights" / "GGUF"
    err = tool.ok("--model", "some/GGUF", "--file", "Q8/m-Q8-00002-of-00003.gguf")
    assert f'--weights "{Path("weights/GGUF/m-Q8-00001-of-00003.gguf")}"' in err
    assert tool.complete(parts)
    for arguments in ((), ("--file", "m-Q5.gguf")):
        error = tool.fails("--model", "some/GGUF", *arguments)
        assert error.endswith("choose one of its GGUF files with --file: m-Q4.gguf, Q8/m-Q8-00001-of-00003.gguf")
    tool.ok("--model", "some/GGUF", "--file", "m-Q4.gguf")
    (tool.target / "m-Q8-00002-of-00003.gguf").write_bytes(b"another")
    assert "m-Q8-00002-of-00003.gguf: has 7 bytes" in tool.fails("--verify", "--model", "some/GGUF")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("adapter_config.json adapter_model.safetensors", "it has an adapter .*run its base model with --adapter"),
        ("config.json model.onnx", "it has config.json, model.onnx$"),
        ("", "check the name$"),
    ],
)
def test_repository_that_cannot_be_loaded(hub: FakeHub, tool: Tool, names: str, message: str) -> None:
    hub.files["some/model", "main"] = dict.fromkeys(names.split(), b"x")
    error = tool.fails("--model", "some/model")
    assert re.search(rf"no model that this can load \(looked for config.json.*\); .*{message}", error), error
    assert "--format" not in error  # which would send the user in a circle


def test_index_that_points_outside_the_folder(hub: FakeHub, tool: Tool) -> None:
    index = json.dumps({"weight_map": {"a": "../../outside"}}).encode()
    files = {**FILES, "config.json": b"{}", "model.safetensors.index.json": index}
    hub.files[REPO, "main"] = files
    assert "is not an index of weights" in tool.fails("--format", "safetensors")
    hub.large = 10
    hub.always = Fault(status=503)
    assert "answered 503; run the same command again" in tool.fails("--format", "safetensors")


@pytest.mark.slow
def test_dry_run_and_list(hub: FakeHub, tool: Tool) -> None:
    done = tool.run("--dry-run")
    assert done.returncode == 0
    assert f"{len(BIG):,}" in done.stdout
    assert "(to fetch)" in done.stdout
    assert not (tool.folder / "weights").exists()
    tool.ok()
    out = tool.run("--dry-run").stdout
    assert out.count("(complete)") == 3
    out = tool.run("--list").stdout
    assert re.search(r"^8b +16\.1 GB  meta-llama/Meta-Llama-3-8B$", out, re.MULTILINE)
    assert len(hub.gets(CHECKPOINT)) == 1


def test_verify_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the damaged file, not the record that it could not update."""
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "wanted").write_text("file")
    (tmp_path / "file").write_text("damaged")
    Record("hub", "1", 7, Digest("sha256", "0" * 64)).write(tmp_path, "file")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(records, "replacing", refuse)
    with pytest.raises(UserError, match="file: sha256 is "):
        verify(tmp_path)


@pytest.mark.slow
def test_verify(hub: FakeHub, tool: Tool) -> None:
    tool.ok()
    offline = {"HF_ENDPOINT": "http://hub.invalid", "HF_TOKEN": None}
    err = tool.ok("--verify", **offline)
    assert err.count(": correct (") == 3
    file = tool.target / CHECKPOINT
    times = file.stat()
    with open(file, "r+b") as opened:  # one bit flips on the disk, and the times stay the same
        opened.seek(5_000_000)
        opened.write(bytes([BIG[5_000_000] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert re.search(
        rf"{CHECKPOINT}: sha256 is \w+, should be \w+; download it again", tool.fails("--verify", **offline)
    )
    tool.ok()
    assert tool.complete()
    file.unlink()
    assert f"{CHECKPOINT}: is missing" in tool.fails("--verify", **offline)


@pytest.mark.slow
def test_checklist(hub: FakeHub, tool: Tool) -> None:
    """Meta's own downloads have one, with MD5. Both --verify and a download check it."""
    tool.target.mkdir(parents=True)
    for path, content in FILES.items():
        (tool.target / Path(path).name).write_bytes(content)
    checklist = tool.target / "checklist.chk"
    right = hashlib.md5(BIG).hexdigest()
    checklist.write_text(f"{right}  {CHECKPOINT}\n")
    assert "correct (md5)" in tool.ok("--verify", HF_ENDPOINT="http://hub.invalid")
    checklist.write_text(f"{'0' * 32}  {CHECKPOINT}\n")
    assert f"md5 is {right}, should be 000" in tool.fails("--verify")
    assert "by checklist.chk; if that list is of another version, remove it" in tool.fails()
    assert (tool.target / CHECKPOINT).read_bytes() == BIG
    (tool.target / CHECKPOINT).unlink()
    assert "by checklist.chk" in tool.fails()
    assert CHECKPOINT not in tool.files()
    checklist.write_text(f"{right}  {CHECKPOINT}\n")
    tool.ok()
    assert len(hub.gets(CHECKPOINT)) == 1
    checklist.write_text("nonsense\n")
    assert "checklist.chk: line 1: should be an MD5" in tool.fails("--verify")


@pytest.mark.slow
def test_files_that_already_exist(hub: FakeHub, tool: Tool) -> None:
    """For example copied by hand. Correct files are kept; a wrong one stays until the right one is complete."""
    tool.target.mkdir(parents=True)
    for path, content in FILES.items():
        (tool.target / Path(path).name).write_bytes(content)
    (tool.target / CHECKPOINT).write_bytes(BIG[:-1])
    hub.always = Fault(status=429)
    tool.fails()
    assert (tool.target / CHECKPOINT).read_bytes() == BIG[:-1]
    hub.always = Fault()
    tool.ok()
    assert tool.complete()
    assert hub.gets("tokenizer.model") == []


def test_mirror_without_hashes(hub: FakeHub, tool: Tool) -> None:
    hub.etag = lambda content: "W/some-etag"
    assert "reports no hash; only the length was checked" in tool.ok()
    assert tool.complete()


def test_page_instead_of_a_file_without_a_hash(hub: FakeHub, tool: Tool) -> None:
    """A page sent as a file is recognized by its first bytes."""
    hub.etag = lambda content: "W/some-etag"
    hub.faults = [Fault(), Fault(change=lambda content: b"<html>" + content[6:])]
    assert "sent an HTML page (such as a login or error page)" in tool.fails()
    assert tool.has_no_wrong_file()


@pytest.mark.slow
def test_page_while_resuming_keeps_the_part(hub: FakeHub, tool: Tool) -> None:
    """The .part is unchanged, and the next run continues it."""
    hub.faults = [Fault(), Fault(cut_at=len(BIG) // 2), Fault(**PAGE["always"].__dict__)]
    hub.storage_etag = "v1"
    hub.faults[2].ignores_range = True
    assert "sent an HTML page" in tool.fails()
    assert (tool.target / f"{CHECKPOINT}.part").stat().st_size == len(BIG) // 2
    tool.ok()
    assert tool.complete()
    assert sum(request.sent for request in hub.gets(CHECKPOINT)) - len(BIG) <= MIB


@pytest.mark.slow
@pytest.mark.parametrize("content_range", [None, "Bytes  {start}-{end}/*"])
def test_incomplete_content_range(hub: FakeHub, tool: Tool, content_range: str | None) -> None:
    hub.faults = [Fault(), Fault(cut_at=len(BIG) // 2)]
    hub.always = Fault(content_range=content_range)
    tool.ok()
    assert tool.complete()
    assert len(hub.gets(CHECKPOINT)) == 2


def test_source_that_always_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command also gives up if the source starts over each time and never gets further."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    source = Unsteady(pieces=500)
    source.starts_over = True
    file = RemoteFile("weights", "weights", len(BIG), None, "v1")
    with pytest.raises(UserError, match=r"run the same command to continue"):
        fetch.download(source, [file], tmp_path)
    assert len(slept) < 20


@pytest.mark.slow
def test_leftovers_of_a_kill_are_cleaned_up(hub: FakeHub, tool: Tool) -> None:
    """After a kill between the last rename and the cleanup, or with a file copied by hand next to its .part."""
    tool.ok()
    (tool.target / f"{CHECKPOINT}.part").write_bytes(BIG[:MIB])
    assert "not complete" in tool.fails("--verify")
    tool.ok()
    tool.ok("--verify")
    assert tool.complete()
    shutil.copy(tool.target / ".download" / f"{CHECKPOINT}.json", tool.target / ".download" / f"{CHECKPOINT}.part.json")
    tool.ok()
    tool.ok("--verify")


@pytest.mark.slow
def test_part_without_a_record_is_resumed(hub: FakeHub, tool: Tool) -> None:
    hub.faults = [Fault(), Fault(cut_at=len(BIG) // 2)]
    hub.always = Fault(status=429)
    tool.fails()
    shutil.rmtree(tool.target / ".download")
    hub.always = Fault()
    tool.ok()
    assert tool.complete()
    assert hub.gets(CHECKPOINT)[-1].start == len(BIG) // 2


@pytest.mark.slow
def test_truncated_file_with_its_times_restored(hub: FakeHub, tool: Tool) -> None:
    tool.ok()
    file = tool.target / CHECKPOINT
    times = file.stat()
    os.truncate(file, 100)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    tool.ok()
    assert tool.complete()


def test_verify_knows_the_files_of_the_model(hub: FakeHub, tool: Tool) -> None:
    """The download ended after the small files, before any byte of the checkpoint."""
    hub.faults = [Fault()]
    hub.always = Fault(status=429)
    tool.fails()
    (tool.target / f"{CHECKPOINT}.part").unlink(missing_ok=True)
    assert f"{CHECKPOINT}: is missing" in tool.fails("--verify")


@pytest.mark.slow
@pytest.mark.parametrize("record", ['{"size": "abc"}', "[" * 99999, '{"digest": {"algorithm": "rot13", "value": "x"}}'])
def test_damaged_record_is_ignored(hub: FakeHub, tool: Tool, record: str) -> None:
    tool.ok()
    file = tool.target / ".download" / f"{CHECKPOINT}.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, **json.loads(record)}) if record.endswith("}") else record)
    tool.ok("--verify")
    tool.ok()
    assert len(hub.gets(CHECKPOINT)) == 1


@pytest.mark.slow
def test_small_files_are_not_shared_with_the_cache(hub: FakeHub, tool: Tool) -> None:
    blobs = fill_cache(tool)
    tool.ok()
    (tool.target / "params.json").write_text("changed in place")
    assert b'{"dim": 64}' in [blob.read_bytes() for blob in blobs]


@pytest.mark.slow
def test_cache_on_a_disk_that_is_nearly_full(hub: FakeHub, tool: Tool) -> None:
    """A link needs no space."""
    with small_disk(tool.folder / "disk", 40):
        tool.environment["HF_HOME"] = str(tool.folder / "disk" / "hf")
        fill_cache(tool)
        tool.target = tool.folder / "disk" / "model"
        tool.ok("--to", str(tool.target))
        assert tool.complete()


def test_host_in_capitals(hub: FakeHub, tool: Tool) -> None:
    hub.large = 1 << 40
    tool.ok(HF_ENDPOINT=hub.url.replace("127.0.0.1", "LocalHost"))
    assert tool.complete()


def test_options_in_the_docs() -> None:
    """Every option in backticks on docs/download.md is one of the command, and its value is accepted."""
    page = (ROOT / "docs" / "download.md").read_text()
    spans = re.findall(r"`(?:python download\.py )?(--[^`]+)`", page)
    spans = [span for span in spans if span != "--weights"]  # the page names it as an option of the other commands
    assert len(spans) > 8
    parser = build_parser()
    for span in spans:
        action = parser._option_string_actions.get(span)
        if action is None or action.nargs == 0:  # not an option that is named without its value
            options = parser.parse_args(span.split())
            assert options.model in {None, "NAME", *MODELS} or "/" in options.model


def test_sizes_in_the_list() -> None:
    """Two bytes per parameter, by the shapes in Meta's own list."""
    import llama_models.sku_list as sku_list

    from llama3_raw import Params
    from llama3_raw.weights import tensor_specs

    sizes: dict[str, list[float]] = {}  # of each variant
    for family in ("llama3_family", "llama3_1_family", "llama3_2_family", "llama3_3_family"):
        for model in getattr(sku_list, family)():
            content = dict(model.arch_args)
            if any(key.startswith("vision_") or key.endswith("_args") for key in content):
                continue
            tied = content["dim"] < 4096
            params = Params.from_meta(content)
            count = sum(math.prod(spec.shape) for spec in tensor_specs(params, tied))
            repo = model.huggingface_repo.replace("/Llama-3-", "/Meta-Llama-3-").removesuffix("-FP8")
            sizes.setdefault(repo, []).append(2 * count / 1e9)
    # the original files of 405B are in separate folders, one for each way to split them
    assert {entry.repo for entry in MODELS.values()} == {repo for repo in sizes if "405B" not in repo}
    for entry in MODELS.values():
        assert any(abs(size - entry.gigabytes) < 0.06 for size in sizes[entry.repo]), entry


def test_torch_is_not_imported() -> None:
    code = "import sys, llama3_raw.download.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
