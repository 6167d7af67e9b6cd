"""The record of a downloaded file: its source, its hash, and when that was last checked."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from ..errors import UserError
from ..system.files import replacing
from .sources import ALGORITHMS, Digest, RemoteFile

CHECKLIST = "checklist.chk"  # lines of "MD5  name"; Meta's own downloads have one

MEBIBYTE = 1 << 20


class Record(NamedTuple):
    """What is stored about a file or its .part."""

    source: str
    version: str
    size: int
    digest: Digest | None = None
    validator: str | None = None  # for If-Range, of the bytes in the .part
    verified_at: int | None = None  # the file's mtime in ns when its hash was last verified

    @staticmethod
    def read(folder: Path, name: str) -> Record | None:
        """Return the record of a file, or None if it is missing or malformed."""
        try:
            content = json.loads(record_file(folder, name).read_bytes())
            digest = Digest(**content.pop("digest")) if content["digest"] else content.pop("digest")
            record = Record(**content, digest=digest)
            types = (str, str, int, Digest | None, str | None, int | None)
            is_sound = all(isinstance(value, kind) for value, kind in zip(record, types, strict=True))
            return record if is_sound and (not digest or digest.algorithm in ALGORITHMS) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write(self, folder: Path, name: str) -> None:
        """Write the record of a file, atomically."""
        content = {**self._asdict(), "digest": self.digest and self.digest._asdict()}
        with replacing(record_file(folder, name)) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")


def record_file(folder: Path, name: str) -> Path:
    """Return the path of a file's record."""
    return folder / ".download" / f"{name}.json"


def read_checklist(folder: Path) -> dict[str, Digest]:
    """Return the MD5 of each file name in the folder's checklist.chk, if it has one. Raises UserError if malformed."""
    file = folder / CHECKLIST
    digests = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else (), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](.+)", line.strip())
        if match:
            digests[Path(match[2]).name] = Digest("md5", match[1].lower())
        elif line.strip():
            raise UserError(f"{file}: line {number}: should be an MD5 and a file name, is {line[:60]!r}")
    return digests


def mismatch(file: Path, digest: Digest | None, listed: Digest | None) -> str | None:
    """Return, as text, what is wrong with the content of a file, or None if it has both hashes.

    digest: from the source. listed: from the checklist. Raises UserError if only the one from the checklist differs.
    """
    size = file.stat().st_size
    expected = [known for known in (digest, listed) if known]
    hashers = {
        known.algorithm: hashlib.new(known.algorithm.removeprefix("git-"), usedforsecurity=False) for known in expected
    }
    if "git-sha1" in hashers:
        hashers["git-sha1"].update(b"blob %d\0" % size)
    with open(file, "rb") as opened, progress_bar(size, 0, f"checking {file.name}") as bar:
        while hashers and (chunk := opened.read(4 * MEBIBYTE)):
            for hasher in hashers.values():
                hasher.update(chunk)
            bar.update(len(chunk))
    for known in expected:
        actual = hashers[known.algorithm].hexdigest()
        if actual != known.value:
            wrong = f"{known.algorithm} is {actual}, should be {known.value}"
            if digest and known is listed:
                raise UserError(f"{file}: {wrong} by {CHECKLIST}; if that list is of another version, remove it")
            return wrong
    return None


def part_file(folder: Path, file: RemoteFile) -> Path:
    """Return the path of the incomplete file."""
    return folder / f"{file.name}.part"


def file_size(file: Path) -> int:
    """Return the size in bytes, or 0 if the file does not exist."""
    return file.stat().st_size if file.exists() else 0


def progress_bar(total: int, start: int, description: str) -> tqdm[NoReturn]:
    """Return a progress bar in bytes, hidden below 1 MiB."""
    disable = total < MEBIBYTE
    return tqdm(
        total=total, initial=start, unit="B", unit_scale=True, desc=description, mininterval=0.5, disable=disable
    )
