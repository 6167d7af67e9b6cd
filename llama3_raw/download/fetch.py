"""The files of a model into a folder: resumed where they stopped, and named once their hash is right."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError
from ..system.files import page_or_pointer
from .records import MEBIBYTE, Record, byte_bar, mismatch, part_of, read_checklist, record_file, size_of
from .sources import BlobStore, Interrupted, RemoteFile, Source, Stream

_TRIES = 7  # in a row without a byte; a minute in all


def download(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetches what of `files` is not in `folder` yet, or not right. Raises UserError; what was fetched stays."""
    if all(is_known(file, folder) for file in files) and not any(part_of(folder, file).exists() for file in files):
        return  # also where nothing may be written
    try:
        (folder / ".download").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download" / "lock", timeout=0)
        with lock:
            (folder / ".download" / "wanted").write_text("".join(f"{file.name}\n" for file in files))
            missing = []
            for file in files:
                if _is_there(source, file, folder):
                    _drop_part(folder, file)
                else:
                    missing.append(file)
                    _drop_other_version(file, folder)
            _check_disk(source, missing, folder)
            for file in missing:
                _fetch(source, file, folder)
    except Timeout as error:
        raise UserError(
            f"{folder}: another download is at work in this folder; wait for it, or end it first"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{folder}: the disk is full; free some space and run the same command again, it goes on from there"
            ) from error
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; give another folder with --to"
        ) from error


def is_known(file: RemoteFile, folder: Path) -> bool:
    """Whether the file is there, and unchanged since it was last found right."""
    target, record = folder / file.name, Record.read(folder, file.name)
    if record is None or record.version != file.version or not target.exists():
        return False
    found = target.stat()
    return record.verified_at == found.st_mtime_ns and file.size == found.st_size


def _is_there(source: Source, file: RemoteFile, folder: Path) -> bool:
    """Whether the file is complete and right; its hash is computed only if it changed since the last time."""
    target = folder / file.name
    if not target.exists():
        return False
    if is_known(file, folder):
        return True
    listed = read_checklist(folder).get(file.name)
    if target.stat().st_size == file.size and mismatch(target, file.digest, listed) is None:
        _remember(source, file, folder)
        return True
    print(f"llama3_raw: {target}: is not what {source} has; fetching it again", file=sys.stderr)
    return False


def _remember(source: Source, file: RemoteFile, folder: Path) -> None:
    verified_at = (folder / file.name).stat().st_mtime_ns
    Record(str(source), file.version, file.size, file.digest, None, verified_at).write(folder, file.name)


def _check_disk(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    needed = 0
    for file in files:
        copy = source.local_copy(file)
        if copy is None or file.size < MEBIBYTE or copy.stat().st_dev != folder.stat().st_dev:  # else it is linked
            needed += file.size - size_of(part_of(folder, file))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on that disk; free some, "
            "or give a folder on another disk with --to"
        )


def _drop_other_version(file: RemoteFile, folder: Path) -> None:
    """Removes a .part that the bytes of this version cannot be added to."""
    part = part_of(folder, file)
    record = Record.read(folder, part.name)
    is_other = file.digest is None if record is None else record.version != file.version
    if part.exists() and (is_other or size_of(part) > file.size):
        print(f"llama3_raw: {part}: is of another version; starting again", file=sys.stderr)
        _drop_part(folder, file)


def _drop_part(folder: Path, file: RemoteFile) -> None:
    part = part_of(folder, file)
    part.unlink(missing_ok=True)
    record_file(folder, part.name).unlink(missing_ok=True)


def _fetch(source: Source, file: RemoteFile, folder: Path) -> None:
    """The file into its .part, then, if all is right, under its own name."""
    target, part = folder / file.name, part_of(folder, file)
    listed = read_checklist(folder).get(file.name)
    copy = source.local_copy(file)
    if copy is not None and size_of(copy) == file.size and mismatch(copy, file.digest, listed) is None:
        print(f"llama3_raw: {target}: taken from {copy}", file=sys.stderr)
        _drop_part(folder, file)
        try:
            if file.size < MEBIBYTE:
                raise OSError("small files are edited at times, and a copy in the cache would change with them")
            os.link(copy, part)
        except OSError:  # or another disk, or one without links
            _receive(BlobStore(str(copy.parent)), file._replace(place=str(copy)), part, folder)
    else:
        _receive(source, file, part, folder)
        wrong = mismatch(part, file.digest, listed)
        if wrong:
            _drop_part(folder, file)
            raise UserError(f"{target}: {wrong}; what came was thrown away, run the same command again")
        if not (file.digest or listed):
            print(f"llama3_raw: {target}: {source} tells no hash; only the length was checked", file=sys.stderr)
        with open(part, "rb+") as opened:
            os.fsync(opened.fileno())  # the name must not outlive a power cut without the bytes
    os.replace(part, target)
    _remember(source, file, folder)
    _drop_part(folder, file)


def _receive(source: Source, file: RemoteFile, part: Path, folder: Path) -> None:
    """The bytes of the file into `part`, from where it ends on, over as many connections as it takes."""
    if file.size == 0:
        raise UserError(f"{file.name}: is empty at {source}; take the model from elsewhere")
    record = Record.read(folder, part.name)
    validator = record.validator if record else None
    part.touch()
    failures, most = 0, size_of(part)  # in a row; the most bytes there ever were
    with byte_bar(file.size, most, file.name) as bar:
        while (have := size_of(part)) < file.size:
            reason = "the connection ended early"
            try:
                with source.open(file, have, validator) as stream:
                    first = next(stream.chunks, b"")
                    _check_beginning(source, file, stream, first)
                    validator = stream.validator
                    Record(str(source), file.version, file.size, file.digest, validator).write(folder, part.name)
                    with open(part, "ab") as opened:
                        if stream.start != have:
                            opened.truncate(0)
                            bar.reset()
                        for chunk in itertools.chain((first,), stream.chunks):
                            if opened.tell() + len(chunk) > file.size:
                                raise UserError(
                                    f"{part}: more than {file.size:,} bytes come; run the same command again"
                                )
                            opened.write(chunk)  # a kill loses what its buffer holds, some kilobytes
                            bar.update(len(chunk))
            except Interrupted as interruption:
                reason = str(interruption)
            now = size_of(part)
            if now == file.size:
                return
            failures = 0 if now >= most + MEBIBYTE else failures + 1
            most = max(most, now)
            if failures == _TRIES:
                raise UserError(
                    f"{part}: {reason}; {now:,} of {file.size:,} bytes are here, run the same command to go on"
                )
            bar.write(f"llama3_raw: {file.name}: {reason}; trying again", file=sys.stderr)
            time.sleep(2**failures / 2)


def _check_beginning(source: Source, file: RemoteFile, stream: Stream, first: bytes) -> None:
    """Raises UserError for what is not the file, before a byte of it takes the place of one that is."""
    other = page_or_pointer(first) if stream.start == 0 else None
    if other:
        raise UserError(
            f"{file.name}: {source} sent {other}; if it is a login page of this network, open any site in a browser, "
            "then run the same command again"
        )
    if stream.total not in (None, file.size):
        raise UserError(
            f"{file.name}: {stream.total:,} bytes are offered, but {source} says {file.size:,}; try again later"
        )
