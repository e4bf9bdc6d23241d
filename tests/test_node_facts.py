"""The free memory and GPUs of a machine: control groups of both versions, and what CUDA programs see."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tramontane.cluster.node_facts import this_machine
from tramontane.cluster.node_memory import Memory, free_memory, group_memories

GIB = 2**30


def group(folder: Path, limit: int | str, used: int, *, cached: int = 0, version: int = 2) -> None:
    """The files that a control group shows."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")  # fmt: skip
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = f"anon 5\n{names[2]}inactive_file {cached}\n{names[2]}active_file 0\nunevictable 0\n"
    (folder / "memory.stat").write_text(stat)


def said(root: Path, lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)


def test_every_group_above_counts_and_files_in_memory_do_not(tmp_path: Path) -> None:
    said(tmp_path, "0::/user.slice/serve.scope\n")
    mount = tmp_path / "sys/fs/cgroup"
    group(mount / "user.slice/serve.scope", "max", 10)
    group(mount / "user.slice", 8 * GIB, 3 * GIB, cached=GIB)
    assert list(group_memories(tmp_path)) == [Memory(8 * GIB, 2 * GIB)]
    group(mount / "user.slice/serve.scope", GIB // 8, GIB // 16)
    assert free_memory(tmp_path) == int(0.95 * GIB / 8) - GIB // 16


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    said(tmp_path, "12:memory:/docker/0123abcd\n3:cpu,cpuacct:/docker/0123abcd\n0::/\n")
    mount = tmp_path / "sys/fs/cgroup/memory"
    group(mount, 4 * GIB, 2 * GIB, cached=GIB, version=1)
    assert list(group_memories(tmp_path)) == [Memory(4 * GIB, GIB)]


def test_a_path_that_leads_out_of_the_groups_is_not_followed(tmp_path: Path) -> None:
    said(tmp_path, "0::/../../neighbour\n")
    group(tmp_path / "sys/neighbour", GIB, 0)
    group(tmp_path / "sys/fs/cgroup", 2 * GIB, 0)
    assert list(group_memories(tmp_path)) == [Memory(2 * GIB, 0)]


def test_where_there_are_no_groups_the_system_counts(tmp_path: Path) -> None:
    assert list(group_memories(tmp_path)) == []
    assert 0 <= free_memory(tmp_path) <= psutil.virtual_memory().total


def test_ray_ends_workers_before_memory_is_full() -> None:
    assert Memory(limit=100, used=10).free == 85
    assert Memory(limit=100, used=98).free == 0


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-aa, 1000'\necho '1, GPU-bb, 2000'\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return program


def test_gpus_are_those_that_cuda_programs_see(nvidia_smi: Path) -> None:
    assert this_machine(with_gpus=True, environment={}).free_gpu_memory == (1000 * 2**20, 2000 * 2**20)
    one = this_machine(with_gpus=True, environment={"CUDA_VISIBLE_DEVICES": "1"})
    assert (one.gpus, one.free_gpu_memory) == (1.0, (2000 * 2**20,))
    assert this_machine(with_gpus=True, environment={"CUDA_VISIBLE_DEVICES": ""}).gpus == 0
    part = this_machine(with_gpus=True, environment={"CUDA_VISIBLE_DEVICES": "MIG-5c0ffee"})
    assert (part.gpus, part.free_gpu_memory) == (1.0, None)
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    assert this_machine(with_gpus=True, environment={}).gpus == 0
    assert this_machine(with_gpus=False).gpus == 0
