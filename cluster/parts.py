"""The parts of a service as the controller sees them, and the platform that creates them.

Each part is a protocol of coroutines, so that Ray's actors and a test's stand-ins look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tramontane.cluster.address import Address
from tramontane.cluster.routes import LinkNews
from tramontane.cluster.spec import ServiceSpec
from tramontane.cluster.stats import GatewayCounters, ProcessFacts, RouterCounters, StageCounters
from tramontane.cluster.worker import LoadedStage, LoadProgress
from tramontane.stages.cpu import Cpu
from tramontane.stages.kernel_choice import NodeKernels
from tramontane.stages.variants import KernelChoice


class StageControl(Protocol):
    """A stage worker seen from the controller; the router's view of it is `router.StagePort`."""

    async def node_kernels(self) -> NodeKernels:
        """The facts that decide which kernels can run there. Compiles those that the node would choose by itself."""
        ...

    async def load(self, kernels: KernelChoice) -> LoadedStage:
        """Read and pack the weights, for these kernels.

        Raises:
            ValueError: the kernels do not run there.
            OtherBytes: the folder holds other bytes than the service has loaded.
        """
        ...

    async def progress(self) -> LoadProgress:
        """How far that is."""
        ...

    async def stats(self) -> tuple[StageCounters, ProcessFacts]:
        """Counters since it was loaded."""
        ...


class RouterControl(Protocol):
    """A router seen from the controller."""

    async def bind(self) -> Address:
        """Bind the stages and serve; answers where gateways may dial."""
        ...

    async def broken(self) -> str:
        """Wait until the pipeline has broken; the reason."""
        ...

    async def stats(self) -> tuple[RouterCounters, ProcessFacts]:
        """Counters since it started."""
        ...


class GatewayControl(Protocol):
    """A gateway seen from the controller."""

    async def start(self) -> int:
        """Open the port; answers which."""
        ...

    async def generation(self) -> int:
        """Of its route table; below 0 before there is one."""
        ...

    async def set_loading(self, fraction: float) -> None:
        """What callers hear meanwhile."""

    async def set_model(self, version: str, row_invariant: bool) -> None:
        """The stages have loaded. A gateway that was told before keeps what it has.

        Raises:
            OtherBytes: the folder holds another configuration or tokenizer than was loaded.
        """

    async def set_routes(self, generation: int, routers: Sequence[tuple[str, Address]]) -> None:
        """Keep links with these routers, by name; returns when each was dialled once. Older tables are ignored."""

    async def link_news(self, seen: int) -> LinkNews:
        """How the links stand, once that is another number than the one that was seen."""
        ...

    async def set_unavailable(self, reason: str) -> None:
        """Nothing serves."""

    async def gone(self) -> str:
        """Wait until the gateway has closed; the reason."""
        ...

    async def stats(self) -> tuple[GatewayCounters, ProcessFacts]:
        """Counters since it started."""
        ...

    async def close(self) -> None:
        """Give streams in flight a little time, then end them."""


class Platform(Protocol):
    """Where parts are created: found again by name if they live, else made."""

    async def gateway(self, name: str) -> GatewayControl:
        """The gateway's process."""
        ...

    async def reserve(self, replica: int) -> None:
        """Ask for a pipeline's room, all stages or none."""

    async def room(self, replica: int, timeout_s: float) -> str:
        """Wait for it; an empty string once it is there, else a line that says what is lacking."""
        ...

    async def stage(self, name: str, replica: int, index: int) -> StageControl:
        """A stage's process, in the pipeline's room."""
        ...

    async def router(self, name: str, stages: Sequence[StageControl]) -> RouterControl:
        """The router's process."""
        ...

    def cpu(self) -> Cpu:
        """The CPU of the node on which `serve` and the controller run."""
        ...

    async def probe_kernels(self) -> dict[str, float]:
        """The speeds of the variants on that node, by a short measurement that its user's cache keeps."""
        ...

    async def record(self, spec: ServiceSpec) -> None:
        """Keep the spec for a controller that comes back, and for parts that are created from now on."""

    async def end(self) -> None:
        """End every part and give its room back."""
