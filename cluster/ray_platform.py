"""The service on Ray: the controller's actor, and the platform on which it creates all other parts.

Stages, router and gateway are detached with `max_restarts=0` and `max_task_retries=0`: a step that writes KV is not
idempotent, and only the controller may create a part again. The controller alone is restarted by Ray; Ray then gives
it its first arguments, so it reads the spec from the key-value store instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from tramontane.cluster import controller as controlling
from tramontane.cluster.actors import ActorPort, Gateway, Router, StageWorker, node_id
from tramontane.cluster.kernel_agreement import probe_in_child
from tramontane.cluster.node_facts import NodeFacts
from tramontane.cluster.part_process import open_log
from tramontane.cluster.parts import GatewayControl, RouterControl, StageControl
from tramontane.cluster.ray_watch import Servers
from tramontane.cluster.spec import CONTROLLER, NAMESPACE, SPEC_KEY, ServiceSpec, names_in
from tramontane.cluster.stats import ServiceStats, process_facts
from tramontane.stages.cpu import Cpu, this_cpu

CLOSE_TIMEOUT_S = 3.0


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Controller:
    """The controller's process; its record in Ray's key-value store outlives it."""

    def __init__(self) -> None:
        record = internal_kv._internal_kv_get(SPEC_KEY, namespace=NAMESPACE)
        assert record is not None, "the spec is written before the controller is created"
        spec = ServiceSpec.decode(record)
        self._logs = open_log(spec, CONTROLLER)
        self._controller = controlling.Controller(
            spec, RayPlatform(spec), lambda: process_facts("controller", "0", node_id())
        )
        self._run = asyncio.get_running_loop().create_task(self._controller.run())

    async def status(self) -> controlling.Status:
        return self._controller.status()

    async def stats(self) -> ServiceStats:
        return await self._controller.stats()

    async def stop(self) -> None:
        self._run.cancel()
        await self._controller.stop()


class RayPlatform:
    """Creates the parts on Ray, or finds them again by name."""

    def __init__(self, spec: ServiceSpec) -> None:
        self._spec = spec

    async def gateway(self, name: str) -> GatewayControl:
        return cast(GatewayControl, self._part(Gateway, name, _beside_us(), self._spec, 0))

    async def reserve(self, replica: int) -> None:
        if not _reserved(replica):
            bundles = [self._spec.stage_resources()] * self._spec.stages
            placement_group(bundles, strategy="PACK", name=_group_name(replica), lifetime="detached")

    async def room(self, replica: int, timeout_s: float) -> str:
        try:
            await asyncio.wait_for(_as_future(self._group(replica).ready()), timeout_s)
        except TimeoutError:
            return _lacking(self._spec)
        return ""

    async def stage(self, name: str, replica: int, index: int) -> StageControl:
        resources = self._spec.stage_resources()
        options = {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group(replica), placement_group_bundle_index=index
            ),
        }
        return cast(StageControl, self._part(StageWorker, name, options, self._spec, replica, index))

    async def router(self, name: str, stages: Sequence[StageControl]) -> RouterControl:
        handles = [cast(ActorPort, stage).handle for stage in stages]
        return cast(RouterControl, self._part(Router, name, {}, self._spec, 0, handles))

    def cpu(self) -> Cpu:
        return this_cpu()

    async def probe_kernels(self) -> dict[str, float]:
        words = [self._spec.dtype, *([self._spec.quantize] if self._spec.quantize else [])]
        return await probe_in_child(words)

    async def record(self, spec: ServiceSpec) -> None:
        self._spec = spec
        # Nothing is awaited: once a controller was told to end, its record is not written again.
        internal_kv._internal_kv_put(SPEC_KEY, spec.encode(), overwrite=True, namespace=NAMESPACE)

    async def end(self) -> None:
        await asyncio.to_thread(end_parts, self._spec.identity)

    def _part(self, actor: Any, name: str, options: dict[str, object], *arguments: object) -> ActorPort:
        """The living actor of this name, else a new one."""
        return ActorPort(
            actor.options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=0,
                max_task_retries=0,
                **options,
            ).remote(*arguments)
        )

    def _group(self, replica: int) -> PlacementGroup:
        return ray.util.get_placement_group(_group_name(replica))


def create_controller(spec: ServiceSpec) -> Any:
    """Write the spec and create the controller that acts on it.

    Raises:
        ValueError: this Ray cluster has a service already, or parts of one are left.
    """
    left = [*_names(), *([_group_name(0)] if _reserved(0) else [])]
    if left:
        raise ValueError(f"this Ray cluster serves a model already ({', '.join(left)}); `tramontane down` ends it")
    # The record is the lock between two that start at once: the second finds it there.
    if internal_kv._internal_kv_put(SPEC_KEY, spec.encode(), overwrite=False, namespace=NAMESPACE):
        raise ValueError(
            "this Ray cluster is about to serve another model; `tramontane down` clears what is left of it"
        )
    options = {"name": CONTROLLER, "namespace": NAMESPACE, "lifetime": "detached", **_beside_us()}
    return cast(Any, Controller).options(**options).remote()


def facts_of_nodes() -> list[NodeFacts]:
    """What each living node of the cluster offers in all, as Ray says it. Ray measures memory when a node starts."""

    def facts(node: Mapping[str, Any]) -> NodeFacts:
        offered = node["Resources"]
        return NodeFacts(
            name=f"node {node['NodeManagerAddress']}",
            cpus=offered.get("CPU", 0.0),
            gpus=offered.get("GPU", 0.0),
            free_memory=int(offered["memory"]) if "memory" in offered else None,
        )

    return [facts(node) for node in ray.nodes() if node["Alive"]]


def ask_gcs() -> None:
    """A question that the GCS alone can answer; waits for it for as long as Ray does."""
    internal_kv._internal_kv_exists(SPEC_KEY, namespace=NAMESPACE)


def servers() -> Servers:
    """Where the GCS and this node's raylet listen."""
    host, _, port = gcs_address().rpartition(":")
    mine = next(node for node in ray.nodes() if node["NodeID"] == node_id())
    return Servers((host, int(port)), (mine["NodeManagerAddress"], mine["NodeManagerPort"]))


def gcs_address() -> str:
    """HOST:PORT by which others join this Ray."""
    return str(ray.get_runtime_context().gcs_address)


def session_dir() -> Path:
    """Ray's folder for this session; `logs/` has what each process has printed. No public name leads there."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def served_names() -> tuple[str, str] | None:
    """Identity and model of the service on this Ray cluster, by its record; None where there is none."""
    record = internal_kv._internal_kv_get(SPEC_KEY, namespace=NAMESPACE)
    return None if record is None else names_in(record)


def served_identity() -> str | None:
    """Identity of the service on this Ray cluster; None where there is none."""
    names = served_names()
    return None if names is None else names[0]


def end_parts(identity: str | None = None) -> bool:
    """End every part but the controller, give the room back and forget the spec. False where there was nothing.

    With an `identity`, only if the cluster's record is of that service; without one, whatever is there.
    Parts are asked to close, so that they free their sockets; one that is hung or dead is killed all the same.
    """
    if identity is not None and served_identity() != identity:
        return False
    names = [name for name in _names() if name != CONTROLLER]
    parts = []
    for name in names:
        with contextlib.suppress(ValueError):  # it died meanwhile
            parts.append(ray.get_actor(name, namespace=NAMESPACE))
    if parts:
        ray.wait([part.close.remote() for part in parts], num_returns=len(parts), timeout=CLOSE_TIMEOUT_S)
    for part in parts:
        ray.kill(part)
    reserved = _reserved(0)
    if reserved:
        remove_placement_group(ray.util.get_placement_group(_group_name(0)))
    forgotten = internal_kv._internal_kv_del(SPEC_KEY, namespace=NAMESPACE)
    return bool(names or reserved or forgotten)


def _beside_us() -> dict[str, object]:
    """On this process's node: the port opens where `serve` was typed, as long as that node lives."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id(), soft=True)}


def _names() -> list[str]:
    """Names of the service's living actors."""
    entries = ray.util.list_named_actors(all_namespaces=True)
    return sorted(entry["name"] for entry in entries if entry["namespace"] == NAMESPACE)


def _reserved(replica: int) -> bool:
    records = ray.util.placement_group_table().values()
    return any(record["name"] == _group_name(replica) and record["state"] != "REMOVED" for record in records)


async def _as_future(ref: Any) -> Any:
    return await ref


def _group_name(replica: int) -> str:
    return f"{NAMESPACE}-pipeline-{replica}"


def _lacking(spec: ServiceSpec) -> str:
    """One line: what the pipeline asks, and what the cluster has."""
    (resource, amount), *_ = spec.stage_resources().items()
    total = ray.cluster_resources().get(resource, 0)
    free = ray.available_resources().get(resource, 0)
    return (
        f"no room for the pipeline: {spec.stages} stages ask for {amount:g} {resource} each, "
        f"{spec.stages * amount:g} together; the cluster has {total:g}, {free:g} of them free"
    )
