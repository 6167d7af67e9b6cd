"""What is written is there whole, or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llama3_raw import UserError
from llama3_raw.system.files import atomic_folder, atomic_write, check_disk

KILLED = """
import os, signal, sys
from pathlib import Path
from llama3_raw.system.files import atomic_write
with atomic_write(sys.argv[1]) as part:
    part.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    file.chmod(0o640)
    with atomic_write(file) as part:
        part.write_text("after")
        assert file.read_text() == "before"
        assert part.name == "file"  # torch.save writes it into the file
    assert file.read_text() == "after"
    if os.name != "nt":
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(file) as part:
        part.write_text(str(1 / 0))
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    assert subprocess.run([sys.executable, "-c", KILLED, str(file)]).returncode == -signal.SIGKILL
    assert file.read_text() == "before"


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few make links")
def test_through_a_link_the_file_behind_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "file")
    with atomic_write(link) as part:
        part.write_text("text")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut takes back what was not synced, and a name may be on the disk before the bytes are."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def named(part: Path, target: Path) -> Path:
        done.append("name")
        return (rename if part.is_dir() else replace)(part, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    monkeypatch.setattr(Path, "rename", named)
    with atomic_write(tmp_path / "file") as part:
        part.write_text("text")
    assert done == ["file", "name", "folder"]
    done.clear()
    with atomic_folder(tmp_path / "folder", 10) as made:
        (made / "file").write_text("text")
    assert done == ["file", "name", "folder"]


def test_a_folder_has_its_name_when_all_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with atomic_folder(folder, 10) as part:
        (part / "file").write_text("text")
        assert not folder.exists()
    assert (folder / "file").read_text() == "text"
    with pytest.raises(UserError, match="folder: is there already, and is not empty"), atomic_folder(folder, 10):
        pass
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "other", 10) as part:
        part.joinpath("file").write_text(str(1 / 0))
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: 1000000000\.0 GB are needed, "):
        check_disk(tmp_path / "model", tmp_path, 10**18)
    with pytest.raises(UserError, match="GB are needed"), atomic_folder(tmp_path / "model", 10**18):
        pass
    assert not any(tmp_path.iterdir())
