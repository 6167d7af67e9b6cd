"""Download the files of a model into a folder: resumable, and named once their hash is correct."""

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
from .records import MEBIBYTE, Record, file_size, mismatch, part_file, progress_bar, read_checklist, record_file
from .sources import Interrupted, LocalFolder, RemoteFile, Source, Stream

_MAX_FAILURES = 7  # in a row, each with less than 1 MiB of progress; about a minute in total


def download(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetch those of `files` that are missing or wrong in `folder`. Raises UserError; what was fetched is kept."""
    if all(is_verified(file, folder) for file in files) and not any(part_file(folder, file).exists() for file in files):
        return  # also if the folder cannot be written
    try:
        (folder / ".download").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download" / "lock", timeout=0)
        with lock:
            (folder / ".download" / "wanted").write_text("".join(f"{file.name}\n" for file in files))
            missing = []
            for file in files:
                if _is_complete(source, file, folder):
                    _drop_part(folder, file)
                else:
                    missing.append(file)
                    _drop_other_version(file, folder)
            _check_disk(source, missing, folder)
            for file in missing:
                _fetch(source, file, folder)
    except Timeout as error:
        raise UserError(
            f"{folder}: another download is running in this folder; wait for it, or stop it first"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{folder}: the disk is full; free some space and run the same command again to continue"
            ) from error
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; give another folder with --to"
        ) from error


def is_verified(file: RemoteFile, folder: Path) -> bool:
    """Whether the file exists and is unchanged since it was last verified."""
    target, record = folder / file.name, Record.read(folder, file.name)
    if record is None or record.version != file.version or not target.exists():
        return False
    status = target.stat()
    return record.verified_at == status.st_mtime_ns and file.size == status.st_size


def _is_complete(source: Source, file: RemoteFile, folder: Path) -> bool:
    """Whether the file is complete and correct. Its hash is computed only if it changed since it was last verified."""
    target = folder / file.name
    if not target.exists():
        return False
    if is_verified(file, folder):
        return True
    listed = read_checklist(folder).get(file.name)
    if target.stat().st_size == file.size and mismatch(target, file.digest, listed) is None:
        _write_record(source, file, folder)
        return True
    print(f"llama3_raw: {target}: differs from {source}; fetching it again", file=sys.stderr)
    return False


def _write_record(source: Source, file: RemoteFile, folder: Path) -> None:
    verified_at = (folder / file.name).stat().st_mtime_ns
    Record(str(source), file.version, file.size, file.digest, None, verified_at).write(folder, file.name)


def _check_disk(source: Source, files: Sequence[RemoteFile], folder: Path) -> None:
    needed = 0
    for file in files:
        copy = source.local_copy(file)
        if copy is None or file.size < MEBIBYTE or copy.stat().st_dev != folder.stat().st_dev:  # otherwise it is linked
            needed += file.size - file_size(part_file(folder, file))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on that disk; free some, "
            "or choose another disk with --to"
        )


def _drop_other_version(file: RemoteFile, folder: Path) -> None:
    """Remove a .part of another version, to which the bytes of this one cannot be appended."""
    part = part_file(folder, file)
    record = Record.read(folder, part.name)
    is_other = file.digest is None if record is None else record.version != file.version
    if part.exists() and (is_other or file_size(part) > file.size):
        print(f"llama3_raw: {part}: is of another version; starting again", file=sys.stderr)
        _drop_part(folder, file)


def _drop_part(folder: Path, file: RemoteFile) -> None:
    part = part_file(folder, file)
    part.unlink(missing_ok=True)
    record_file(folder, part.name).unlink(missing_ok=True)


def _fetch(source: Source, file: RemoteFile, folder: Path) -> None:
    """Fetch a file into its .part, and rename it if its hash is correct."""
    target, part = folder / file.name, part_file(folder, file)
    listed = read_checklist(folder).get(file.name)
    copy = source.local_copy(file)
    if copy is not None and file_size(copy) == file.size and mismatch(copy, file.digest, listed) is None:
        print(f"llama3_raw: {target}: taken from {copy}", file=sys.stderr)
        _drop_part(folder, file)
        try:
            if file.size < MEBIBYTE:
                raise OSError("a small file may be edited, which would change the copy in the cache")
            os.link(copy, part)
        except OSError:  # also for another disk, or one without hard links
            _receive(LocalFolder(str(copy.parent)), file._replace(path=str(copy)), part, folder)
    else:
        _receive(source, file, part, folder)
        wrong = mismatch(part, file.digest, listed)
        if wrong:
            _drop_part(folder, file)
            raise UserError(f"{target}: {wrong}; its bytes were discarded, run the same command again")
        if not (file.digest or listed):
            print(f"llama3_raw: {target}: {source} reports no hash; only the length was checked", file=sys.stderr)
        with open(part, "rb+") as opened:
            os.fsync(opened.fileno())  # otherwise a power failure could keep the name without the bytes
    os.replace(part, target)
    _write_record(source, file, folder)
    _drop_part(folder, file)


def _receive(source: Source, file: RemoteFile, part: Path, folder: Path) -> None:
    """Append the missing bytes of the file to `part`, over as many connections as needed."""
    if file.size == 0:
        raise UserError(f"{file.name}: is empty at {source}; get the model from elsewhere")
    record = Record.read(folder, part.name)
    validator = record.validator if record else None
    part.touch()
    failures, most = 0, file_size(part)  # failures in a row; the largest size so far
    with progress_bar(file.size, most, file.name) as bar:
        while (size := file_size(part)) < file.size:
            reason = "the connection ended early"
            try:
                with source.open(file, size, validator) as stream:
                    first = next(stream.chunks, b"")
                    _check_beginning(source, file, stream, first)
                    validator = stream.validator
                    Record(str(source), file.version, file.size, file.digest, validator).write(folder, part.name)
                    with open(part, "ab") as opened:
                        if stream.start != size:
                            opened.truncate(0)
                            bar.reset()
                        for chunk in itertools.chain((first,), stream.chunks):
                            if opened.tell() + len(chunk) > file.size:
                                raise UserError(
                                    f"{part}: more than {file.size:,} bytes were sent; run the same command again"
                                )
                            opened.write(chunk)  # a kill loses only its buffer, a few kilobytes
                            bar.update(len(chunk))
            except Interrupted as interruption:
                reason = str(interruption)
            now = file_size(part)
            if now == file.size:
                return
            failures = 0 if now >= most + MEBIBYTE else failures + 1
            most = max(most, now)
            if failures == _MAX_FAILURES:
                raise UserError(
                    f"{part}: {reason}; {now:,} of {file.size:,} bytes are here, run the same command to continue"
                )
            bar.write(f"llama3_raw: {file.name}: {reason}; trying again", file=sys.stderr)
            time.sleep(2**failures / 2)


def _check_beginning(source: Source, file: RemoteFile, stream: Stream, first: bytes) -> None:
    """Raise UserError if the stream is not the file, before any of its bytes are written."""
    other = page_or_pointer(first) if stream.start == 0 else None
    if other:
        raise UserError(
            f"{file.name}: {source} sent {other}; if it is a login page of this network, open any site in a browser, "
            "then run the same command again"
        )
    if stream.total not in (None, file.size):
        raise UserError(
            f"{file.name}: the server offers {stream.total:,} bytes, but {source} reports {file.size:,}; "
            "try again later"
        )
