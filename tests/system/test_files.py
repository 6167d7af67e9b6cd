"""Atomic writes: a file or folder is complete, or does not exist."""

from __future__ import annotations

import os
import platform
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


def test_a_file_gets_its_name_when_complete(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    file.chmod(0o640)
    with atomic_write(file) as part:
        part.write_text("after")
        assert file.read_text() == "before"
        assert part.name == "file"  # torch.save stores the name in the file
    assert file.read_text() == "after"
    if os.name != "nt":
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(ZeroDivisionError), atomic_write(file) as part:
        part.write_text(str(1 / 0))
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_kill_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    assert subprocess.run([sys.executable, "-c", KILLED, str(file)]).returncode == -signal.SIGKILL
    assert file.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_write(file) as part:  # removes the files of the killed process
        part.write_text("after")
    assert list(tmp_path.iterdir()) == [file]


def test_a_leftover_of_a_process_with_the_same_id_is_removed(tmp_path: Path) -> None:
    """Restarted in a container, a command often has the process id that it had before."""
    left = tmp_path / f"file-{platform.node()}-{os.getpid()}.part"
    left.mkdir()
    with atomic_write(tmp_path / "file") as part:
        part.write_text("text")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_errors_of_the_caller_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"), atomic_write(tmp_path / "file"):
        int("a")
    with pytest.raises(UserError, match="cannot be written"), atomic_write("zero\0byte"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows flushes only files that are open for writing")
def test_read_only_files_are_flushed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--save-quantized writes such files if params.json is read-only. (Only root may open them for writing.)"""
    open_file = os.open

    def as_another_user(path: Path, flags: int, *rest: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and not os.stat(path).st_mode & stat.S_IWUSR:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, flags, *rest)

    monkeypatch.setattr(os, "open", as_another_user)
    with atomic_folder(tmp_path / "folder", 10) as part:
        (part / "file").write_text("text")
        (part / "file").chmod(0o444)
    assert (tmp_path / "folder" / "file").read_text() == "text"


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users create links")
def test_the_target_of_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "file")
    with atomic_write(link) as part:
        part.write_text("text")
    assert link.is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "text"


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure loses what was not flushed, and a name may be on the disk before the bytes are."""
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
    assert done == ["file", "folder", "name", "folder"]


def test_a_folder_gets_its_name_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with atomic_folder(folder, 10) as part:
        (part / "file").write_text("text")
        assert not folder.exists()
    assert (folder / "file").read_text() == "text"
    with pytest.raises(UserError, match="folder: already exists and is not empty"), atomic_folder(folder, 10):
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
