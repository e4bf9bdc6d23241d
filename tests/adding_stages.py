"""A pipeline of stage workers whose results one can compute by hand: each stage adds one to every token."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from wires import DEADLINE_S, FAR, NEAR, dial, in_thread, listening, site_at, socket_folder

from tramontane.cluster.address import Address
from tramontane.cluster.link import Link
from tramontane.cluster.site import Site
from tramontane.cluster.worker import StageWorker
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Microbatch, StepResult

LAYOUT = KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(10,))
CONTEXT, MAX_TOKENS = 64, 512


@dataclass
class Counted:
    busy_ns: int = 0
    steps: int = 0
    tokens: int = 0


@dataclass
class AddingStage:
    """Rows are the tokens, each `width` times as int32; every stage adds one, and the last one answers the last row."""

    index: int
    stages: int
    width: int = 1
    epoch: int = 0
    stats: Counted = field(default_factory=Counted)
    before_step: Callable[[Microbatch], None] = lambda microbatch: None
    seen: list[tuple[int, int]] = field(default_factory=list)
    """Epoch and step of all that was stepped through."""
    bound: tuple[object, ...] = ()
    step_threads: set[int] = field(default_factory=set)
    digests: dict[str, bytes] = field(default_factory=dict)
    numerics: str = "by hand"
    row_invariant: bool = True

    def __post_init__(self) -> None:
        self.received: queue.Queue[np.ndarray] = queue.Queue()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int) -> None:
        self.epoch, self.bound = epoch, (layout, context, max_tokens)
        self.received = queue.Queue()

    def inbox(self, tokens: int) -> memoryview:
        rows = np.empty((tokens, self.width), np.int32)
        self.received.put(rows)
        return memoryview(rows).cast("B")

    def step(self, microbatch: Microbatch) -> memoryview | StepResult:
        self.before_step(microbatch)
        self.step_threads.add(threading.get_ident())
        if self.is_first:
            rows = np.repeat(microbatch.tokens[:, None], self.width, axis=1) + np.int32(1)
        else:
            rows = self.received.get_nowait() + np.int32(1)
        assert (rows == rows[:, :1]).all(), "rows of two microbatches mixed"
        assert rows.shape == (len(microbatch.tokens), self.width)
        self.seen.append((microbatch.epoch, microbatch.step))
        self.stats.steps += 1
        self.stats.tokens += len(rows)
        if self.index + 1 < self.stages:
            return memoryview(np.ascontiguousarray(rows)).cast("B")
        token = rows[microbatch.sampled.row, 0]
        zeros = np.zeros(len(token), np.float32)
        return StepResult(
            epoch=microbatch.epoch,
            step=microbatch.step,
            token=token,
            log_probability=zeros,
            finite=zeros == 0,
            score=zeros[:0],
        )


class Pipeline:
    """Workers of a few adding stages, and the router's two ends. The workers' nodes may differ from the listeners'."""

    def __init__(self, site: Site, accepted, router: Address, *, node: str, stages: int, width: int) -> None:
        self.router = router
        self.node = node
        self.accepted = accepted
        self.stages = [AddingStage(index, stages, width) for index in range(stages)]
        self.prepared: list[int] = []
        """Threads in which a run has begun."""
        self.on_step_thread: Callable[[], object] = lambda: self.prepared.append(threading.get_ident())
        self.workers = [
            StageWorker(
                f"stage-0.{stage.index}",
                site,
                lambda on_progress, stage=stage: stage,
                lambda: self.on_step_thread(),
            )
            for stage in self.stages
        ]
        for worker in self.workers:
            worker.load()
        self.runs: list[queue.Queue[object]] = []
        self.to_first: Link | None = None
        self.from_last: Link | None = None

    def bind(self, epoch: int) -> None:
        downstream = [*(worker.address() for worker in self.workers[1:]), self.router]
        for worker, address in zip(self.workers, downstream, strict=True):
            worker.bind(epoch, LAYOUT, CONTEXT, MAX_TOKENS, self.seen_from(address))

    def seen_from(self, address: Address) -> Address:
        """Workers dial as if all others were on the other node, where this is about TCP."""
        return address if self.node == NEAR else Address(FAR, "", address.host, address.port)

    def start(self, epoch: int) -> None:
        self.bind(epoch)
        self.runs = [in_thread(lambda worker=worker: worker.run(epoch)) for worker in self.workers]
        self.to_first = self.dial_first(epoch)
        self.from_last, hello = self.accepted.get(timeout=DEADLINE_S)
        assert (hello.epoch, hello.name) == (epoch, f"stage-0.{len(self.stages) - 1}")

    def dial_first(self, epoch: int, **options: object) -> Link:
        return dial(self.seen_from(self.workers[0].address()), epoch=epoch, **options)

    def reasons(self) -> list[str]:
        """Why each run has returned."""
        return [run.get(timeout=DEADLINE_S) for run in self.runs]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for link in (self.to_first, self.from_last):
            if link is not None:
                link.close()


@contextlib.contextmanager
def pipeline(node: str = NEAR, *, stages: int = 3, width: int = 1, **changes: object) -> Iterator[Pipeline]:
    with socket_folder() as folder, listening(folder, name="router-0", **changes) as (router, accepted):
        site = site_at(folder, **changes)
        whole = Pipeline(site, accepted, router.address, node=node, stages=stages, width=width)
        try:
            yield whole
        finally:
            whole.close()
