"""Memory that is free: the machine's, the limits of processes, control groups, as their files say it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from utils import memory

CPU = torch.device("cpu")
MIB = 2**20
UNLIMITED = "9223372036854771712"  # as version 1 writes it


def write(root: Path, files: dict[str, str]) -> tuple[str, str]:
    """Writes files below ``proc`` and ``cgroup``; returns the two folders."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root / "proc"), str(root / "cgroup")


def machine(mib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: {2 * mib * 1024} kB\nMemFree: 1 kB\nMemAvailable: {mib * 1024} kB"}


def v2(folder: str, most: str, used: int, cached: int = 0, high: str = "max") -> dict[str, str]:
    return {
        f"cgroup/{folder}/memory.max": most,
        f"cgroup/{folder}/memory.high": high,
        f"cgroup/{folder}/memory.current": str(used),
        f"cgroup/{folder}/memory.stat": f"anon 1\nactive_file 5\ninactive_file {cached}",
    }


def v1(folder: str, most: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"cgroup/memory/{folder}/memory.limit_in_bytes": most,
        f"cgroup/memory/{folder}/memory.usage_in_bytes": str(used),
        f"cgroup/memory/{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {cached}",
    }


def group(line: str) -> dict[str, str]:
    return {"proc/self/cgroup": line}


GROUPS = {
    "none": (machine(1000), 1000),
    "version 2": (machine(1000) | group("0::/a/b") | v2("a/b", str(300 * MIB), 100 * MIB), 200),
    "files that the kernel gives back": (machine(1000)
        | group("0::/a") | v2("a", str(300 * MIB), 250 * MIB, 90 * MIB), 140),
    "a parent": (machine(1000)
        | group("0::/a/b/c") | v2("a", str(500 * MIB), 100 * MIB) | v2("a/b/c", "max", MIB), 400),
    "version 2's high": (machine(1000) | group("0::/a") | v2("a", "max", 100 * MIB, high=str(150 * MIB)), 50),
    "version 1": (machine(1000)
        | group("9:cpu:/\n4:memory:/a/b\n0::/") | v1("a/b", str(300 * MIB), 200 * MIB, 30 * MIB), 130),
    "version 1 unlimited": (machine(1000) | group("4:cpu,memory:/a") | v1("a", UNLIMITED, 200 * MIB), 1000),
    "a container's own, by the name outside": (machine(1000)
        | group("4:memory:/docker/1f") | v1("", str(400 * MIB), 0), 400),
    "the same of version 2": (machine(1000) | group("0::/../../kubepods/1f") | v2("", str(350 * MIB), 0), 350),
    "the machine has less": (machine(100) | group("0::/a") | v2("a", str(300 * MIB), 0), 100),
    "more in use than allowed": (machine(1000) | group("0::/a") | v2("a", str(300 * MIB), 400 * MIB), 0),
    "no list of groups": (machine(1000) | v2("a", str(300 * MIB), 0), 1000),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_the_smallest_of_the_machine_and_its_control_groups_is_free(name, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    files, expected = GROUPS[name]
    free = memory.free_bytes(CPU, *write(tmp_path, files))
    assert free == pytest.approx(memory.CPU_SHARE * expected * MIB, abs=1)


def test_the_ranks_of_a_machine_share_it(tmp_path, monkeypatch):
    places = write(tmp_path, machine(1000))
    for variable, size, ranks in (("4", "8", 4), ("", "8", 1), ("0", "8", 1), ("4", "", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", variable)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert memory.free_bytes(CPU, *places) == pytest.approx(memory.CPU_SHARE * 1000 * MIB / ranks, abs=1)


def test_where_nobody_tells_nothing_is_known(tmp_path):
    assert memory.free_bytes(CPU, *write(tmp_path, {"proc/version": "another system"})) is None
    assert memory.free_bytes(torch.device("mps")) is None


@pytest.mark.parametrize(("limit", "key"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_limit_of_the_process_is_its_own(limit, key, tmp_path, monkeypatch):
    """It is not shared, and what the process has taken counts; the limit itself is one that nothing reaches."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    status = {"proc/self/status": f"Name:\tpython\n{key}:\t {100 * 1024} kB"}
    before, highest = resource.getrlimit(getattr(resource, limit))
    least = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**34
    resource.setrlimit(getattr(resource, limit), (least, highest))
    try:
        free = memory.free_bytes(CPU, *write(tmp_path, machine(2**30) | status))
    finally:
        resource.setrlimit(getattr(resource, limit), (before, highest))
    assert free == pytest.approx(memory.CPU_SHARE * (least - 100 * MIB - memory.OTHER_ADDRESSES), abs=1)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux tells by files")
def test_this_machine_tells():
    free = memory.free_bytes(CPU)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free is not None
    assert 0 <= free < total
