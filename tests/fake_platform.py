"""A platform for the controller whose parts are computed by hand, and log what they are asked."""

from __future__ import annotations

import asyncio
from dataclasses import fields

from tramontane.cluster.address import Address
from tramontane.cluster.routes import LinkNews
from tramontane.cluster.spec import ServiceSpec
from tramontane.cluster.stats import GatewayCounters, RouterCounters, StageCounters, process_facts
from tramontane.cluster.worker import LoadedStage, LoadProgress
from tramontane.stages.cpu import Cpu
from tramontane.stages.kernel_choice import NodeKernels
from tramontane.stages.variants import VARIANTS

AVX512 = Cpu("Maker 1-2", "a CPU", frozenset().union(*(each.needs for each in VARIANTS if each.name == "avx512")))
AVX2 = Cpu("Maker 1-1", "an older CPU", frozenset({"avx2", "fma"}))
ADDRESS = Address(node="n", unix_path="/r", host="", port=0)


class FakePlatform:
    """Keeps a log of all calls; each part is itself, told apart by its name."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lacking = ["no room: 2 CPU are missing"]
        self.load_fails = False
        self.compiling = False
        self.bytes_on_disk = b"d"
        self.asked = 0
        """How often the router was asked for its counters."""
        self.recorded: list[ServiceSpec] = []
        self.nodes = [NodeKernels(f"node {index}", AVX512, "") for index in range(2)]
        self.probed = {"avx512": 2.0, "avx2": 1.0}
        self.given: list[str] = []
        """The kernels that stages were told to load."""
        self.router_broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.gateway_gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.loaded = asyncio.Event()
        self.news: asyncio.Queue[LinkNews | Exception] = asyncio.Queue()
        self.news.put_nowait(LinkNews(number=0, lost=0, trouble=""))

    async def gateway(self, name):
        self.log.append(f"create {name}")
        return FakeGateway(self)

    async def reserve(self, replica):
        self.log.append(f"reserve {replica}")

    async def room(self, replica, timeout_s):
        await asyncio.sleep(0)
        return self.lacking.pop() if self.lacking else ""

    async def stage(self, name, replica, index):
        self.log.append(f"create {name}")
        return FakeStage(self, index)

    async def router(self, name, stages):
        self.log.append(f"create {name} over {len(stages)}")
        return FakeRouter(self)

    def cpu(self):
        return self.nodes[0].cpu

    async def probe_kernels(self):
        self.log.append("probe")
        return self.probed

    async def record(self, spec):
        self.log.append("record")
        self.recorded.append(spec)

    async def end(self):
        self.log.append("end")


class FakeStage:
    def __init__(self, platform, index):
        self.platform, self.index = platform, index

    async def node_kernels(self):
        self.platform.log.append(f"ask stage {self.index}")
        return self.platform.nodes[self.index]

    async def load(self, kernels):
        self.platform.given.append(str(kernels))
        await self.platform.loaded.wait()
        if self.platform.load_fails:
            raise ValueError("tensor model.norm.weight is missing")
        return LoadedStage({f"t{self.index}": self.platform.bytes_on_disk}, "numerics", True)

    async def progress(self):
        return LoadProgress(0.5, self.platform.compiling)

    async def stats(self):
        if self.index == 1:
            raise ConnectionError("dead")
        return StageCounters(name=f"0.{self.index}", busy_ns=1, steps=2, tokens=3), process_facts("stage", "0.0", "n")


class FakeRouter:
    def __init__(self, platform):
        self.platform = platform

    async def bind(self):
        self.platform.log.append("bind")
        return ADDRESS

    async def broken(self):
        return await asyncio.shield(self.platform.router_broken)

    async def stats(self):
        self.platform.asked += 1
        counters = {field.name: 0 for field in fields(RouterCounters) if field.type == "int"}
        return (
            RouterCounters(
                name="0",
                kv_blocks_used=(0,),
                kv_blocks_total=(8,),
                admission=None,
                late="stage 1 is late with step 7",
                **counters,
            ),
            process_facts("router", "0", "n"),
        )


class FakeGateway:
    def __init__(self, platform):
        self.platform = platform

    async def start(self):
        self.platform.log.append("listen")
        return 4242

    async def generation(self):
        return 4

    async def set_loading(self, fraction):
        self.platform.log.append(f"loading {fraction}")

    async def set_model(self, version, row_invariant):
        self.platform.log.append(f"model {len(version)} {row_invariant}")

    async def set_routes(self, generation, routers):
        self.platform.log.append(f"routes {generation} {routers}")

    async def link_news(self, seen):
        news = await self.platform.news.get()
        if isinstance(news, Exception):
            raise news
        assert news.number != seen
        return news

    async def set_unavailable(self, reason):
        self.platform.log.append(f"unavailable: {reason}")

    async def gone(self):
        return await asyncio.shield(self.platform.gateway_gone)

    async def stats(self):
        counters = {field.name: 0 for field in fields(GatewayCounters) if field.type in ("int", "float")}
        return GatewayCounters(name="0", **counters), process_facts("gateway", "0", "n")

    async def close(self):
        self.platform.log.append("close gateway")
