"""The journal: the results of a run so far, in files that stay readable after a kill, so that a run can be resumed."""

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

import torch
from filelock import FileLock, Timeout

from ..cli.models import ChosenModel
from ..errors import UserError
from ..system.process_groups import Ranks
from ..tokenizer import Tokenizer
from ..weights import dtype_name
from .requests import Result


class Journal:
    """A file of results, one JSON object per line. Its first line describes the run.

    results: those in the file, by line number of the prompt.
    """

    def __init__(self, opened: BinaryIO | None, results: dict[int, Result]):
        """Use `open_journal`, which reads the file, instead. opened: None writes nothing."""
        self._opened = opened
        self.results = results

    def write(self, line: int, result: Result) -> None:
        """Write a result. One that exists already is kept."""
        if line not in self.results:
            self.results[line] = result
            self.append({"line": line, "result": result})

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write a line, and return when it is on the disk."""
        if self._opened is not None:
            content = json_line(entry)
            if self._opened.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._opened.name)
            os.fsync(self._opened.fileno())


@contextlib.contextmanager
def open_journal(file: Path, run: Mapping[str, Any]) -> Iterator[Journal]:
    """Open the journal in a file to continue it, or a new one.

    Raises UserError if the file is the journal of another run, or not a journal.
    """
    with open(file, "a+b", buffering=0) as opened:
        opened.seek(0)
        entries = []
        whole = 0  # bytes of complete lines; what follows was torn by a kill, and is computed again
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
        if entries or b"\n" in opened.read():  # else a kill tore the first line
            check_same_run(entries[0] if entries else None, run, file)
        opened.truncate(whole)
        journal = Journal(opened, {entry["line"]: entry["result"] for entry in entries[1:]})
        if not entries:
            journal.append(run)
        yield journal


def json_line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as a line of JSON."""
    return json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"


def check_same_run(found: Any, run: Mapping[str, Any], file: Path) -> None:
    """Raise UserError, naming what differs, if `found`, the description in a file, is not that of this run."""
    different = [name for name, value in run.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise UserError(
            f"{file}: is of a run with other {', '.join(different)}; give the same to continue it, choose another -o, "
            "or remove it"
        )


def is_finished(out: Path, record: Path, run: Mapping[str, Any]) -> bool:
    """Whether the output exists, complete and of this run. Raises UserError if it is something else."""
    if not out.exists():
        return False
    found = json.loads(record.read_bytes()) if record.exists() else {}
    if found.get("output") != hashlib.sha256(out.read_bytes()).hexdigest():
        raise UserError(f"{out}: is there already, and no run wrote it as it is; choose another -o, or remove it")
    check_same_run(found, run, out)
    return True


@contextlib.contextmanager
def exclusive(out: Path, ranks: Ranks | None) -> Iterator[None]:
    """Lock the output against other runs. Raises UserError if another one is writing it."""
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


def saved_results(out: Path, record: Path, run: Mapping[str, Any]) -> dict[int, Result] | None:
    """Return the results of an earlier, interrupted run; None if it is finished."""
    journals = journal_files(out)
    try:
        finished = is_finished(out, record, run)
    except UserError:
        if not journals:
            raise
        finished = False  # killed before the record was written
    if not finished:
        return read_results(out, run)
    for file in journals:  # killed before these were removed
        file.unlink()
    return None


def journal_files(out: Path) -> list[Path]:
    """Return the journals of a run: one, or one per copy of the model under torchrun."""
    name = re.compile(re.escape(f"{out.name}.part") + r"(\.\d+)?")
    return sorted(file for file in out.parent.iterdir() if name.fullmatch(file.name))


def read_results(out: Path, run: Mapping[str, Any]) -> dict[int, Result]:
    """Return the results in all journals. Raises UserError if one is of another run."""
    results: dict[int, Result] = {}
    for file in journal_files(out):
        with open_journal(file, run) as journal:
            results |= {line: result for line, result in journal.results.items() if line not in results}
    return results


@contextlib.contextmanager
def process_journal(
    out: Path, run: Mapping[str, Any], done: dict[int, Result], ranks: Ranks | None
) -> Iterator[Journal]:
    """Open this process's journal. Among the processes that share a model, only the first writes one."""
    if ranks is not None and ranks.tensor.rank > 0:
        yield Journal(None, done)
        return
    number = f".{ranks.data.rank}" if ranks is not None and ranks.data.rank > 0 else ""
    with open_journal(out.with_name(f"{out.name}.part{number}"), run) as journal:
        journal.results = done
        yield journal


def describe_model(chosen: ChosenModel) -> dict[str, Any]:
    """Return everything of the model and of how it runs that results depend on, by name."""
    checkpoint, tokenizer = chosen.checkpoint, chosen.tokenizer
    model = hashlib.sha256(repr(checkpoint.params).encode())
    for spec, shards in checkpoint.shards.items():
        for shard in shards:  # the first values of each, so that not all is read
            first_values = shard.reshape(-1)[:1024].contiguous().view(torch.uint8).numpy().tobytes()
            model.update(f"{spec.meta_name} {list(shard.shape)} {shard.dtype}".encode() + first_values)
    for change in checkpoint.adapter.values():
        model.update(change.a.reshape(-1)[:1024].float().numpy().tobytes())
        model.update(change.b.reshape(-1)[:1024].float().numpy().tobytes())
    return {
        "weights": model.hexdigest(),
        "tokenizer": _digest_of(tokenizer) if tokenizer else None,
        "stop_ids": sorted(chosen.stop_ids),
        "adapter": repr([(spec.meta_name, change.scale) for spec, change in checkpoint.adapter.items()]),
        "--device": chosen.device.type,
        "--gpu-layers": chosen.gpu_layers,
        "--dtype": dtype_name(chosen.dtype or checkpoint.dtype),
        "--quantize": chosen.quantize,
    }


def _digest_of(tokenizer: Tokenizer) -> str:
    """Return a hash of everything that the tokens of a text or a dialog depend on."""
    digest = hashlib.sha256(repr((tokenizer.special_tokens, tokenizer.added_tokens, tokenizer.bos_id)).encode())
    for texts in (tokenizer.chat_templates, tokenizer.template_variables):
        digest.update(repr(sorted(texts.items())).encode())
    for token in tokenizer.ranks:
        digest.update(token + b"\n")
    return digest.hexdigest()
