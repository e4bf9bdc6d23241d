"""What this machine's CPU is and can do, as the system tells it. No torch."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18
"""x86-64's system call, and Linux's words for "this process wants the registers of AMX's tiles"."""


@dataclass(frozen=True)
class Cpu:
    """A CPU as kernels are chosen by it."""

    model: str
    """Vendor, family and model: `GenuineIntel 6-207`. Empty where that is not told."""
    name: str
    """For people."""
    flags: frozenset[str]
    """What it can do, in the words of /proc/cpuinfo; nothing where that is not told."""

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
    """This machine's. Instructions that the system does not lend to this process are left out of its flags."""
    try:
        cpu = Cpu.parse(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
    except OSError:
        cpu = Cpu.parse("")
    if "amx_tile" in cpu.flags and not _tiles_are_lent():
        return Cpu(cpu.model, cpu.name, frozenset(flag for flag in cpu.flags if not flag.startswith("amx")))
    return cpu


def _tiles_are_lent() -> bool:
    """Ask the system for AMX's tiles, which it gives to a process for good; once for all of its threads."""
    answer: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA)
    return answer == 0
