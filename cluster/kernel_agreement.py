"""Chooses the kernels of all stages by facts about their nodes: asks each stage, and probes a CPU that is unknown."""

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
from tramontane.stages.kernel_choice import (
    Decision,
    NodeKernels,
    Speeds,
    decide,
    needs_probe,
    probed_speeds,
    table_speeds,
)
from tramontane.stages.variants import KernelChoice, kernel_set, numbers_of

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 600.0
"""How long a probe may take; most of it is for a compiler that may have to build every variant."""


async def agree_on_kernels(spec: ServiceSpec, stages: Sequence[StageControl], platform: Platform) -> Decision:
    """Choose the kernels of each stage.

    Raises:
        ValueError: see `decide`.
    """
    if spec.device != "cpu" or kernel_set(spec.kernels) != "native":
        return Decision((KernelChoice(kernels=spec.kernels or "cuda"),) * len(stages), ())
    nodes = await asyncio.gather(*(stage.node_kernels() for stage in stages))
    for node in nodes:
        log.info("%s: %s (%s)", node.node, node.cpu.name, node.cpu.model)
    numbers, here = numbers_of(spec.dtype, spec.quantize), platform.cpu()
    probed = await _probe(platform) if _is_probe_wanted(nodes, numbers, spec.kernels, here) else None

    def speeds_of(cpu: Cpu) -> Speeds | None:
        return table_speeds(cpu, numbers) or (probed if cpu.model == here.model else None)

    return decide(nodes, numbers, spec.kernels, speeds_of, allow_mixed=spec.allow_mixed_numerics)


def _is_probe_wanted(nodes: Sequence[NodeKernels], numbers: str, requested: str | None, here: Cpu) -> bool:
    """Whether a probe helps: there is a choice, the table does not make it, and a stage has this machine's CPU."""
    mine = [node for node in nodes if node.cpu.model == here.model]
    return requested in (None, "native") and any(needs_probe(node, numbers) for node in mine)


async def _probe(platform: Platform) -> Speeds | None:
    """The speeds that a probe finds; None where it fails or says little, and then the order of the variants decides."""
    try:
        found = await platform.probe_kernels()
    except (OSError, ValueError, TimeoutError) as error:
        log.warning("the CPU was not probed: %s", one_line(error))
        return None
    log.info("the CPU is not in the table; probed: %s", found)
    return probed_speeds(found)


async def probe_in_child(words: Sequence[str]) -> dict[str, float]:
    """Probe in a child process, since torch stays out of the controller. `words` are dtype and quantization.

    Raises:
        ValueError: the child fails; the message is its last line.
        TimeoutError: the child does not end.
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
