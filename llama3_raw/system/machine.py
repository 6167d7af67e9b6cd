"""The memory and the processors that this process may use, on a machine or in a container."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ..errors import UserError
from .processes import local_world_size

_CONTROL_GROUPS = Path("/sys/fs/cgroup")

_OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Return the free memory of the device in bytes; on the CPU, the RAM or the container's limit, without swap.

    The page cache counts as free, because the system drops it first. Processes started by torchrun share the RAM.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min([int(psutil.virtual_memory().available), *container_free()]) // local_world_size()


def container_free(groups: Path = _CONTROL_GROUPS, own: Path = _OWN_CONTROL_GROUPS) -> Iterator[int]:
    """Yield the bytes that each memory limit on this process's control groups leaves free."""
    for version, folder in _control_groups("memory", groups, own):
        if version == 2:
            limit, used, cached = "memory.max", "memory.current", ("active_file", "inactive_file")
        else:
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = ("total_active_file", "total_inactive_file")
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield max(0, left + sum(int(statistics[kind]) for kind in cached))
        except (OSError, ValueError, KeyError):
            continue  # not there, or no limit: "max"


def default_threads() -> int:
    """Return the default number of threads: one for each physical core that this process may use.

    A second thread on a core would wait for the same arithmetic units and the same memory. A quota of processor time
    is rounded up: with 1.5 processors, two threads are idle for a quarter of the time, one leaves a third unused.
    Processes started by torchrun share the cores.
    """
    return max(1, min([physical_cores(), *map(math.ceil, container_quotas())]) // local_world_size())


def processors() -> int:
    """Return the number of processors that this process may run on; a core with two hardware threads counts twice."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores(system: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of physical cores that this process may run on."""
    if sys.platform != "linux":
        return psutil.cpu_count(logical=False) or processors()
    cores = set()
    for processor in os.sched_getaffinity(0):
        try:  # the same text for all processors of a core
            cores.add((system / f"cpu{processor}/topology/thread_siblings_list").read_text())
        except OSError:  # not reported: count it as a core
            cores.add(str(processor))
    return len(cores)


def container_quotas(groups: Path = _CONTROL_GROUPS, own: Path = _OWN_CONTROL_GROUPS) -> Iterator[float]:
    """Yield the processor time that each quota on this process's control groups allows, in processors, such as 1.5."""
    for version, folder in _control_groups("cpu", groups, own):
        try:
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        except (OSError, ValueError):
            continue  # not there, or no limit: "max"
        if quota > 0:  # -1: no limit
            yield quota / period


def _control_groups(controller: str, groups: Path, own: Path) -> Iterator[tuple[int, Path]]:
    """Yield the version and folder of each control group of this process, from its own upwards. (Linux: cgroups.7)"""
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:
            version, root = 2, groups
        elif controller in controllers.split(","):
            version, root = 1, groups / controller
        else:
            continue
        group = root / path.lstrip("/")  # inside a container it may not exist, but the root does
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            yield version, folder


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch reads them itself


def set_threads(threads: int | None) -> None:
    """Set the number of threads that torch uses; None: what the environment sets, or else `default_threads`.

    Raises UserError for more threads than this process has processors.
    """
    if threads is None:
        # torchrun sets it to 1 for several processes, whatever the number of cores
        by_torchrun = local_world_size() > 1 and os.environ.get("OMP_NUM_THREADS") == "1"
        if by_torchrun or not any(map(os.environ.get, _THREAD_VARIABLES)):
            torch.set_num_threads(default_threads())
        return
    if threads > processors():
        raise UserError(
            f"{threads}: this process may use {processors()} processors; give at most that", argument="threads"
        )
    torch.set_num_threads(threads)


def peak_memory() -> int | None:
    """Return the peak memory of this process in bytes, mapped files included, or None if it is not reported."""
    try:  # Linux: VmHWM, because ru_maxrss includes the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
