"""The model and the instructions of this machine's CPU, as the system tells them. No torch."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18
"""x86-64's system call, and the arguments by which a process asks Linux for the registers of AMX's tiles."""


@dataclass(frozen=True)
class Cpu:
    """The facts about a CPU that kernels are chosen by."""

    model: str
    """Vendor, family and model: `GenuineIntel 6-207`. Empty where that is not told."""
    name: str
    """The CPU's name, for people."""
    flags: frozenset[str]
    """Its instructions as /proc/cpuinfo names them; empty where that is not told."""

    @classmethod
    def parse(cls, cpuinfo: str) -> Cpu:
        """The first CPU of /proc/cpuinfo.

        >>> Cpu.parse("vendor_id : GenuineIntel\\ncpu family : 6\\nmodel : 207\\nflags : fma avx2\\n").model
        'GenuineIntel 6-207'
        """
        first: dict[str, str] = {}
        for line in cpuinfo.splitlines():
            name, _, value = line.partition(":")
            first.setdefault(name.strip(), value.strip())
        known = all(first.get(name) for name in ("vendor_id", "cpu family", "model"))
        return cls(
            model=f"{first['vendor_id']} {first['cpu family']}-{first['model']}" if known else "",
            name=first.get("model name", platform.machine()),
            flags=frozenset(first.get("flags", "").split()),
        )


def this_cpu() -> Cpu:
    """The CPU of this machine, without the flags of instructions that the system does not let this process use."""
    try:
        cpu = Cpu.parse(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
    except OSError:
        cpu = Cpu.parse("")
    if "amx_tile" in cpu.flags and not _may_use_tiles():
        return Cpu(cpu.model, cpu.name, frozenset(flag for flag in cpu.flags if not flag.startswith("amx")))
    return cpu


def _may_use_tiles() -> bool:
    """Ask the system for AMX's tiles. The permission is for all threads of this process, for good."""
    answer: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA)
    return answer == 0
