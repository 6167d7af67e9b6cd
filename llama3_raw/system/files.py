"""Files as a whole: read with a word on what they are instead, and written so that a kill tears none."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError


def check_output(option: str, name: str) -> None:
    """Raises UserError, before the work is done, where `write_whole` could not write a file of this name."""
    file = Path(name).resolve()
    if file.exists() and not file.is_file():
        raise UserError(f"{option} {name}: is no file; give the name of one, there or not")
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{option} {name}: is read-only; choose another name, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"{option} {name}: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{option} {name}: you may not write in {file.parent}; choose another place")


def write_whole(name: str | Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a file, which takes the name once it is whole; what was there before stays until then.

    Raises UserError where it cannot be written, and leaves nothing behind then.
    """
    file = Path(name).resolve()  # behind a link, the file itself
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"{name}: is no file; give the name of one, there or not")
        with tempfile.TemporaryDirectory(prefix=".llama3_raw-", dir=file.parent) as folder:
            part = Path(folder, file.name)
            part.touch()
            mode = (file if file.exists() else part).stat().st_mode
            write(part)
            part.chmod(stat.S_IMODE(mode))
            part.replace(file)
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror or error}); choose another place") from error


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
