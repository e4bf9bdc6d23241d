"""The plain classes as Ray actors. `ray_platform.py` creates them, and holds the controller's own actor.

The actor classes bear the plain classes' names, so that an operator's `ps` says `ray::StageWorker`. None asks for
resources here: a stage's come with its place in the pipeline's placement group, the others need none.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import ray

from tramontane.cluster import gateway as gateways
from tramontane.cluster import router as routing
from tramontane.cluster import worker as working
from tramontane.cluster.address import Address
from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.model_folder import ModelFolder
from tramontane.cluster.part_process import PartProcess
from tramontane.cluster.routes import LinkNews
from tramontane.cluster.spec import CONTROLLER, NAMESPACE, ServiceSpec, gateway_name, router_name, stage_name
from tramontane.cluster.stats import (
    GatewayCounters,
    ProcessFacts,
    RouterCounters,
    ServiceStats,
    StageCounters,
    process_facts,
)
from tramontane.stages.cores import keep_to, share_of_cores
from tramontane.stages.kernel_choice import NodeKernels
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.variants import KernelChoice, numbers_of

STATS_TIMEOUT_S = 10.0
GRACE_S = 2.0
"""Streams in flight may end by themselves for so long when the service stops."""


def node_id() -> str:
    """Ray's id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())


def _node() -> str:
    """This process's node for people: its address, and its id, by which `GetStats` calls it."""
    return f"{ray.util.get_node_ip_address()} ({node_id()})"


def _start_process(spec: ServiceSpec, part: str) -> PartProcess:
    return PartProcess(spec, part, node=node_id(), host=str(ray.util.get_node_ip_address()))


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
        name = stage_name(replica, index)
        self._name, self._spec = name, spec
        self._process = _start_process(spec, name)
        # Before torch is there: an idle OpenMP thread would spin on a core that the kernels' own threads need.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._is_compiling: Callable[[], bool] = lambda: False

        def load(kernels: KernelChoice, on_progress: Callable[[float], None]) -> Any:
            from tramontane.stages.stage import Stage  # torch stays out of every other process

            folder = ModelFolder(spec, part=name, node=_node())
            config = folder.config()
            stage = Stage.load(
                config,
                spec.path,
                spec.span(index),
                dtype=spec.dtype,
                quantize=spec.quantize,
                device=spec.device,
                kernels=kernels,
                on_progress=on_progress,
                sampleable_ids=spec.sampleable_ids,
                unnamed_ids=spec.unnamed_ids,
            )
            folder.check_tensors(config, stage.digests)
            return stage

        def on_step_thread() -> None:
            import torch

            torch.set_num_threads(spec.threads)  # counts for the thread that calls it
            keep_to(_cores_of(spec, index))

        self._worker = working.StageWorker(name, self._process.site, load, on_step_thread)

    @ray.method(concurrency_group="load")
    def node_kernels(self) -> NodeKernels:
        from tramontane.stages.kernels import kernels_here  # torch stays out of every other process
        from tramontane.stages.kernels.native.build import is_compiling

        self._is_compiling = is_compiling
        return kernels_here(_node(), numbers_of(self._spec.dtype, self._spec.quantize), self._spec.kernels)

    @ray.method(concurrency_group="load")
    def load(self, kernels: KernelChoice) -> working.LoadedStage:
        return self._worker.load(kernels)

    @ray.method(concurrency_group="control")
    def progress(self) -> working.LoadProgress:
        return working.LoadProgress(self._worker.progress(), self._is_compiling())

    @ray.method(concurrency_group="control")
    def address(self) -> Address:
        return self._worker.address()

    @ray.method(concurrency_group="control")
    def epoch(self) -> int:
        return self._worker.epoch()

    @ray.method(concurrency_group="control")
    def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int, downstream: Address) -> None:
        self._worker.bind(epoch, layout, context, max_tokens, downstream)

    @ray.method(concurrency_group="control")
    def stepped(self) -> int:
        return self._worker.stepped()

    @ray.method(concurrency_group="step")
    def run(self, epoch: int) -> str:
        return self._worker.run(epoch)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        self._worker.close()
        self._process.leave()

    @ray.method(concurrency_group="control")
    def stats(self) -> tuple[StageCounters, ProcessFacts]:
        return self._worker.stats(), process_facts("stage", self._name.removeprefix("stage-"), node_id())


@ray.remote(num_cpus=0)
class Router:
    """A router's process."""

    def __init__(self, spec: ServiceSpec, replica: int, stages: Sequence[Any]) -> None:
        self._name = router_name(replica)
        self._process = _start_process(spec, self._name)
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
            self._process.site,
            self._stages,
            self._spec.scheduler,
            self._spec.hang_limit_s,
        )
        return await self._router.bind()

    async def broken(self) -> str:
        assert self._router is not None, "broken before bind"
        return await self._router.broken()

    async def close(self) -> None:
        if self._router is not None:
            await self._router.close()
        self._process.leave()

    async def stats(self) -> tuple[RouterCounters, ProcessFacts]:
        assert self._router is not None, "stats before bind"
        return self._router.stats(), process_facts("router", self._name.removeprefix("router-"), node_id())


@ray.remote(num_cpus=0)
class Gateway:
    """A gateway's process."""

    def __init__(self, spec: ServiceSpec, index: int) -> None:
        self._name = gateway_name(index)
        self._process = _start_process(spec, self._name)
        self._spec = spec
        self._gateway: gateways.Gateway | None = None
        self._starting: asyncio.Task[int] | None = None
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> int:
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        return await asyncio.shield(self._starting)  # a restarted controller asks again

    async def _start(self) -> int:
        site = self._process.site

        def dial(router: str, address: Address) -> Awaitable[LinkPipeline]:
            return LinkPipeline.dial(router, address, site, gateway=self._name)

        # Imported modules are never garbage. Without them a collection holds up the event loop for half as long.
        gc.collect()
        gc.freeze()
        self._gateway = gateways.Gateway(
            self._name, self._spec.name, context=self._spec.context, fetch_stats=_stats, dial=dial
        )
        return await self._gateway.start(self._spec.entrance)

    async def generation(self) -> int:
        return self._plain.generation

    async def set_loading(self, fraction: float) -> None:
        self._plain.set_loading(fraction)

    async def set_model(self, version: str, row_invariant: bool) -> None:
        if self._plain.model is None:  # a restarted controller says again what was loaded
            folder = ModelFolder(self._spec, part=self._name, node=_node())
            # Beside the event loop: large vocabularies take some tenths of a second.
            self._plain.set_model(await asyncio.to_thread(folder.served_model, version, row_invariant))

    async def set_routes(self, generation: int, routers: Sequence[tuple[str, Address]]) -> None:
        await self._plain.set_routes(generation, routers)

    async def link_news(self, seen: int) -> LinkNews:
        return await self._plain.link_news(seen)

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
        self._process.leave()

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
