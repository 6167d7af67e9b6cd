"""Files as a whole: read with a word on what they are instead, and written so that a kill tears none."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, in_short

_SPARE = 10_000_000  # bytes on the disk for what is small


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A file to write to, which has the name `path` when the block ends: whole, and on the disk.

    Until then what is there stays, whose permissions the new file gets. Through a link the file behind it is written.
    Raises UserError if it cannot be written; nothing of it is left then.
    """
    try:
        target = Path(path).resolve()
        if target.exists() and not target.is_file():
            raise UserError(f"{path}: is not a file; choose another name")
        # in a folder of its own, since torch.save writes the name of the file into it
        with tempfile.TemporaryDirectory(prefix=".llama3_raw-", dir=target.parent) as folder:
            part = Path(folder, target.name)
            part.touch()
            mode = (target if target.exists() else part).stat().st_mode  # of a new file, what the umask leaves
            yield part
            _to_disk(part)
            part.chmod(stat.S_IMODE(mode))
            part.replace(target)
        _to_disk(target.parent)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); choose another place") from error


@contextlib.contextmanager
def atomic_folder(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A folder to write files of `n_bytes` into, which is called `folder` when the block ends and they are on the disk.

    Raises UserError if there is one of that name with something in it, if the disk is too small, and if the system
    refuses to write; nothing of it is left then, nor after Ctrl-C.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already, and is not empty; name another folder, or remove it first")
    part = folder.parent / f"{folder.name}-{os.getpid()}.part"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_disk(folder, folder.parent, n_bytes)
        part.mkdir()
        try:
            yield part
            for file in part.rglob("*"):
                _to_disk(file)
            part.rename(folder)
            _to_disk(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # gone already if it has its name
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {in_short(error)}; name another folder") from error


def check_disk(target: Path, folder: Path, n_bytes: int) -> None:
    """Raise UserError if there is no room for `target`, of so many bytes, on the disk that `folder` is on."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + _SPARE:
        raise UserError(
            f"{target}: {n_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on that disk; free some, or "
            "choose another place"
        )


def _to_disk(path: Path) -> None:
    """Return when the disk has a file, or the names in a folder: no power cut can take them back."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def page_or_pointer(beginning: bytes) -> str | None:
    """What the first bytes of a model file show it to be where it is no such file, in words; else None."""
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # some pages begin with a byte order mark
    if text.startswith(b"<") and not text.startswith(b"<unk>"):
        return "an HTML page (a login or error page, say)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file it points to"
    return None


def read_beginning(path: Path) -> bytes:
    """The first bytes of a model file. Raises UserError where it is missing, empty, or a page or a pointer instead."""
    try:
        if path.exists() and not path.is_file():  # it would wait for a pipe
            raise UserError(f"{path}: is not a file; put the model's file in its place")
        with open(path, "rb") as file:
            beginning = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check its name and your rights to it") from error
    if not beginning:
        raise UserError(f"{path}: the file is empty; download it again")
    other = page_or_pointer(beginning)
    if other:
        way_out = "run `git lfs pull`" if "git-lfs" in other else "download the file itself"
        raise UserError(f"{path}: this is {other}; {way_out}")
    return beginning


def read_small_file(path: Path) -> bytes:
    """A whole file of a kind that is never large. Raises UserError as `read_beginning` does, and for 100 MB or more."""
    read_beginning(path)
    size = path.stat().st_size
    if size >= 100_000_000:
        raise UserError(f"{path}: has {size / 1e6:,.0f} MB, where a few should do; it must be another file")
    return path.read_bytes()
