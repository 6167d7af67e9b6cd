"""Reading whole files, with errors that say what is wrong with them, and writing files and folders atomically."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, in_short

_SPARE_BYTES = 10_000_000  # disk space for small files


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Return a temporary file to write to; when the block ends, it is flushed to the disk and renamed to `path`.

    Until then an existing file stays; the new file gets its permissions. If `path` is a link, its target is replaced.
    Raises UserError if the file cannot be written; then nothing of it is left.
    """
    try:
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Do what `atomic_write` does, but raise OSError as it comes."""
    try:
        target = Path(path).resolve()
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{path}: cannot be written ({error}); choose another place") from error
    if target.exists() and not target.is_file():
        raise UserError(f"{path}: is not a file; choose another name")
    folder = _temporary_folder(target)  # with a file of the same name in it, because torch.save stores that name
    try:
        folder.mkdir()
        part = folder / target.name
        part.touch()
        mode = (target if target.exists() else part).stat().st_mode  # of a new file: set by the umask
        yield part
        _flush(part)
        part.chmod(stat.S_IMODE(mode))
        part.replace(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, n_bytes: int) -> Iterator[Path]:
    """Return a temporary folder for files of `n_bytes`; when the block ends, they are flushed and it gets its name.

    Raises UserError if `folder` exists and is not empty, if the disk is too small, or if the system refuses to write;
    then nothing is left of it, and neither after Ctrl-C.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not empty; name another folder, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = _temporary_folder(folder)
        check_disk(folder, folder.parent, n_bytes)
        part.mkdir()
        try:
            yield part
            for file in part.rglob("*"):
                _flush(file)
            _flush(part)
            part.rename(folder)
            _flush(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # no longer exists if it was renamed
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {in_short(error)}; name another folder") from error


def _temporary_folder(target: Path) -> Path:
    """Return a path next to `target`, after removing those that killed processes of this machine left there."""
    prefix = f"{target.name}-{platform.node()}-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*.part"):
        import psutil  # only here, because a command such as download does without it

        pid = left.name[len(prefix) : -len(".part")]
        # in a container every run may have the same process id, so a folder with this one's is left over too
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    return target.parent / f"{prefix}{os.getpid()}.part"


def check_disk(target: Path, folder: Path, n_bytes: int) -> None:
    """Raise UserError if the disk of `folder` has less than `n_bytes` free for `target`."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE_BYTES:
        raise UserError(
            f"{target}: {n_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on that disk; free some, or "
            "choose another place"
        )


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where they survive a power failure."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # the file may be read-only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def page_or_pointer(beginning: bytes) -> str | None:
    """Return what a file is instead of a model file, judging by its first bytes, as text; None for other content."""
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # some pages begin with a byte order mark
    if text.startswith(b"<") and not text.startswith(b"<unk>"):
        return "an HTML page (such as a login or error page)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file it points to"
    return None


def read_beginning(path: Path) -> bytes:
    """Return the first bytes of a model file. Raises UserError if it is missing, empty, or a page or a pointer."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise UserError(f"{path}: is not a file; replace it with the model's file")
        with open(path, "rb") as file:
            beginning = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check its name and permissions") from error
    if not beginning:
        raise UserError(f"{path}: the file is empty; download it again")
    other = page_or_pointer(beginning)
    if other:
        way_out = "run `git lfs pull`" if "git-lfs" in other else "download the file itself"
        raise UserError(f"{path}: this is {other}; {way_out}")
    return beginning


def read_small_file(path: Path) -> bytes:
    """Return the content of a small file. Raises UserError as `read_beginning` does, and for 100 MB or more."""
    read_beginning(path)
    size = path.stat().st_size
    if size >= 100_000_000:
        raise UserError(f"{path}: has {size / 1e6:,.0f} MB, more than such a file has; it must be another file")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file. Raises UserError as `read_small_file` does, and for other content."""
    text = read_small_file(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({in_short(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: should hold a JSON object, holds a {type(content).__name__}; download it again")
    return content
