"""Sources of a model's files: a repository on the Hugging Face hub, a blob store, or a local folder.

Each reason for a refusal becomes a UserError that says what to do.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import socket
import ssl
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers  # type: ignore[attr-defined]

from ..errors import UserError, in_short

if TYPE_CHECKING:
    import httpx2

_CHUNK = 1 << 20  # bytes read from a folder or a blob store at once


ALGORITHMS = ("sha256", "git-sha1", "md5")


class Digest(NamedTuple):
    """The hash of a file's content in hex, by "sha256", "git-sha1" (as git hashes a blob) or "md5"."""

    algorithm: str
    value: str

    def __str__(self) -> str:
        return f"{self.algorithm} {self.value}"


class RemoteFile(NamedTuple):
    """A file to fetch."""

    name: str  # in the model's folder
    path: str  # in the repository, or the whole address in a folder or a blob store
    size: int  # bytes
    digest: Digest | None  # None if the source reports none
    version: str  # changes when the content does


class Stream(NamedTuple):
    """The bytes of a remote file, as they arrive."""

    start: int  # position of the first byte: as requested, or 0 if the source starts over
    total: int | None  # bytes of the whole file, if the source reports them
    validator: str | None  # for If-Range, to resume only if the content is still the same
    chunks: Iterator[bytes]


class Interrupted(Exception):
    """The stream broke off; another attempt may resume it. The message is the reason."""


class Source(Protocol):
    """A place that has a model's files."""

    def find(self, path: str) -> RemoteFile | None:
        """Return the file at `path`, such as "original/params.json", or None if there is none. Raises UserError."""

    def names(self) -> list[str]:
        """Return the paths of all files, for an error message; none if the source does not list them."""

    def open(self, file: RemoteFile, start: int, validator: str | None) -> contextlib.AbstractContextManager[Stream]:
        """Open the file at byte `start`. Raises UserError, or Interrupted for an error that may be temporary."""

    def local_copy(self, file: RemoteFile) -> Path | None:
        """Return a copy of the file on this machine that can be linked, or None."""


class Hub:
    """A repository on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""

    def __init__(self, repo: str, revision: str, token: str | None):
        try:
            endpoint = urlsplit(constants.ENDPOINT)
            if endpoint.scheme not in ("http", "https") or not endpoint.hostname or endpoint.port == 0:
                raise ValueError("not the address of a server")
        except ValueError as error:
            raise UserError(f"HF_ENDPOINT {constants.ENDPOINT}: {error}; should be like https://host") from error
        try:
            get_session()
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"the network settings cannot be used ({error}); check SSL_CERT_FILE, HTTPS_PROXY, ALL_PROXY"
            ) from error
        self.repo = repo
        self.revision = revision
        self.token = token
        self.commit: str | None = None
        self.locations: dict[str, str] = {}  # path -> address of its bytes, at the hub or (signed) at a storage host

    def __str__(self) -> str:
        return f"{self.repo} at {self.revision}"

    def find(self, path: str) -> RemoteFile | None:
        """As in `Source`, by a HEAD request, or offline in the Hugging Face cache."""
        name = path.rpartition("/")[2]
        if constants.is_offline_mode():
            return self._find_in_cache(path, name)
        try:
            url = hf_hub_url(self.repo, path, revision=self.revision)
            metadata = get_hf_file_metadata(url, token=self.token or False, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except HFValidationError as error:
            raise UserError(f"--model {self.repo}: not a repository name; give org/repo") from error
        except HfHubHTTPError as error:
            code = error.response.headers.get("X-Error-Code")
            if error.response.status_code == 404 and code in ("EntryNotFound", None):
                return None
            raise self._refusal(error.response) from error
        except _http().HTTPError as error:
            raise _connection_error(error, constants.ENDPOINT) from error
        digest = _digest_of_etag(metadata.etag or "")
        if not metadata.etag or metadata.size is None or (metadata.commit_hash is None and digest is None):
            raise UserError(
                f"{constants.ENDPOINT} does not answer like a hub (no commit, ETag or size for {path}); is it a "
                "login page of this network, or a wrong HF_ENDPOINT?"
            )
        if metadata.commit_hash != (self.commit or metadata.commit_hash):
            raise UserError(f"{self.repo}: {self.revision} changed just now; run the same command again")
        self.commit = metadata.commit_hash
        self.locations[path] = metadata.location
        return RemoteFile(name, path, metadata.size, digest, metadata.etag)

    def names(self) -> list[str]:
        """As in `Source`, by the hub's API, which a mirror may lack."""
        try:
            return HfApi().list_repo_files(self.repo, revision=self.revision, token=self.token or False)
        except (HfHubHTTPError, _http().HTTPError, OSError, ValueError, KeyError, TypeError):
            return []

    def _find_in_cache(self, path: str, name: str) -> RemoteFile | None:
        cached = try_to_load_from_cache(self.repo, path, revision=self.revision)
        if not isinstance(cached, str):
            return None
        blob = Path(cached).resolve()  # named by its ETag
        self.locations[path] = constants.ENDPOINT
        return RemoteFile(name, path, blob.stat().st_size, _digest_of_etag(blob.name), blob.name)

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, validator: str | None) -> Iterator[Stream]:
        """As in `Source`, by a GET request."""
        url = self.locations[file.path]
        on_the_hub = _origin(url) == _origin(constants.ENDPOINT)
        headers = build_hf_headers(
            token=(self.token or False) if on_the_hub else False
        )  # the token is sent to no other host
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
                    raise Interrupted(f"{_host(url)} sent bytes from {begins_at:,}, but {start:,} was requested")
                yield Stream(begins_at, total, _validator(response), response.iter_raw())
        except OfflineModeIsEnabled as error:
            raise UserError(
                f"{file.name}: the copy in the Hugging Face cache is damaged, and HF_HUB_OFFLINE is set; unset it"
            ) from error
        except _http().HTTPError as error:
            explained = _connection_error(error, url)
            if _is_certificate_failure(error):
                raise explained from error
            raise Interrupted(str(explained).rpartition(";")[0]) from error
        except (_http().InvalidURL, ValueError) as error:
            raise UserError(
                f"{file.name}: the hub redirects to {url}, which is not an address; try again later"
            ) from error

    def _check(self, response: httpx2.Response, file: RemoteFile) -> None:
        """Raise UserError or Interrupted for a response that does not contain the bytes of the file."""
        status = response.status_code
        on_the_hub = _origin(str(response.url)) == _origin(constants.ENDPOINT)
        if status == 416:
            raise Interrupted(f"{_host(str(response.url))} has no bytes at that position")
        if status >= 500 or status == 408:
            raise Interrupted(f"{_host(str(response.url))} answered {status}")
        if status >= 400 and status != 429 and not on_the_hub:  # signed addresses expire
            if self.find(file.path) != file:
                raise UserError(f"{file.name}: changed on the hub just now; run the same command again")
            raise Interrupted(f"the address at {_host(str(response.url))} had expired ({status})")
        if status >= 400:
            raise self._refusal(response)

    def local_copy(self, file: RemoteFile) -> Path | None:
        """As in `Source`, from the Hugging Face cache."""
        cached = try_to_load_from_cache(self.repo, file.path, revision=self.commit or self.revision)
        return Path(cached).resolve() if isinstance(cached, str) else None

    def _refusal(self, response: httpx2.Response) -> UserError:  # noqa: C901  # one reason after the other
        """Return why the hub refused a request, and what to do."""
        status = response.status_code
        code, message = response.headers.get("X-Error-Code", ""), response.headers.get("X-Error-Message", "")
        page, tokens = f"{constants.ENDPOINT}/{self.repo}", f"{constants.ENDPOINT}/settings/tokens"
        if status == 429:
            limit = parse_ratelimit_headers(response.headers)
            wait = str(limit.reset_in_seconds) if limit else response.headers.get("Retry-After", "")
            again = f"{wait} s" if wait.isdecimal() else "a few minutes"
            return UserError(f"{_host(str(response.url))}: too many requests; try again in {again}")
        if status >= 500:
            return UserError(f"{_host(page)}: the server is down (it answered {status}); try again later")
        if code == "RevisionNotFound":
            return UserError(f"--revision {self.revision}: {self.repo} has no such branch, tag or commit; see {page}")
        if "fine-grained" in message:
            return UserError(f"{self.repo}: the token may not read gated repositories; allow that at {tokens}")
        if status == 401 and self.token:  # a valid token would get a 403 or a 404
            return UserError(
                f"the token is not valid ({message or status}); create one at {tokens}, then `hf auth login`"
            )
        if code == "GatedRepo" or re.search("awaiting|authorized list", message):
            if not self.token:
                return UserError(
                    f"{self.repo}: needs a token, and there is none; accept the licence at {page}, create a token at "
                    f"{tokens}, then run `hf auth login`, set HF_TOKEN or give --token"
                )
            if re.search("awaiting|pending", message):
                return UserError(f"{self.repo}: your request for access is pending; wait for the mail, or see {page}")
            return UserError(f"{self.repo}: the licence is not accepted; accept it at {page}, then run this again")
        if code == "RepoNotFound" or status == 404:
            hint = "" if self.token else "; if it is private, give a token with --token or HF_TOKEN"
            return UserError(f"--model {self.repo}: there is no such repository; check the name at {page}{hint}")
        if status == 401:
            return UserError(
                f"{self.repo}: needs a token, and there is none; create one at {tokens}, then `hf auth login`"
            )
        if status == 403:
            return UserError(
                f"{self.repo}: {_host(page)} refuses ({message or status}); check the token's permissions at {tokens}"
            )
        return UserError(f"{self.repo}: {_host(page)} answered {status} {message}; check HF_ENDPOINT and HTTPS_PROXY")


class LocalFolder:
    """A folder on this machine. Its files are copied, never linked."""

    def __init__(self, root: str):
        if not root:
            raise UserError("--from: is empty; give the address of a folder")
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def find(self, path: str) -> RemoteFile | None:
        """As in `Source`; "original/params.json" may also be at the top."""
        name = path.rpartition("/")[2]
        for file in (self.root / path, self.root / name):
            with _errors_of_mirror(file, OSError):
                if file.exists():
                    stat = file.stat()
                    return RemoteFile(name, str(file), stat.st_size, None, f"{stat.st_size} {stat.st_mtime}")
        return None

    def names(self) -> list[str]:
        """As in `Source`, but only those at the top."""
        with _errors_of_mirror(self.root, OSError):
            return sorted(file.name for file in self.root.iterdir())

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, validator: str | None) -> Iterator[Stream]:
        """As in `Source`."""
        with contextlib.closing(self._read(file.path, start)) as chunks:
            yield Stream(start, file.size, None, chunks)

    def _read(self, path: str, start: int) -> Generator[bytes, None, None]:
        with _errors_of_mirror(path, OSError), open(path, "rb") as opened:
            opened.seek(start)
            while chunk := opened.read(_CHUNK):
                yield chunk

    def local_copy(self, file: RemoteFile) -> Path | None:
        """Return None: the user's own file is not linked."""
        return None


class BlobStore:
    """A folder at gs:// or az://, read by blobfile."""

    def __init__(self, root: str):
        if not root.startswith(("gs://", "az://", "https://")):
            raise UserError(
                f"--from {root}: should be gs://bucket/folder, az://account/container/folder or a local folder"
            )
        self.root = root.rstrip("/")
        try:
            import blobfile  # of all commands, only this option needs it
        except ModuleNotFoundError as error:
            raise UserError(f"--from {root}: needs the package blobfile ({error}); pip install blobfile") from error
        self._errors = blobfile.Error, OSError, ValueError  # ValueError: a malformed key
        self.context = blobfile.create_context(retry_limit=5, log_callback=lambda line: None)

    def __str__(self) -> str:
        return self.root

    def find(self, path: str) -> RemoteFile | None:
        """As in `Source`; "original/params.json" may also be at the top."""
        name = path.rpartition("/")[2]
        for address in (f"{self.root}/{path}", f"{self.root}/{name}"):
            with _errors_of_mirror(address, *self._errors):
                if self.context.exists(address):
                    stat = self.context.stat(address)
                    digest = Digest("md5", stat.md5) if stat.md5 else None
                    return RemoteFile(name, address, stat.size, digest, stat.version or f"{stat.size} {stat.mtime}")
        return None

    def names(self) -> list[str]:
        """As in `Source`, but only those at the top."""
        with _errors_of_mirror(self.root, *self._errors):
            return sorted(self.context.listdir(self.root))

    @contextlib.contextmanager
    def open(self, file: RemoteFile, start: int, validator: str | None) -> Iterator[Stream]:
        """As in `Source`."""
        with contextlib.closing(self._read(file.path, start)) as chunks:
            yield Stream(start, file.size, None, chunks)

    def _read(self, address: str, start: int) -> Generator[bytes, None, None]:
        with (
            _errors_of_mirror(address, *self._errors),
            self.context.BlobFile(address, "rb", streaming=True, buffer_size=_CHUNK) as opened,
        ):
            opened.seek(start)
            while chunk := opened.read(_CHUNK):
                yield chunk

    def local_copy(self, file: RemoteFile) -> Path | None:
        """Return None: nothing is on this machine."""
        return None


def mirror(address: str) -> LocalFolder | BlobStore:
    """Return the source that --from names. Raises UserError for an address of another kind."""
    return BlobStore(address) if "://" in address else LocalFolder(address)


@contextlib.contextmanager
def _errors_of_mirror(address: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raise these kinds of errors as UserError."""
    try:
        yield
    except kinds as error:
        reason = in_short(getattr(error, "message", None) or getattr(error, "strerror", None) or error)
        raise UserError(f"--from {address}: {reason}; check the address and your permissions") from error


def _digest_of_etag(etag: str) -> Digest | None:
    """Return the hash in an ETag: at the hub, the sha256 of a large file or the git SHA-1 of a small one; else None."""
    kinds = {64: "sha256", 40: "git-sha1"}
    return Digest(kinds[len(etag)], etag.lower()) if re.fullmatch(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{40}", etag) else None


def _position(response: httpx2.Response, requested: int) -> tuple[int, int | None]:
    """Return the position of the first byte in a response, and the length of the whole file or None."""
    if response.status_code == 206:
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes\s+(\d+)-\d+/(\d+|\*)", content_range.strip(), re.IGNORECASE)
        if match is None:
            return requested, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdecimal() else None


def _validator(response: httpx2.Response) -> str | None:
    """Return a strong ETag, or the date of the last change. (RFC 9110, section 13.1.5)"""
    etag: str | None = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _http() -> Any:
    """Return the library of huggingface_hub's sessions, and of their errors: httpx2, or httpx before its version 2."""
    return importlib.import_module("httpx" if int(huggingface_hub.__version__.partition(".")[0]) < 2 else "httpx2")


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


def _connection_error(error: httpx2.HTTPError, url: str) -> UserError:
    """Return why a server cannot be reached, and what to do."""
    host = _host(url)
    if _is_certificate_failure(error):
        return UserError(
            f"{host}: its certificate is not trusted ({error}); behind a company's proxy, set SSL_CERT_FILE to its "
            "certificate; otherwise check this machine's date and certificates"
        )
    if isinstance(error, _http().ProxyError):
        return UserError(f"the proxy refuses the connection to {host} ({error}); check HTTPS_PROXY")
    if any(isinstance(cause, socket.gaierror) for cause in _causes(error)):
        return UserError(
            f"{host}: its address cannot be resolved; this machine seems to be offline; connect it and run again"
        )
    if isinstance(error, _http().ConnectError):
        return UserError(f"{host}: the server is down or out of reach ({error}); try again later")
    if isinstance(error, _http().TimeoutException):
        return UserError(f"{host}: the server does not answer; try again later")
    return UserError(f"{host}: the connection broke ({error or type(error).__name__}); try again")
