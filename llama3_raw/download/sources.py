"""Where a model's files can be fetched from: a repository on the hub, a blob store, a local folder.

And what it means when they refuse: each reason with the next step to take.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import blobfile
import httpx2
from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers  # type: ignore[attr-defined]

from ..errors import UserError, in_short

_PIECE = 1 << 20  # bytes that a blob store is asked for at once


ALGORITHMS = ("sha256", "git-sha1", "md5")


class Digest(NamedTuple):
    """What the content of a file hashes to: "sha256", "git-sha1" (as git hashes a blob) or "md5", in hex."""

    algorithm: str
    value: str

    def __str__(self) -> str:
        return f"{self.algorithm} {self.value}"


class RemoteFile(NamedTuple):
    """A file to fetch."""

    name: str  # in the model's folder
    place: str  # in the repository, or its whole address in a blob store
    size: int  # bytes
    digest: Digest | None  # None: the source has none
    version: str  # changes when the content does


class Stream(NamedTuple):
    """The bytes of a remote file as they come."""

    start: int  # the position of the first one: as asked for, or 0 where the source begins anew
    total: int | None  # bytes of the whole file, if the source tells
    validator: str | None  # what If-Range takes to go on with this very content
    chunks: Iterator[bytes]


class Interrupted(Exception):
    """The bytes stopped coming; another try may go on. The message says why."""


class Source(Protocol):
    """Where a model's files are."""

    def find(self, place: str) -> RemoteFile | None:
        """The file at `place`, "original/params.json" say; None if there is none. Raises UserError."""

    def open(self, file: RemoteFile, start: int, validator: str | None) -> contextlib.AbstractContextManager[Stream]:
        """The file from byte `start` on. Raises UserError, and Interrupted for what may pass."""

    def local_copy(self, file: RemoteFile) -> Path | None:
        """The same file where it is on this machine already, to be linked."""


class Hub:
    """A repository on the Hugging Face hub, or on a mirror by HF_ENDPOINT."""

    def __init__(self, repo: str, revision: str, token: str | None):
        try:
            endpoint = urlsplit(constants.ENDPOINT)
            if endpoint.scheme not in ("http", "https") or not endpoint.hostname or endpoint.port == 0:
                raise ValueError("no address of a server")
        except ValueError as error:
            raise UserError(f"HF_ENDPOINT {constants.ENDPOINT}: {error}; should be like https://host") from error
        try:
            get_session()
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"the settings of the network cannot be used ({error}); check SSL_CERT_FILE, HTTPS_PROXY, ALL_PROXY"
            ) from error
        self.repo = repo
        self.revision = revision
        self.token = token
        self.commit: str | None = None
        self.locations: dict[str, str] = {}  # place -> where its bytes are: the hub, or a storage host's signed address

    def __str__(self) -> str:
        return f"{self.repo} at {self.revision}"

    def find(self, place: str) -> RemoteFile | None:
        """As in `Source`, by a HEAD request; offline, by what the Hugging Face cache has."""
        name = place.rpartition("/")[2]
        if constants.is_offline_mode():
            return self._find_in_cache(place, name)
        try:
            url = hf_hub_url(self.repo, place, revision=self.revision)
            metadata = get_hf_file_metadata(url, token=self.token or False, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HFValidationError as error:
            raise UserError(f"--model {self.repo}: not a name of a repository; give org/repo") from error
        except HfHubHTTPError as error:
            code = error.response.headers.get("X-Error-Code")
            if error.response.status_code == 404 and code in ("EntryNotFound", None):
                return None
            raise self._refusal(error.response) from error
        except httpx2.HTTPError as error:
            raise _no_connection(error, constants.ENDPOINT) from error
        digest = _digest_of_etag(metadata.etag or "")
        if not metadata.etag or metadata.size is None or (metadata.commit_hash is None and digest is None):
            raise UserError(
                f"{constants.ENDPOINT} does not answer as a hub does (no commit, ETag or size for {place}); "
                "is it a login page of this network, or a wrong HF_ENDPOINT?"
            )
        if metadata.commit_hash != (self.commit or metadata.commit_hash):
            raise UserError(f"{self.repo}: {self.revision} changed just now; run the same command again")
        self.commit = metadata.commit_hash
        self.locations[place] = metadata.location
        return RemoteFile(name, place, metadata.size, digest, metadata.etag)

    def _find_in_cache(self, place: str, name: str) -> RemoteFile | None:
        cached = try_to_load_from_cache(self.repo, place, revision=self.revision)
        if not isinstance(cached, str):
            return None
        blob = Path(cached).resolve()  # named by its ETag
        self.locations[place] = constants.ENDPOINT
        return RemoteFile(name, place, blob.stat().st_size, _digest_of_etag(blob.name), blob.name)

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, validator: str | None) -> Iterator[Stream]:
        """As in `Source`, by a GET request."""
        url = self.locations[file.place]
        on_the_hub = _origin(url) == _origin(constants.ENDPOINT)
        headers = build_hf_headers(token=(self.token or False) if on_the_hub else False)  # the token goes nowhere else
        headers["Accept-Encoding"] = "identity"
        if start:
            headers["Range"] = f"bytes={start}-"
            if validator:
                headers["If-Range"] = validator
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                self._check(response, file)
                begins_at, total = _position(response, start)
                if begins_at not in (0, start):
                    raise Interrupted(f"{_host(url)} sent bytes from {begins_at:,} on, asked for {start:,}")
                yield Stream(begins_at, total, _validator(response), response.iter_raw())
        except OfflineModeIsEnabled as error:
            raise UserError(
                f"{file.name}: the copy in the Hugging Face cache is damaged, and HF_HUB_OFFLINE is set; unset it"
            ) from error
        except httpx2.HTTPError as error:
            explained = _no_connection(error, url)
            if _is_certificate_failure(error):
                raise explained from error
            raise Interrupted(str(explained).rpartition(";")[0]) from error
        except (httpx2.InvalidURL, ValueError) as error:
            raise UserError(f"{file.name}: the hub points to {url}, which is no address; try again later") from error

    def _check(self, response: httpx2.Response, file: RemoteFile) -> None:
        """Raises for a response that does not bring the bytes of the file."""
        status = response.status_code
        on_the_hub = _origin(str(response.url)) == _origin(constants.ENDPOINT)
        if status == 416:
            raise Interrupted(f"{_host(str(response.url))} has no bytes there")
        if status >= 500 or status == 408:
            raise Interrupted(f"{_host(str(response.url))} answered {status}")
        if status >= 400 and status != 429 and not on_the_hub:  # signed addresses expire
            if self.find(file.place) != file:
                raise UserError(f"{file.name}: changed on the hub just now; run the same command again")
            raise Interrupted(f"the address at {_host(str(response.url))} had expired ({status})")
        if status >= 400:
            raise self._refusal(response)

    def local_copy(self, file: RemoteFile) -> Path | None:
        """As in `Source`: in the Hugging Face cache."""
        cached = try_to_load_from_cache(self.repo, file.place, revision=self.commit or self.revision)
        return Path(cached).resolve() if isinstance(cached, str) else None

    def _refusal(self, response: httpx2.Response) -> UserError:  # noqa: C901  # one reason after the other
        """Why the hub said no, and the next step to take."""
        status = response.status_code
        code, said = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")
        page, tokens = f"{constants.ENDPOINT}/{self.repo}", f"{constants.ENDPOINT}/settings/tokens"
        if status == 429:
            limit = parse_ratelimit_headers(response.headers)
            wait = str(limit.reset_in_seconds) if limit else response.headers.get("Retry-After", "")
            again = f"{wait} s" if wait.isdecimal() else "some minutes"
            return UserError(f"{_host(str(response.url))}: too many requests; try again in {again}")
        if status >= 500:
            return UserError(f"{_host(page)}: the server is down (it answered {status}); try again later")
        if code == "RevisionNotFound":
            return UserError(f"--revision {self.revision}: {self.repo} has no such branch, tag or commit; see {page}")
        if "fine-grained" in said:
            return UserError(f"{self.repo}: the token may not read gated repositories; allow it to at {tokens}")
        if status == 401 and self.token:  # whom the hub knows gets a 403 or a 404
            return UserError(f"the token is not valid ({said or status}); make one at {tokens}, then `hf auth login`")
        if code == "GatedRepo" or re.search("awaiting|authorized list", said):
            if not self.token:
                return UserError(
                    f"{self.repo}: needs a token, and there is none; accept the licence at {page}, make a token at "
                    f"{tokens}, then run `hf auth login`, set HF_TOKEN or give --token"
                )
            if re.search("awaiting|pending", said):
                return UserError(f"{self.repo}: your request for access is pending; wait for the mail, or see {page}")
            return UserError(f"{self.repo}: the licence is not accepted; accept it at {page}, then run this again")
        if code == "RepoNotFound" or status == 404:
            hint = "" if self.token else "; if it is private, give a token with --token or HF_TOKEN"
            return UserError(f"--model {self.repo}: there is no such repository; check the name at {page}{hint}")
        if status == 401:
            return UserError(
                f"{self.repo}: needs a token, and there is none; make one at {tokens}, then `hf auth login`"
            )
        if status == 403:
            return UserError(
                f"{self.repo}: {_host(page)} refuses ({said or status}); check the token's rights at {tokens}"
            )
        return UserError(f"{self.repo}: {_host(page)} answered {status} {said}; check HF_ENDPOINT and HTTPS_PROXY")


class BlobStore:
    """A folder at gs://, az:// or on this machine, as blobfile reads it."""

    def __init__(self, root: str):
        if not root or ("://" in root and not root.startswith(("gs://", "az://", "https://"))):
            raise UserError(
                f"--from {root}: should be gs://bucket/folder, az://account/container/folder or a local folder"
            )
        self.root = root.rstrip("/")
        self.context = blobfile.create_context(retry_limit=5, log_callback=lambda line: None)

    def __str__(self) -> str:
        return self.root

    def find(self, place: str) -> RemoteFile | None:
        """As in `Source`; "original/params.json" may lie at the top as well."""
        name = place.rpartition("/")[2]
        for address in (f"{self.root}/{place}", f"{self.root}/{name}"):
            with self._errors(address):
                if self.context.exists(address):
                    found = self.context.stat(address)
                    digest = Digest("md5", found.md5) if found.md5 else None
                    return RemoteFile(name, address, found.size, digest, found.version or f"{found.size} {found.mtime}")
        return None

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, validator: str | None) -> Iterator[Stream]:
        """As in `Source`."""
        with contextlib.closing(self._read(file.place, start)) as chunks:
            yield Stream(start, file.size, None, chunks)

    def _read(self, address: str, start: int) -> Generator[bytes, None, None]:
        with (
            self._errors(address),
            self.context.BlobFile(address, "rb", streaming=True, buffer_size=_PIECE) as opened,
        ):
            opened.seek(start)
            while chunk := opened.read(_PIECE):
                yield chunk

    def local_copy(self, file: RemoteFile) -> Path | None:
        """As in `Source`: a local folder is copied like any other."""
        return None

    @contextlib.contextmanager
    def _errors(self, address: str) -> Iterator[None]:
        try:
            yield
        except (blobfile.Error, OSError, ValueError) as error:  # ValueError: a key that is none
            reason = in_short(getattr(error, "message", None) or getattr(error, "strerror", None) or error)
            raise UserError(f"--from {address}: {reason}; check the address and your rights there") from error


def _digest_of_etag(etag: str) -> Digest | None:
    """The hub's ETag is the sha256 of a large file and the git blob SHA-1 of a small one; a mirror's may be neither."""
    kinds = {64: "sha256", 40: "git-sha1"}
    return Digest(kinds[len(etag)], etag.lower()) if re.fullmatch(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{40}", etag) else None


def _position(response: httpx2.Response, asked: int) -> tuple[int, int | None]:
    """The position of the first byte that comes, and the length of the whole file if the server tells."""
    if response.status_code == 206:
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes\s+(\d+)-\d+/(\d+|\*)", content_range.strip(), re.IGNORECASE)
        if match is None:
            return asked, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdecimal() else None


def _validator(response: httpx2.Response) -> str | None:
    """A strong ETag, or the date of the last change. (RFC 9110, section 13.1.5)"""
    etag: str | None = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]  # without a password


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_certificate_failure(error: Exception) -> bool:
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)) or "CERTIFICATE" in str(
        error
    )


def _no_connection(error: httpx2.HTTPError, url: str) -> UserError:
    """Why a server cannot be reached, and the next step to take."""
    host = _host(url)
    if _is_certificate_failure(error):
        return UserError(
            f"{host}: its certificate is not trusted ({error}); behind a company's proxy, set SSL_CERT_FILE to its "
            "certificate; else look at this machine's date and certificates"
        )
    if isinstance(error, httpx2.ProxyError):
        return UserError(f"the proxy does not let through to {host} ({error}); check HTTPS_PROXY")
    if any(isinstance(cause, socket.gaierror) for cause in _causes(error)):
        return UserError(
            f"{host}: its address cannot be found; this machine seems to be offline; connect it, run again"
        )
    if isinstance(error, httpx2.ConnectError):
        return UserError(f"{host}: the server is down or out of reach ({error}); try again later")
    if isinstance(error, httpx2.TimeoutException):
        return UserError(f"{host}: the server does not answer; try again later")
    return UserError(f"{host}: the connection broke ({error or type(error).__name__}); try again")
