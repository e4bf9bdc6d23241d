"""The stage worker: holds a stage and its weights while the process lives, and lends it to one router at a time.

A router binds at an epoch higher than any before, then every stage's `run` streams until a link closes. The worker
moves bytes and never names a tensor; what computes is the stage that `load_stage` makes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tramontane.cluster.address import Address
from tramontane.cluster.link import Link
from tramontane.cluster.listener import Listener
from tramontane.cluster.messages import Hello, Role
from tramontane.cluster.site import Site
from tramontane.cluster.stage_run import StageRun, Steps
from tramontane.cluster.stats import StageCounters
from tramontane.stages.counters import StageStats
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.variants import KernelChoice

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0


class Stage(Steps, Protocol):
    """What a worker asks of its stage; `tramontane.stages.stage.Stage` is one."""

    @property
    def digests(self) -> dict[str, bytes]:
        """See `LoadedStage`."""

    @property
    def numerics(self) -> str:
        """See `LoadedStage`."""

    @property
    def row_invariant(self) -> bool:
        """See `LoadedStage`."""

    @property
    def stats(self) -> StageStats:
        """Since it was loaded."""

    def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int) -> None:
        """Start with an empty KV pool."""


@dataclass(frozen=True)
class LoadedStage:
    """What the service's version is made of."""

    digests: dict[str, bytes]
    """Of each tensor that the stage owns, over every byte, by name."""
    numerics: str
    """The kernels and whatever else decides how they round."""
    row_invariant: bool
    """A row's bits do not depend on who shares its batch."""


@dataclass(frozen=True)
class LoadProgress:
    """How far a stage has loaded."""

    fraction: float
    """0 to 1."""
    compiling: bool = False
    """The stage waits for the compiler of its kernels."""


class StageWorker:
    """Listens from construction on. `progress`, `epoch`, `address`, `bind` and `stats` answer while `run` runs."""

    def __init__(
        self,
        name: str,
        site: Site,
        load_stage: Callable[[KernelChoice, Callable[[float], None]], Stage],
        on_step_thread: Callable[[], None],
    ) -> None:
        """`load_stage` is given its kernels and a callable for its progress; `on_step_thread` is called in each thread
        that steps.

        Raises:
            ValueError, OSError: see `doors.listen_unix` and `doors.listen_tcp`.
        """
        self._name = name
        self._site = site
        self._load_stage = load_stage
        self._on_step_thread = on_step_thread
        self._stage: Stage | None = None
        self._progress = 0.0
        self._loading = threading.Lock()
        self._binding = threading.Lock()
        """One bind at a time."""
        self._changed = threading.Condition()
        self._epoch = 0
        self._downstream: Address | None = None
        self._run: StageRun | None = None
        self._running = False
        self._listener = Listener(name, site, self._on_link)

    def load(self, kernels: KernelChoice) -> LoadedStage:
        """Load the stage, once; long, with `progress` to be read meanwhile."""
        with self._loading:  # a restarted controller asks again
            if self._stage is None:
                self._stage = self._load_stage(kernels, self._set_progress)
                self._progress = 1.0
                log.info("%s is loaded", self._name)
        stage = self._stage
        return LoadedStage(stage.digests, stage.numerics, stage.row_invariant)

    def progress(self) -> float:
        """How much of the stage is loaded, 0 to 1."""
        return self._progress

    def address(self) -> Address:
        """Where upstream dials."""
        return self._listener.address

    def epoch(self) -> int:
        """The highest at which a router has bound, 0 before."""
        return self._epoch

    def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int, downstream: Address) -> None:
        """Lend the stage to a router: end the run of an older one, close its links, start with an empty KV pool.

        `downstream` is the next stage's address or, for the last stage, the router's.

        Raises:
            ValueError: the epoch is not higher than any before.
        """
        stage = self._stage
        assert stage is not None, f"{self._name} is bound before it is loaded"
        with self._binding:
            with self._changed:
                if epoch <= self._epoch:
                    raise ValueError(
                        f"epoch is {epoch}; {self._name} was bound at {self._epoch}, it takes a higher one"
                    )
                self._epoch = epoch  # from here on the older router is fenced off, whatever comes of this
                older, self._run = self._run, None
            if older is not None:
                older.end(f"epoch {epoch} is bound")
            with self._changed:
                while self._running:
                    self._changed.wait()
            stage.bind(epoch, layout, context, max_tokens)
            with self._changed:
                self._downstream = downstream
                self._run = StageRun(self._name, epoch, stage)
        log.info("%s is bound at epoch %d", self._name, epoch)

    def run(self, epoch: int) -> str:
        """Stream microbatches until a link closes, a step fails or a higher epoch is bound; the reason as one line.

        Links to both neighbours belong to this epoch; they are closed when this returns. Weights stay.
        """
        with self._changed:
            run, downstream = self._run, self._downstream
            if run is None or run.epoch != epoch or downstream is None:
                return f"not bound at epoch {epoch}, the highest is {self._epoch}"
            assert not self._running, f"{self._name} runs twice at epoch {epoch}"
            self._running = True
        try:
            self._on_step_thread()
            return run.run(lambda: self._dial(downstream, epoch))
        finally:
            run.end("the run did not start")
            with self._changed:
                self._running = False
                if self._run is run:
                    self._run = None
                self._changed.notify_all()

    def stats(self) -> StageCounters:
        """Counters since the stage was loaded."""
        done = StageStats() if self._stage is None else self._stage.stats
        name = self._name.removeprefix("stage-")
        return StageCounters(name=name, busy_ns=done.busy_ns, steps=done.steps, tokens=done.tokens)

    def stepped(self) -> int:
        """Steps that are done at the bound epoch."""
        run = self._run
        return 0 if run is None else run.stepped

    def close(self) -> None:
        """End a run, wait for it, and free the sockets."""
        with self._changed:
            run, self._run = self._run, None
        if run is not None:
            run.end("the worker was closed")
        self._listener.close()
        with self._changed:
            while self._running:
                self._changed.wait()

    def _dial(self, downstream: Address, epoch: int) -> Link:
        return Link.dial(
            downstream, self._site, role=Role.STAGE, name=self._name, epoch=epoch, timeout_s=DIAL_TIMEOUT_S
        )

    def _on_link(self, link: Link, hello: Hello) -> None:
        """A dialler has passed the handshake; only the upstream of the bound epoch is welcome, once."""
        with self._changed:
            run, bound = self._run, self._epoch
        welcome = run is not None and hello.epoch == run.epoch and hello.role is not Role.GATEWAY
        if welcome and run is not None and run.join_upstream(link):
            log.info("%s is linked with %s at epoch %d", self._name, hello.name, hello.epoch)
            return
        log.warning("%s refused %s of epoch %d at epoch %d", self._name, hello.name, hello.epoch, bound)
        link.close("refused")

    def _set_progress(self, fraction: float) -> None:
        self._progress = fraction
