"""The plain classes as Ray actors. `ray_platform.py` creates them, and holds the controller's own actor.

The actor classes bear the plain classes' names, so that an operator's `ps` says `ray::StageWorker`. None asks for
resources here: a stage's come with its place in the pipeline's placement group, the others need none.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import ray

from tramontane.cluster import gateway as gateways
from tramontane.cluster import router as routing
from tramontane.cluster import worker as working
from tramontane.cluster.doors import Address
from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.spec import CONTROLLER, NAMESPACE, ServiceSpec, gateway_name, router_name, stage_name
from tramontane.cluster.stats import (
    GatewayCounters,
    ProcessFacts,
    RouterCounters,
    ServiceStats,
    StageCounters,
    process_facts,
)
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.stages.config import ModelConfig
from tramontane.stages.cores import keep_to, share_of_cores
from tramontane.stages.kv_layout import KVLayout

log = logging.getLogger(__name__)

STATS_TIMEOUT_S = 10.0
GRACE_S = 2.0
"""Streams in flight may end by themselves for so long when the service stops."""


def start_logging(level: str) -> None:
    """One line an event on stderr, which Ray keeps in a file for each process."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", force=True)


def node_id() -> str:
    """Ray's id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())


def session_dir() -> Path:
    """Ray's folder for this session, with the logs of every process in `logs/`. No public name leads there."""
    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def _sockets() -> Path:
    """A private folder for this service's sockets, in Ray's session folder: it goes with the session."""
    folder = session_dir() / "tramontane"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _secret() -> bytes:
    """The service's secret, from this node's environment or a file that it names; empty where there is none.

    It proves diallers on links between nodes. It is never in the spec, nor in a log.
    """
    if path := os.environ.get("TRAMONTANE_SECRET_FILE"):
        return Path(path).read_bytes().strip()
    return os.environ.get("TRAMONTANE_SECRET", "").encode()


def _tcp_host() -> str | None:
    """The address on which links from other nodes are taken; without a secret, none are."""
    return str(ray.util.get_node_ip_address()) if _secret() else None


def _cores_of(spec: ServiceSpec, index: int) -> list[int]:
    """A stage's own cores, where all stages share one node and leave a core to everybody else.

    Where stages fill the node, router, gateway and clients have to run between them, and stages that keep to their
    cores lose a third and more (2 stages on 2 cores, 16 users: 292 and 486 tokens/s kept, 738 and 1,133 free).
    """
    cores = sorted(os.sched_getaffinity(0))
    one_node = sum(node["Alive"] for node in ray.nodes()) == 1
    if spec.device != "cpu" or not one_node or spec.stages * spec.threads >= len(cores):
        return cores
    return share_of_cores(cores, index, spec.stages)[: spec.threads]


@ray.remote(num_cpus=0, concurrency_groups={"control": 4, "load": 1, "step": 1})
class StageWorker:
    """A stage's process. `run` is the step loop; the other groups answer while it runs."""

    def __init__(self, spec: ServiceSpec, replica: int, index: int) -> None:
        start_logging(spec.log_level)
        name = stage_name(replica, index)
        self._name = name

        def load(on_progress: Callable[[float], None]) -> Any:
            # An idle OpenMP thread would spin on a core that the kernels' own threads need.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            from tramontane.stages.stage import Stage  # torch stays out of every other process

            return Stage.load(
                ModelConfig.load(spec.path),
                spec.path,
                spec.span(index),
                dtype=spec.dtype,
                quantize=spec.quantize,
                device=spec.device,
                on_progress=on_progress,
                sampleable_ids=spec.sampleable_ids,
            )

        def on_step_thread() -> None:
            import torch

            torch.set_num_threads(spec.threads)  # counts for the thread that calls it
            keep_to(_cores_of(spec, index))

        self._worker = working.StageWorker(
            name, node_id(), load, on_step_thread, secret=_secret(), socket_dir=_sockets(), host=_tcp_host()
        )

    @ray.method(concurrency_group="load")
    def load(self) -> working.LoadedStage:
        return self._worker.load()

    @ray.method(concurrency_group="control")
    def progress(self) -> float:
        return self._worker.progress()

    @ray.method(concurrency_group="control")
    def address(self) -> Address:
        return self._worker.address()

    @ray.method(concurrency_group="control")
    def epoch(self) -> int:
        return self._worker.epoch()

    @ray.method(concurrency_group="control")
    def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int, downstream: Address) -> None:
        self._worker.bind(epoch, layout, context, max_tokens, downstream)

    @ray.method(concurrency_group="step")
    def run(self, epoch: int) -> str:
        return self._worker.run(epoch)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        self._worker.close()

    @ray.method(concurrency_group="control")
    def stats(self) -> tuple[StageCounters, ProcessFacts]:
        return self._worker.stats(), process_facts("stage", self._name.removeprefix("stage-"), node_id())


@ray.remote(num_cpus=0)
class Router:
    """A router's process."""

    def __init__(self, spec: ServiceSpec, replica: int, stages: Sequence[Any]) -> None:
        start_logging(spec.log_level)
        self._name = router_name(replica)
        self._spec = spec
        self._stages = [cast(routing.StagePort, ActorPort(stage)) for stage in stages]
        self._router: routing.Router | None = None
        self._binding: asyncio.Task[Address] | None = None

    async def bind(self) -> Address:
        if self._binding is None:
            self._binding = asyncio.get_running_loop().create_task(self._bind())
        address = await asyncio.shield(self._binding)  # a restarted controller asks again
        assert self._router is not None
        if self._router.is_broken:
            raise RuntimeError(await self._router.broken())
        return address

    async def _bind(self) -> Address:
        self._router = routing.Router(
            self._name,
            node_id(),
            self._stages,
            routing.RouterOptions(
                layout=self._spec.layout,
                context=self._spec.context,
                max_batch_tokens=self._spec.max_batch_tokens,
                max_waiting=self._spec.max_waiting,
                decode_groups=self._spec.decode_groups,
            ),
            secret=_secret(),
            sockets=_sockets(),
            host=_tcp_host(),
        )
        return await self._router.bind()

    async def broken(self) -> str:
        assert self._router is not None, "broken before bind"
        return await self._router.broken()

    async def close(self) -> None:
        if self._router is not None:
            await self._router.close()

    async def stats(self) -> tuple[RouterCounters, ProcessFacts]:
        assert self._router is not None, "stats before bind"
        return self._router.stats(), process_facts("router", self._name.removeprefix("router-"), node_id())


@ray.remote(num_cpus=0)
class Gateway:
    """A gateway's process."""

    def __init__(self, spec: ServiceSpec, index: int) -> None:
        start_logging(spec.log_level)
        self._name = gateway_name(index)
        self._spec = spec
        self._gateway: gateways.Gateway | None = None
        self._starting: asyncio.Task[int] | None = None
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> int:
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        return await asyncio.shield(self._starting)  # a restarted controller asks again

    async def _start(self) -> int:
        self._gateway = gateways.Gateway(self._name, self._spec.name, context=self._spec.context, fetch_stats=_stats)
        return await self._gateway.start(self._spec.entrance)

    async def generation(self) -> int:
        return self._plain.generation

    async def set_loading(self, fraction: float) -> None:
        self._plain.set_loading(fraction)

    async def set_model(self, version: str, row_invariant: bool) -> None:
        spec, config = self._spec, ModelConfig.load(self._spec.path)
        # Beside the event loop: large vocabularies take some tenths of a second.
        tokenizer = await asyncio.to_thread(Tokenizer.load, spec.path, config)
        self._plain.set_model(
            ServedModel(
                name=spec.name,
                config=config,
                context=spec.context,
                dtype=spec.dtype,
                stages=spec.stages,
                version=version,
                row_invariant=row_invariant,
                tokenizer=tokenizer,
            )
        )

    async def set_routes(self, generation: int, routers: Sequence[tuple[str, Address]]) -> None:
        pipelines = [
            await LinkPipeline.dial(name, address, node=node_id(), gateway=self._name, secret=_secret())
            for name, address in routers
        ]
        await self._plain.set_routes(generation, pipelines)

    async def set_unavailable(self, reason: str) -> None:
        self._plain.set_unavailable(reason)

    async def gone(self) -> str:
        return await asyncio.shield(self._gone)

    async def stats(self) -> tuple[GatewayCounters, ProcessFacts]:
        return self._plain.stats(), process_facts("gateway", self._name.removeprefix("gateway-"), node_id())

    async def close(self) -> None:
        if self._gateway is not None and not self._gone.done():
            await self._gateway.close(GRACE_S)
            self._gone.set_result("closed")

    @property
    def _plain(self) -> gateways.Gateway:
        assert self._gateway is not None, "the gateway was not started"
        return self._gateway


class ActorPort:
    """An actor's methods as coroutines: `await ActorPort(handle).bind(3)`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self.handle, name)

        async def call(*arguments: object) -> Any:
            return await method.remote(*arguments)

        return call


def find_controller() -> Any | None:
    """The controller of this Ray cluster's service, or None."""
    try:
        return ray.get_actor(CONTROLLER, namespace=NAMESPACE)
    except ValueError:
        return None


async def _stats() -> ServiceStats:
    controller = await asyncio.to_thread(find_controller)  # asks the GCS, and may wait for it
    if controller is None:
        raise ConnectionError("the service is ending")
    try:
        return cast(ServiceStats, await asyncio.wait_for(ActorPort(controller).stats(), STATS_TIMEOUT_S))
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ConnectionError(f"the controller does not answer: {type(error).__name__}") from error
