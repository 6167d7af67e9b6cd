"""What is known of a file: where it came from, its hash, and when that was last checked."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from ..errors import UserError
from ..system.files import atomic_write
from .sources import ALGORITHMS, Digest, RemoteFile

CHECKLIST = "checklist.chk"  # "MD5  name" a line; Meta's own downloads bring one

MEBIBYTE = 1 << 20


class Record(NamedTuple):
    """What is remembered of a file: of its .part, and of itself once it is complete."""

    source: str
    version: str
    size: int
    digest: Digest | None = None
    validator: str | None = None  # of the bytes in the .part
    verified_at: int | None = None  # the file's time of change, in ns, when its hash was last found right

    @staticmethod
    def read(folder: Path, name: str) -> Record | None:
        """The record of a file; None if there is none that can be read."""
        try:
            content = json.loads(record_file(folder, name).read_bytes())
            digest = Digest(**content.pop("digest")) if content["digest"] else content.pop("digest")
            record = Record(**content, digest=digest)
            kinds = (str, str, int, Digest | None, str | None, int | None)
            is_sound = all(isinstance(value, kind) for value, kind in zip(record, kinds, strict=True))
            return record if is_sound and (not digest or digest.algorithm in ALGORITHMS) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write(self, folder: Path, name: str) -> None:
        """Keeps the record."""
        content = {**self._asdict(), "digest": self.digest and self.digest._asdict()}
        with atomic_write(record_file(folder, name)) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")


def record_file(folder: Path, name: str) -> Path:
    return folder / ".download" / f"{name}.json"


def read_checklist(folder: Path) -> dict[str, Digest]:
    """File name -> MD5, from the folder's checklist.chk if it has one. Raises UserError for a line that is no such."""
    file = folder / CHECKLIST
    found = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else (), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](.+)", line.strip())
        if match:
            found[Path(match[2]).name] = Digest("md5", match[1].lower())
        elif line.strip():
            raise UserError(f"{file}: line {number}: should be an MD5 and a file name, is {line[:60]!r}")
    return found


def mismatch(file: Path, digest: Digest | None, listed: Digest | None) -> str | None:
    """What is wrong with the content of a file, in words; None if it is as its source and its checklist say.

    Raises UserError if its source calls it right, and only the checklist says otherwise.
    """
    size = file.stat().st_size
    expected = [known for known in (digest, listed) if known]
    hashers = {
        known.algorithm: hashlib.new(known.algorithm.removeprefix("git-"), usedforsecurity=False) for known in expected
    }
    if "git-sha1" in hashers:
        hashers["git-sha1"].update(b"blob %d\0" % size)
    with open(file, "rb") as opened, byte_bar(size, 0, f"checking {file.name}") as bar:
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


def part_of(folder: Path, file: RemoteFile) -> Path:
    return folder / f"{file.name}.part"


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def byte_bar(total: int, start: int, what: str) -> tqdm[NoReturn]:
    disable = total < MEBIBYTE  # done before it could be read
    return tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=what, mininterval=0.5, disable=disable)
