"""Measures how much memory this node has left for a service, by the system and by each control group.

Containers, systemd slices and batch systems limit a control group, and the limits of all groups above it count as well.
Ray looks at the system and at the group that is mounted as the root, which in a container is the container's. It does
not see other limits, and the kernel kills at them without a word. Pages that only cache files count as free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

USABLE = 0.95
"""The part of a limit that may be used. Beyond it Ray ends workers (the default of RAY_memory_usage_threshold)."""


@dataclass(frozen=True)
class Memory:
    """The memory of the system or of a control group, in bytes."""

    limit: int
    used: int
    """Without pages of files, which the kernel gives back at once."""

    @property
    def free(self) -> int:
        """The bytes that a service may take."""
        return max(0, int(USABLE * self.limit) - self.used)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that processes started from here may take before the system, a control group or Ray ends them."""
    system = psutil.virtual_memory()
    every = [Memory(system.total, system.total - system.available), *group_memories(root)]
    return min(memory.free for memory in every)


def group_memories(root: Path = Path("/")) -> Iterator[Memory]:
    """The memory of each control group with a limit that holds this process, from its own to the outermost one mounted.

    Reads both versions of control groups. `root` is for tests.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        # In a container the path may be the host's; then only the root that is mounted is there.
        own = mount / os.path.normpath(f"/{path}").lstrip("/")
        for group in (own, *own.parents):
            if (memory := _group_memory(group, *names)) is not None:
                yield memory
            if group == mount:
                break


def _group_memory(group: Path, limit: str, used: str, *caches: str) -> Memory | None:
    """The memory of one group; None where there is no such group, or it has no limit."""
    most, now = _read(group / limit).strip(), _read(group / used).strip()
    if not most.isdecimal() or not now.isdecimal():
        return None
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    cached = sum(int(stat.get(name, 0)) for name in caches)
    return Memory(int(most), max(0, int(now) - cached))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
