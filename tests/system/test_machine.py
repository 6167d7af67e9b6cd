"""Memory and processors of a machine or container: with fake control groups and processors, and on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import torch

from llama3_raw.__main__ import main
from llama3_raw.system import machine
from llama3_raw.system.machine import (
    container_free,
    container_quotas,
    default_threads,
    free_memory,
    physical_cores,
    processors,
)
from tests.paths import TINY

CPU = torch.device("cpu")


def write_group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    """Write the memory files of a control group with `used` bytes in use, `cached` of them in the page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    total = "" if version == 2 else "total_"
    statistics = f"anon 5\n{total}inactive_file {cached - 1}\n{total}active_file 1\nslab 7\n"
    (folder / "memory.stat").write_text(statistics)


def free_in(tmp_path: Path, own: str) -> list[int]:
    (tmp_path / "cgroup").write_text(own)
    return list(container_free(tmp_path / "groups", tmp_path / "cgroup"))


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    """As in Docker: version 2 with its own namespace, then version 1 with the host's path."""
    groups = tmp_path / "groups"
    write_group(groups, 2, "1000", 700, 300)
    assert free_in(tmp_path, "0::/\n") == [600]
    shutil.rmtree(groups)
    write_group(groups / "memory", 1, "2000", 700, 300)
    assert free_in(tmp_path, "4:memory:/docker/0123\n3:cpuset:/docker/0123\n0::/\n") == [1600]


def test_the_limit_of_a_parent_group(tmp_path: Path) -> None:
    """As systemd sets it: on the slice, not on the service. A group above its limit has nothing left."""
    groups = tmp_path / "groups"
    write_group(groups / "system.slice" / "some.service", 2, "max", 100, 50)
    write_group(groups / "system.slice", 2, "900", 1000, 20)
    assert free_in(tmp_path, "0::/system.slice/some.service\n") == [0]


def test_no_limit(tmp_path: Path) -> None:
    assert free_in(tmp_path, "0::/\n") == []
    assert free_in(tmp_path, "1:name=systemd:/\n2:cpu:/\n") == []
    assert list(container_free(tmp_path, tmp_path / "none")) == []


def test_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory().available
    assert 0 < free_memory(CPU) <= 1.1 * available
    monkeypatch.setattr(machine, "container_free", lambda: [5, 3])
    assert free_memory(CPU) == 3
    monkeypatch.setattr(machine, "container_free", lambda: [])
    assert 0 < free_memory(CPU) <= 1.1 * available


def test_cores_with_two_threads_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of two cores with two hardware threads; processor 8 reports nothing."""
    siblings = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}
    for number, text in siblings.items():
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
    monkeypatch.setattr(sys, "platform", "linux")
    for allowed, cores in (({*range(8)}, 4), ({0, 4}, 1), ({1, 4, 5}, 2), ({8}, 1), ({0, 4, 8}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed, raising=False)
        assert physical_cores(tmp_path) == cores
        assert processors() == len(allowed)


def test_cores_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: {False: 6}[logical])
    assert physical_cores() == 6
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert physical_cores() == os.cpu_count()


def quotas_in(tmp_path: Path, own: str, files: dict[str, str]) -> list[float]:
    for name, content in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    (tmp_path / "cgroup").write_text(own)
    return list(container_quotas(tmp_path / "groups", tmp_path / "cgroup"))


def test_the_quota_of_a_container(tmp_path: Path) -> None:
    """Version 2, on the group and on its parents; then version 1, where -1 is no limit."""
    version_2 = {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "300000 100000"}
    assert quotas_in(tmp_path / "2", "0::/a/b\n", version_2) == [1.5, 3.0]
    own = "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n"
    version_1 = {"cpu/docker/cpu.cfs_quota_us": "-1", "cpu/docker/cpu.cfs_period_us": "100000"}
    version_1 |= {"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "50000"}
    assert quotas_in(tmp_path / "1", own, version_1) == [0.5]
    assert quotas_in(tmp_path, "0::/\n", {}) == []


@pytest.mark.parametrize(
    ("cores", "quotas", "threads"), [(8, [], 8), (8, [1.5, 4.0], 2), (8, [0.5], 1), (2, [16.0], 2)]
)
def test_threads_by_cores_and_quota(
    cores: int, quotas: list[float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: cores)
    monkeypatch.setattr(machine, "container_quotas", lambda: quotas)
    assert default_threads() == threads


def test_a_tool_uses_the_default_threads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless the environment or --threads sets another number."""
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "physical_cores", lambda: 3)
    monkeypatch.setattr(machine, "container_quotas", lambda: [])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def threads_of(*arguments: str) -> int:
        assert main(["--weights", str(TINY), "x", "--max-new-tokens", "1", *arguments]) == 0
        capsys.readouterr()
        return torch.get_num_threads()

    try:
        assert threads_of() == 3
        assert threads_of("--threads", "1") == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)  # as torch does at its start
        assert threads_of() == 2
    finally:
        torch.set_num_threads(before)
