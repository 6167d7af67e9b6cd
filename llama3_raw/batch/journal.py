"""What a run has done so far, in files that any kill leaves readable, so that the next run goes on from there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import UserError
from ..system.process_groups import Ranks
from .requests import Result


class Journal:
    """The results of a run as they come, in a file that any kill leaves readable: its first line says of which run.

    results: those that are written, by the number of the line.
    """

    def __init__(self, opened: BinaryIO | None, results: dict[int, Result]):
        """For `open_journal`, which knows what the file holds. opened: None writes nothing."""
        self._opened = opened
        self.results = results

    def write(self, line: int, result: Result) -> None:
        """A result that was there before stays as it is."""
        if line not in self.results:
            self.results[line] = result
            self.append({"line": line, "result": result})

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes a line, and returns when the disk has it."""
        if self._opened is not None:
            content = as_line(entry)
            if self._opened.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._opened.name)
            os.fsync(self._opened.fileno())


@contextlib.contextmanager
def open_journal(file: Path, run: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in a file, to go on with, or a new one. Raises UserError where it is of another run, or none."""
    with open(file, "a+b", buffering=0) as opened:
        opened.seek(0)
        entries = []
        whole = 0  # bytes; a line that a kill has torn, and what stands behind it, is written anew
        for line in opened.readlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            entries.append(entry)
            whole += len(line)
        opened.seek(0)
        if entries or b"\n" in opened.read():  # else a kill has torn the first line
            check_same_run(entries[0] if entries else None, run, file)
        opened.truncate(whole)
        journal = Journal(opened, {entry["line"]: entry["result"] for entry in entries[1:]})
        if not entries:
            journal.append(run)
        yield journal


def as_line(entry: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"


def check_same_run(found: Any, run: Mapping[str, Any], file: Path) -> None:
    """Raises UserError, naming what differs, where what a file says of its run is not what this run is."""
    different = [name for name, value in run.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise UserError(
            f"{file}: is of a run with other {', '.join(different)}; give the same again to go on with it, choose "
            "another -o, or remove it"
        )


def is_finished(out: Path, record: Path, run: Mapping[str, Any]) -> bool:
    """Whether the output is there, whole, and of this run. Raises UserError where it is something else."""
    if not out.exists():
        return False
    found = json.loads(record.read_bytes()) if record.exists() else {}
    if found.get("output") != hashlib.sha256(out.read_bytes()).hexdigest():
        raise UserError(f"{out}: is there already, and no run wrote it as it is; choose another -o, or remove it")
    check_same_run(found, run, out)
    return True


@contextlib.contextmanager
def alone(out: Path, ranks: Ranks | None) -> Iterator[None]:
    """Keeps other runs from writing the same output. Raises UserError where one does."""
    if ranks is not None and ranks.rank > 0:
        yield
        return
    try:
        with FileLock(f"{out}.lock", timeout=0) as lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise UserError(f"{out}: another run is writing it; wait for it, or end it first") from error


def results_so_far(out: Path, record: Path, run: Mapping[str, Any]) -> dict[int, Result] | None:
    """The results that an earlier run has left; None where it is finished."""
    journals = journal_files(out)
    try:
        finished = is_finished(out, record, run)
    except UserError:
        if not journals:
            raise
        finished = False  # a kill came before the record was there
    if not finished:
        return read_results(out, run)
    for file in journals:  # or before these were gone
        file.unlink()
    return None


def journal_files(out: Path) -> list[Path]:
    """Of a run of one process, or of each of several."""
    name = re.compile(re.escape(f"{out.name}.part") + r"(\.\d+)?")
    return sorted(file for file in out.parent.iterdir() if name.fullmatch(file.name))


def read_results(out: Path, run: Mapping[str, Any]) -> dict[int, Result]:
    """What all journals hold. Raises UserError where one is of another run."""
    results: dict[int, Result] = {}
    for file in journal_files(out):
        with open_journal(file, run) as journal:
            results |= {line: result for line, result in journal.results.items() if line not in results}
    return results


@contextlib.contextmanager
def own_journal(out: Path, run: Mapping[str, Any], done: dict[int, Result], ranks: Ranks | None) -> Iterator[Journal]:
    """The journal that this process writes: of those that share a model, the first one does."""
    if ranks is not None and ranks.tensor.rank > 0:
        yield Journal(None, done)
        return
    number = f".{ranks.data.rank}" if ranks is not None and ranks.data.rank > 0 else ""
    with open_journal(out.with_name(f"{out.name}.part{number}"), run) as journal:
        journal.results = done
        yield journal
