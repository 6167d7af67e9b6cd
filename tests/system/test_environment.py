"""An environment that is not the user's own making: no home folder, and variables of a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama3_raw.__main__ import main
from llama3_raw.backends.cpu import CannotBuild, build_kernels
from llama3_raw.chat import __main__ as chat
from llama3_raw.system import process_groups
from llama3_raw.system.machine import default_threads
from llama3_raw.system.processes import rank
from tests.paths import ROOT, TINY


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no user ids without a home")
def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `docker run --user 12345`: no HOME, and no entry in /etc/passwd. No folder named ~ is made."""
    import pwd

    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert os.path.expanduser("~/x") == "~/x"
    with pytest.raises(CannotBuild, match=r"there is no home folder; set XDG_CACHE_HOME|there is no C compiler"):
        build_kernels()
    with chat._line_editing():
        pass
    assert list(tmp_path.iterdir()) == []


def set_cluster(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


MET = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}  # "": a free port
# name: (variables of the environment, the message)
STRAY: dict[str, tuple[dict[str, str], str]] = {
    "not a number": ({"WORLD_SIZE": "auto"}, "WORLD_SIZE is 'auto' in the environment, but should be a number, 1 or"),
    "none": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment, but should be a number, 1 or more; unset it"),
    "alone": ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 in the environment, but RANK, MASTER_ADDR, MASTER_PORT not set; "),
    "without a meeting place": ({"WORLD_SIZE": "4", "RANK": "0"}, "but MASTER_ADDR, MASTER_PORT not set; unset WORLD"),
    "a rank beyond": ({"WORLD_SIZE": "4", "RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4; unset both"),
    "a rank that is no number": ({"WORLD_SIZE": "4", "RANK": "x"}, "RANK is 'x' in the environment, but should be a"),
    "nobody comes to the first": ({**MET, "RANK": "0"}, "but the 4 processes did not meet at 127.0.0.1:"),
    "nobody is there": ({**MET, "RANK": "1"}, "but the 4 processes did not meet at 127.0.0.1:"),
    "a port that is no number": ({**MET, "RANK": "0", "MASTER_PORT": "x"}, "did not meet at 127.0.0.1:x (invalid"),
}


@pytest.mark.parametrize("case", STRAY)
def test_stray_variables_of_a_cluster(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They give one line with the way out, at once or after a short wait."""
    variables, message = STRAY[case]
    set_cluster(monkeypatch, **{name: value or free_port() for name, value in variables.items()})
    monkeypatch.setattr(process_groups, "MEETING_SECONDS", 1)
    monkeypatch.setattr("llama3_raw.cli.entry_point._OTHERS_REPORT_FIRST", 0)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # a rank above 0 replaces them
        monkeypatch.setattr(sys, f"__{name}__", getattr(sys, name))
    begin = time.monotonic()
    assert main(["--weights", str(TINY), "--device", "cpu", "Once"]) == 2
    assert time.monotonic() - begin < 10
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert ("unset WORLD_SIZE" in err) or ("unset both" in err) or ("unset it" in err)
    assert err.count("\n") == 1


def test_the_wait_is_shorter_than_half_a_minute() -> None:
    assert 10 <= process_groups.MEETING_SECONDS <= 20


def test_stray_variables_without_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without WORLD_SIZE the others count for nothing."""
    set_cluster(monkeypatch)
    expected = default_threads()
    set_cluster(monkeypatch, RANK="3", LOCAL_WORLD_SIZE="64")
    assert rank() == 0
    assert default_threads() == expected


@pytest.mark.slow
def test_processes_started_by_hand(tmp_path: Path) -> None:
    """Without torchrun, but with its variables; one comes after the other, and loads for longer than they meet.

    The name of the meeting place is wrong for the first process, as it may be in a cluster.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, torch\n"
        "from llama3_raw.system import process_groups\n"
        "process_groups.MEETING_SECONDS = 5\n"
        "time.sleep(process_groups.rank())\n"
        "with process_groups.init(lambda: torch.device('cpu')) as ranks:\n"
        "    time.sleep(6 * ranks.rank)\n"
        "    print(int(ranks.everyone.all_reduce(torch.tensor([1.0 + ranks.rank]))))\n"
    )
    common = {"WORLD_SIZE": "2", "MASTER_PORT": free_port(), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **common, "RANK": str(number), "MASTER_ADDR": address},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, address in enumerate(("nowhere.invalid", "127.0.0.1"))
    ]
    assert [process.communicate(timeout=100)[0] for process in processes] == ["3\n", "3\n"]
