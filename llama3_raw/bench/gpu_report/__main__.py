"""Measure an NVIDIA GPU and check every result on it, in phases that are ordered by their worth.

Each phase is a process with a time limit of its own. Every result goes at once to report.jsonl, and to a table in
table.txt, which is printed at the end; so a phase that is cut or crashes costs only itself. Nothing needs to be
installed or fetched besides torch, Triton, transformers and pytest.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ...cli.entry_point import ArgumentParser, command_line_tool, not_empty
from ...errors import UserError, in_short
from ...system.files import atomic_write
from .table import Row, render

REPORT, TABLE, LOG = "report.jsonl", "table.txt", "log.txt"
_SLOWER = 4  # times, the limits of a rehearsal, on a CPU that others may use too
_SHORTEST = 5.0  # seconds; a phase with less is not started


class Report:
    """The files of a report, which hold every row as soon as it is there."""

    def __init__(self, folder: Path, titles: dict[str, str]):
        self.rows: list[Row] = []
        self._folder = folder
        self._titles = titles
        (folder / REPORT).write_text("")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with open(self._folder / REPORT, "a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        with atomic_write(self._folder / TABLE) as part:
            part.write_text(self.table())

    def table(self) -> str:
        return render(self.rows, self._titles)


def build_parser(phases: Sequence[str]) -> ArgumentParser:
    """Return the parser of the command."""
    parser = ArgumentParser(prog="python -m llama3_raw.bench.gpu_report", description=__doc__)
    parser.add_argument("--out", type=not_empty, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument(
        "--minutes", type=float, default=7.0, metavar="N", help="end after N minutes (default: %(default)s)"
    )
    parser.add_argument(
        "--phases", nargs="+", metavar="NAME", help=f"run only these, in this order: {', '.join(phases)}"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run each phase on this CPU with stand-ins, to see that it works"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one phase, in this process
    return parser


@command_line_tool
def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status: 1 if a phase failed."""
    if "--rehearse" in arguments:
        from .interpreter import interpret_kernels

        interpret_kernels()  # before the kernels are imported
    from .phases import PHASES

    options = build_parser(list(PHASES)).parse_args(arguments)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        return _run_here(options.run, folder, options.rehearse)
    _check(options, PHASES)
    titles = {name: phase.title for name, phase in PHASES.items()}
    report, end = Report(folder, titles), time.monotonic() + 60 * options.minutes
    with open(folder / LOG, "w") as log:
        for name in options.phases or PHASES:
            limit = PHASES[name].limit * (_SLOWER if options.rehearse else 1)
            seconds = min(limit, end - time.monotonic())
            if seconds < _SHORTEST:
                report.add({"phase": name, "status": f"not run: the {options.minutes:g} minutes are over"})
                continue
            _run_phase(name, seconds, report, log, [f"--out={folder}", *["--rehearse"] * options.rehearse])
    print(report.table(), end="")
    return int(any(row.get("status", "").startswith("failed") for row in report.rows))


def _check(options: argparse.Namespace, phases: Any) -> None:
    import torch

    for name in options.phases or ():
        if name not in phases:
            raise UserError(f"--phases {name}: there is no such phase; choose from {', '.join(phases)}")
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("gpu_report: torch sees no NVIDIA GPU here; --rehearse runs it on this CPU with stand-ins")


def _run_phase(name: str, seconds: float, report: Report, log: TextIO, options: Sequence[str]) -> None:
    """Run a phase in a process, and add its results as they come, and how it ended."""
    print(f"llama3_raw: {name} …", file=sys.stderr, flush=True)
    log.write(f"\n== {name}\n")
    log.flush()
    start = time.monotonic()
    command = [sys.executable, "-m", "llama3_raw.bench.gpu_report", "--run", name, *options]
    cut, kept = threading.Event(), f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,  # a phase that is cut leaves 16 GB
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={"TORCHINDUCTOR_CACHE_DIR": kept, **os.environ, "TMPDIR": scratch},
        ) as process,
    ):

        def kill() -> None:  # with all that it has started
            cut.set()
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    report.add({"phase": name, **row})
                else:  # another library's line
                    log.write(line)
        except BaseException:  # such as Ctrl-C
            kill()
            raise
        finally:
            timer.cancel()
    took = f"{time.monotonic() - start:.0f} s"
    status = f"cut after {took}" if cut.is_set() else f"done in {took}"
    if process.returncode and not cut.is_set():
        status = f"failed after {took}, see {LOG}"
    report.add({"phase": name, "status": status})


def _run_here(name: str, folder: Path, is_rehearsal: bool) -> int:
    """Run one phase, and print each result as a line of JSON."""
    import contextlib

    from .phases import PHASES
    from .stage import gpu_stage, rehearsal_stage

    def emit(name: str, value: float | str, unit: str = "", is_detail: bool = False) -> None:
        detail = {"is_detail": True} if is_detail else {}
        print(json.dumps({"name": name, "value": value, "unit": unit, **detail}), flush=True)

    chosen = rehearsal_stage(folder) if is_rehearsal else contextlib.nullcontext(gpu_stage(folder))
    with chosen as stage:
        try:
            PHASES[name].run(stage, emit)
        except Exception as error:
            emit("error", in_short(error))
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
