"""The CPUs, GPUs and memory that a node offers, as plain values; found on this machine before Ray starts."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from tramontane.cluster.node_memory import free_memory

GPU_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
GPU_QUERY_TIMEOUT_S = 20.0
GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Of drivers: Nvidia's, AMD's, that of Linux within Windows."""
PART_OF_GPU = "MIG-"
THIS_MACHINE = "this machine"
SERVICE_BYTES = 1 << 30
"""What a service takes beside its stages: Ray's processes, controller, router, gateway and `serve` itself. They take
about half of this when idle; connections take more."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What one node offers. Memory that is None is not known, and then counts as enough."""

    name: str
    """The node's name, for people."""
    cpus: float = 0.0
    gpus: float = 0.0
    """Infinite where Ray has yet to count them."""
    free_memory: int | None = None
    """Bytes that stages may have."""
    free_gpu_memory: tuple[int, ...] | None = None
    """The same for each GPU."""


def this_machine(*, with_gpus: bool, environment: Mapping[str, str] = os.environ) -> NodeFacts:
    """The facts of this machine, for processes started from here. Ray counts the CPUs, so they are left out."""
    free = max(0, free_memory() - SERVICE_BYTES)
    if not with_gpus:
        return NodeFacts(name=THIS_MACHINE, free_memory=free)
    table = _gpu_table()
    if not table and any(map(os.path.exists, GPU_DEVICES)):  # Ray may find what nvidia-smi does not tell
        return NodeFacts(name=THIS_MACHINE, gpus=math.inf, free_memory=free)
    gpus = visible_gpus(table, environment.get("CUDA_VISIBLE_DEVICES"))
    known = tuple(own for own in gpus if own is not None)
    return NodeFacts(
        name=THIS_MACHINE,
        gpus=float(len(gpus)),
        free_memory=free,
        free_gpu_memory=known if len(known) == len(gpus) else None,
    )


def visible_gpus(table: str, visible: str | None) -> list[int | None]:
    """The free bytes of each GPU that processes see, None where they are not told (a GPU in parts has none as a whole).

    `table` is what nvidia-smi answers, `visible` is CUDA_VISIBLE_DEVICES: CUDA ends that list at the first entry that
    it does not know. Of a GPU in parts it takes a part's own name, which the table lacks.

    >>> table = "0, GPU-1f, 100\\n1, GPU-2e, [N/A]"
    >>> visible_gpus(table, None), visible_gpus(table, "1"), visible_gpus(table, "GPU-1,7,1"), visible_gpus(table, "")
    ([104857600, None], [None], [104857600], [])
    >>> visible_gpus(table, "MIG-3c,MIG-GPU-2e/1/0,0")
    [None, None, 104857600]
    """
    gpus: dict[tuple[str, str], int | None] = {}
    for line in table.splitlines():
        match [part.strip() for part in line.split(",")]:
            case [index, uuid, free]:
                gpus[index, uuid] = int(free) * 2**20 if free.isdecimal() else None
    if visible is None:
        return list(gpus.values())
    seen: list[int | None] = []
    for wanted in (part.strip() for part in visible.split(",")):
        found = [
            free for (index, uuid), free in gpus.items() if wanted and (wanted == index or uuid.startswith(wanted))
        ]
        if wanted.startswith(PART_OF_GPU):
            found = [None]
        if not found:
            break
        seen.append(found[0])
    return seen


def _gpu_table() -> str:
    """The answer of nvidia-smi; empty where there is no driver, or no answer."""
    try:
        # By its name in PATH, which is where drivers put it.
        return subprocess.run(  # noqa: S603
            GPU_QUERY, capture_output=True, text=True, timeout=GPU_QUERY_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
