"""The stages agree on their kernels: each tells of its node, a CPU that nobody knows is probed, one choice is made."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence

from tramontane.cluster.parts import Platform, StageControl
from tramontane.cluster.reasons import one_line
from tramontane.cluster.spec import ServiceSpec
from tramontane.stages.cpu import Cpu
from tramontane.stages.kernel_choice import Decision, NodeKernels, Speeds, decide, probed_speeds, table_speeds
from tramontane.stages.variants import KernelChoice, numbers_of, set_of

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 600.0
"""Most of it for a compiler that may have to make every variant."""


async def agree_on_kernels(spec: ServiceSpec, stages: Sequence[StageControl], platform: Platform) -> Decision:
    """What each stage is to compute with.

    Raises:
        ValueError: see `decide`.
    """
    if spec.device != "cpu" or set_of(spec.kernels) != "native":
        return Decision((KernelChoice(kernels=spec.kernels or "cuda"),) * len(stages), ())
    nodes = await asyncio.gather(*(stage.node_kernels() for stage in stages))
    for node in nodes:
        log.info("%s: %s (%s)", node.node, node.cpu.name, node.cpu.model)
    numbers, here = numbers_of(spec.dtype, spec.quantize), platform.cpu()
    probed = await _probe(platform) if _is_probe_wanted(nodes, numbers, spec.kernels, here) else None

    def speeds_of(cpu: Cpu) -> Speeds | None:
        return table_speeds(cpu, numbers) or (probed if cpu.model == here.model else None)

    return decide(nodes, numbers, spec.kernels, speeds_of, allow_mixed=spec.allow_mixed_numerics)


def _is_probe_wanted(nodes: Sequence[NodeKernels], numbers: str, wish: str | None, here: Cpu) -> bool:
    """Whether there is a choice, the table does not make it, and a probe of this CPU would tell anything of stages."""
    mine = [node for node in nodes if node.cpu.model == here.model]
    is_open = wish in (None, "native") and any(len(node.variants(numbers)) > 1 for node in mine)
    return is_open and table_speeds(here, numbers) is None


async def _probe(platform: Platform) -> Speeds | None:
    """Without one, the order of the variants decides."""
    try:
        found = await platform.probe_kernels()
    except (OSError, ValueError, TimeoutError) as error:
        log.warning("the CPU was not probed: %s", one_line(error))
        return None
    log.info("the CPU is not in the table; probed: %s", found)
    return probed_speeds(found)


async def probe_in_child(words: Sequence[str]) -> dict[str, float]:
    """Probe in a process of its own, since torch stays out of the controller's. `words` are dtype and weights.

    Raises:
        ValueError: it fails; the last line that it said.
        TimeoutError: it does not end.
    """
    command = [sys.executable, "-m", "tramontane.stages.kernels.native.speeds", *words]
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        said, errors = await asyncio.wait_for(child.communicate(), PROBE_TIMEOUT_S)
    finally:
        if child.returncode is None:
            child.kill()
    if child.returncode:
        raise ValueError((errors.decode(errors="replace").strip().splitlines() or ["no reason told"])[-1])
    found: dict[str, float] = json.loads(said)
    return found
