"""A whole pipeline in this process: real stages, workers, links and router, no Ray.

async with LocalPipeline(folder, split=[3, 3, 2]) as pipeline:
    tokens = (await pipeline.generate([1, 2, 3], max_tokens=8)).tokens
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.messages import EndReason, Finished, Sampling, Stopping, Submit
from tramontane.cluster.router import Router
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.site import Site
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.cluster.worker import StageWorker
from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels import choose_here
from tramontane.stages.kv_layout import plan_kv
from tramontane.stages.split import split_as
from tramontane.stages.stage import Stage

NODE = "here"


class LocalStage:
    """A stage worker whose calls run on threads, as Ray would run them in another process."""

    def __init__(self, worker: StageWorker, threads: ThreadPoolExecutor) -> None:
        self.worker = worker
        self._threads = threads

    async def address(self):
        return self.worker.address()

    async def epoch(self):
        return self.worker.epoch()

    async def bind(self, *arguments):
        await asyncio.get_running_loop().run_in_executor(self._threads, self.worker.bind, *arguments)

    async def stepped(self):
        return self.worker.stepped()

    async def run(self, epoch):
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.worker.run, epoch)


@dataclass
class Heard:
    """What one request's receiver has heard."""

    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finished: asyncio.Future[Finished] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    first: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, offset: int, token: int, log_probability: float) -> None:
        assert offset == len(self.tokens), f"offset {offset} after {len(self.tokens)} tokens"
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.first.set()

    def end(self, finished: Finished) -> None:
        assert not self.finished.done(), "ended twice"
        self.finished.set_result(finished)
        self.first.set()

    @property
    def reason(self) -> EndReason:
        return self.finished.result().reason


class LocalPipeline:
    """Starts everything on entering, and leaves nothing."""

    def __init__(
        self,
        folder: Path,
        split: list[int],
        *,
        dtype: str = "float32",
        chunk: int = 32,
        block: int = 16,
        kv_memory_bytes: int = 64 * 2**20,
        context: int | None = None,
        max_batch_tokens: int = 256,
        max_waiting: int = 64,
        hang_limit_s: float = 45.0,
        vocabulary: Vocabulary | None = None,
        **limits: object,
    ) -> None:
        self._config = ModelConfig.load(folder)
        self._folder = folder
        self._dtype = dtype
        self._vocabulary = vocabulary
        self._spans = split_as(self._config, split)
        context = context or self._config.context
        layout = plan_kv(
            self._config,
            self._spans,
            kv_memory_bytes=kv_memory_bytes,
            chunk=chunk,
            context=context,
            dtype=dtype,
            block=block,
        )
        self.options = SchedulerOptions(
            layout=layout, context=context, max_batch_tokens=max_batch_tokens, max_waiting=max_waiting, **limits
        )
        self.hang_limit_s = hang_limit_s
        self._numbers = itertools.count()

    async def __aenter__(self) -> LocalPipeline:
        self.site = Site(node=NODE, sockets=Path(tempfile.mkdtemp(prefix="tm-")), secret=b"of the tests")
        self._threads = ThreadPoolExecutor(32)
        self.workers = [self._worker(index, span) for index, span in enumerate(self._spans)]
        kernels = choose_here(None, dtype=self._dtype, device="cpu", quantize=None)
        for worker in self.workers:
            worker.load(kernels)
        self.router = self.make_router("router-0")
        address = await self.router.bind()
        self.pipeline = await LinkPipeline.dial("router-0", address, self.site, gateway="gateway-0")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pipeline.close()
        await self.router.close()
        for worker in self.workers:
            worker.close()
        self._threads.shutdown()
        shutil.rmtree(self.site.sockets)

    def make_router(self, name: str) -> Router:
        stages = [LocalStage(worker, self._threads) for worker in self.workers]
        return Router(name, self.site, stages, self.options, self.hang_limit_s)

    def _worker(self, index: int, span: range) -> StageWorker:
        def load(kernels, on_progress):
            return Stage.load(
                self._config,
                self._folder,
                span,
                dtype=self._dtype,
                device="cpu",
                kernels=kernels,
                on_progress=on_progress,
                sampleable_ids=self._vocabulary.sampleable_ids if self._vocabulary else None,
                unnamed_ids=self._vocabulary.unnamed_ids if self._vocabulary else (),
            )

        return StageWorker(f"stage-0.{index}", self.site, load, lambda: torch.set_num_threads(1))

    def submit(
        self,
        prompt: list[int],
        *,
        max_tokens: int = 8,
        token_ids: tuple[int, ...] = (),
        remaining_ms: float | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> tuple[int, Heard]:
        number, heard = next(self._numbers), Heard()
        message = Submit(
            request=number,
            request_id=f"r{number}",
            tokens=np.array(prompt, np.int32),
            sampling=Sampling(temperature=temperature, seed=seed),
            stopping=Stopping(max_tokens=max_tokens, token_ids=token_ids),
            remaining_ms=remaining_ms,
        )
        self.pipeline.submit(message, heard)
        return number, heard

    async def generate(self, prompt: list[int], **options: object) -> Heard:
        _, heard = self.submit(prompt, **options)
        await asyncio.wait_for(asyncio.shield(heard.finished), 120)
        return heard

    @property
    def idle(self) -> bool:
        stats = self.router.stats()
        return not (stats.running or stats.waiting or stats.in_flight_microbatches or any(stats.kv_blocks_used))

    async def until_idle(self) -> None:
        async with asyncio.timeout(30):
            while not self.idle:
                await asyncio.sleep(0.01)
