"""Stage workers in threads of one process, over real sockets: a pipeline of stages that each add one to every token."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from wires import (
    DEADLINE_S,
    FAR,
    NEAR,
    both_doors,
    dial,
    in_thread,
    listening,
    microbatch,
    open_descriptors,
    socket_folder,
    wait_until,
)

from tramontane.cluster.link import Address, Link, LinkClosed
from tramontane.cluster.messages import Cancel
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

    def __init__(self, folder, accepted, router: Address, *, node: str, stages: int, width: int, secret: bytes) -> None:
        self.router = router
        self.node = node
        self.secret = secret
        self.accepted = accepted
        self.stages = [AddingStage(index, stages, width) for index in range(stages)]
        self.on_step_thread: list[int] = []
        self.workers = [
            StageWorker(
                f"stage-0.{stage.index}",
                NEAR,
                lambda on_progress, stage=stage: stage,
                lambda: self.on_step_thread.append(threading.get_ident()),
                secret=secret,
                socket_dir=folder,
                host="127.0.0.1",
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
        assert (hello.epoch, hello.name) == (epoch, self.workers[-1]._name)

    def dial_first(self, epoch: int, **options: object) -> Link:
        return dial(self.seen_from(self.workers[0].address()), epoch=epoch, **{"secret": self.secret, **options})

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
def pipeline(node: str = NEAR, *, stages: int = 3, width: int = 1, secret: bytes = b"") -> Iterator[Pipeline]:
    with socket_folder() as folder, listening(folder, secret=secret, name="router-0") as (router, accepted):
        whole = Pipeline(folder, accepted, router.address, node=node, stages=stages, width=width, secret=secret)
        try:
            yield whole
        finally:
            whole.close()


@both_doors
@pytest.mark.parametrize("stages", [1, 3])
def test_results_come_back_in_order_and_as_computed_by_hand(node, stages):
    with pipeline(node, stages=stages) as whole:
        whole.start(epoch=4)
        sender = in_thread(lambda: [whole.to_first.send(microbatch(n, [5, 70 + n], epoch=4)) for n in range(200)])
        for step in range(200):
            result = whole.from_last.receive()
            assert (result.epoch, result.step, result.token.tolist()) == (4, step, [70 + step + stages])
        sender.get(timeout=DEADLINE_S)
        for stage in whole.stages:
            assert stage.seen == [(4, step) for step in range(200)]
            assert stage.bound == (LAYOUT, CONTEXT, MAX_TOKENS)
        assert [worker.stats().steps for worker in whole.workers] == [200] * stages
        assert [worker.stats().tokens for worker in whole.workers] == [400] * stages
        assert [worker.stats().name for worker in whole.workers] == [f"0.{index}" for index in range(stages)]


@both_doors
def test_payloads_of_8_megabytes_in_flight_do_not_block_each_other(node):
    with pipeline(node, width=4096) as whole:
        whole.start(epoch=1)
        sender = in_thread(
            lambda: [whole.to_first.send(microbatch(n, np.full(512, 1000 * n), epoch=1)) for n in range(6)]
        )
        for step in range(6):
            assert whole.from_last.receive().token.tolist() == [1000 * step + 3]
        sender.get(timeout=DEADLINE_S)


def test_a_stage_receives_and_sends_while_it_computes():
    computing, go_on = threading.Semaphore(0), threading.Event()

    def compute(batch: Microbatch) -> None:
        computing.release()
        if batch.step == 2:
            assert go_on.wait(DEADLINE_S)

    with pipeline(width=4096) as whole:
        whole.stages[1].before_step = compute
        whole.start(epoch=1)
        for step in range(6):  # larger than any socket's buffer: they get through only if the middle one reads on
            whole.to_first.send(microbatch(step, np.full(512, step), epoch=1))
        for _ in range(3):
            assert computing.acquire(timeout=DEADLINE_S)
        wait_until(lambda: len(whole.stages[0].seen) == 6)
        assert [whole.from_last.receive().step for _ in range(2)] == [0, 1]
        wait_until(lambda: whole.stages[1].received.qsize() == 4)  # steps 2 to 5 have arrived
        assert len(whole.stages[2].seen) == 2
        go_on.set()
        assert [whole.from_last.receive().token.tolist() for _ in range(4)] == [[step + 3] for step in range(2, 6)]


def test_steps_run_in_the_thread_that_was_prepared_for_them():
    with pipeline() as whole:
        whole.start(epoch=1)
        whole.to_first.send(microbatch(0, [1], epoch=1))
        whole.from_last.receive()
        stepped = {thread for stage in whole.stages for thread in stage.step_threads}
        assert sorted(stepped) == sorted(whole.on_step_thread)
        assert len(stepped) == 3


@both_doors
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_one_workers_end_makes_all_runs_return(node, killed):
    with pipeline(node) as whole:
        whole.start(epoch=1)
        whole.to_first.send(microbatch(0, [1], epoch=1))
        assert whole.from_last.receive().token.tolist() == [4]
        whole.workers[killed].close()
        reasons = whole.reasons()
        assert reasons[killed] == "the worker was closed"
        assert all(reason.startswith(("upstream: ", "downstream: ", "the worker")) for reason in reasons)
        assert all("\n" not in reason for reason in reasons)
        for link in (whole.to_first, whole.from_last):
            with pytest.raises(LinkClosed):
                link.receive()


@pytest.mark.parametrize("end", ["to_first", "from_last"])
def test_the_routers_end_makes_all_runs_return(end):
    with pipeline() as whole:
        whole.start(epoch=1)
        getattr(whole, end).close()
        assert len(whole.reasons()) == 3


def test_a_pipeline_bound_again_at_a_higher_epoch_works_and_the_old_router_is_cut_off():
    with pipeline() as whole:
        whole.start(epoch=3)
        whole.to_first.send(microbatch(0, [10], epoch=3))
        assert whole.from_last.receive().token.tolist() == [13]
        old_runs, old_links = whole.runs, (whole.to_first, whole.from_last)
        whole.start(epoch=7)
        assert {run.get(timeout=DEADLINE_S) for run in old_runs} & {"epoch 7 is bound"}
        for link in old_links:
            with pytest.raises(LinkClosed):
                link.receive()
            link.close()
        whole.to_first.send(microbatch(0, [20], epoch=7))
        assert whole.from_last.receive().token.tolist() == [23]
        assert [worker.epoch() for worker in whole.workers] == [7, 7, 7]
        assert all(stage.seen == [(3, 0), (7, 0)] for stage in whole.stages)


@pytest.mark.parametrize("epoch", [1, 4, 5])
def test_an_epoch_that_is_not_higher_is_refused_and_harms_nothing(epoch):
    with pipeline() as whole:
        whole.start(epoch=5)
        with pytest.raises(ValueError, match=rf"epoch is {epoch}; stage-0\.1 was bound at 5, it takes a higher one"):
            whole.workers[1].bind(epoch, LAYOUT, CONTEXT, MAX_TOKENS, whole.router)
        whole.to_first.send(microbatch(0, [1], epoch=5))
        assert whole.from_last.receive().token.tolist() == [4]


@pytest.mark.parametrize("epoch", [4, 6])
def test_a_link_of_another_epoch_is_refused(epoch, caplog):
    with pipeline() as whole:
        whole.bind(epoch=5)
        with pytest.raises(LinkClosed):
            whole.dial_first(epoch, name="router-9").receive()
        whole.start(epoch=10)
    assert f"stage-0.0 refused router-9 of epoch {epoch} at epoch 5" in caplog.text


def test_a_second_upstream_is_refused():
    with pipeline() as whole:
        whole.start(epoch=5)
        with pytest.raises(LinkClosed):
            whole.dial_first(5).receive()
        whole.to_first.send(microbatch(0, [1], epoch=5))
        assert whole.from_last.receive().token.tolist() == [4]


def test_upstream_may_dial_before_run_is_called():
    with pipeline(stages=1) as whole:
        whole.bind(epoch=2)
        link = whole.dial_first(2)
        link.send(microbatch(0, [1], epoch=2))
        run = in_thread(lambda: whole.workers[0].run(2))
        result, _ = whole.accepted.get(timeout=DEADLINE_S)
        assert result.receive().token.tolist() == [2]
        link.close()
        assert run.get(timeout=DEADLINE_S).startswith("upstream: ")
        result.close()


def test_microbatches_of_another_epoch_are_dropped_with_their_rows():
    with pipeline(stages=2) as whole:
        last = whole.workers[1]
        last.bind(5, LAYOUT, CONTEXT, MAX_TOKENS, whole.router)
        run = in_thread(lambda: last.run(5))
        upstream = dial(last.address(), epoch=5)
        result, _ = whole.accepted.get(timeout=DEADLINE_S)
        upstream.send(microbatch(8, [66, 66], epoch=4), memoryview(np.full(2, 66, np.int32)).cast("B"))
        upstream.send(microbatch(0, [40], epoch=5), memoryview(np.full(1, 41, np.int32)).cast("B"))
        assert result.receive().token.tolist() == [42]
        assert whole.stages[1].seen == [(5, 0)]
        upstream.close()
        run.get(timeout=DEADLINE_S)
        result.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_step_that_fails_is_logged_and_ends_every_run(failing, caplog):
    def fail(batch: Microbatch) -> None:
        if batch.step == 2:
            raise RuntimeError("the kernel divides by zero\nand says so at length")

    with pipeline() as whole:
        whole.stages[failing].before_step = fail
        whole.start(epoch=6)
        for step in range(2):
            whole.to_first.send(microbatch(step, [1], epoch=6))
            assert whole.from_last.receive().step == step
        whole.to_first.send(microbatch(2, [1], epoch=6))
        with pytest.raises(LinkClosed):
            whole.from_last.receive()
        assert whole.reasons()[failing] == "step 2: RuntimeError: the kernel divides by zero"
        assert f"stage-0.{failing} failed at epoch 6, step 2" in caplog.text
        whole.from_last.close()
        whole.start(epoch=7)
        whole.to_first.send(microbatch(0, [1], epoch=7))
        assert whole.from_last.receive().token.tolist() == [4]


@pytest.mark.parametrize("wrong", ["message", "rows", "no rows"])
def test_an_upstream_that_sends_something_else_ends_the_run(wrong):
    with pipeline(stages=2) as whole:
        last = whole.workers[1]
        last.bind(1, LAYOUT, CONTEXT, MAX_TOKENS, whole.router)
        run = in_thread(lambda: last.run(1))
        upstream = dial(last.address(), epoch=1)
        result, _ = whole.accepted.get(timeout=DEADLINE_S)
        if wrong == "message":
            upstream.send(Cancel(request=1))
        else:
            upstream.send(microbatch(0, [1], epoch=1), memoryview(bytes(8)) if wrong == "rows" else None)
        reason = run.get(timeout=DEADLINE_S)
        assert {
            "message": "it sent Cancel",
            "rows": "rows: 8 bytes, the inbox has 4",
            "no rows": "rows: 0 bytes, the inbox has 4",
        }[wrong] in reason
        upstream.close()
        result.close()


def test_a_worker_that_waits_for_upstream_ends_with_its_downstream():
    with pipeline(stages=1) as whole:
        whole.bind(1)
        run = in_thread(lambda: whole.workers[0].run(1))
        result, _ = whole.accepted.get(timeout=DEADLINE_S)
        result.close()
        assert run.get(timeout=DEADLINE_S) == "downstream: closed by the other end"


def test_a_worker_that_waits_for_upstream_can_be_bound_again():
    with pipeline(stages=1) as whole:
        whole.bind(1)
        run = in_thread(lambda: whole.workers[0].run(1))
        result, _ = whole.accepted.get(timeout=DEADLINE_S)
        whole.start(epoch=2)
        assert run.get(timeout=DEADLINE_S) == "epoch 2 is bound"
        result.close()


def test_a_router_that_is_gone_ends_the_run_of_the_last_stage():
    with pipeline(stages=1) as whole:
        whole.workers[0].bind(1, LAYOUT, CONTEXT, MAX_TOKENS, Address(NEAR, "/nowhere/router.sock", "", 0))
        assert "cannot dial" in whole.workers[0].run(1)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_of_an_epoch_that_is_not_bound_returns_at_once(epoch):
    with pipeline(stages=1) as whole:
        assert whole.workers[0].run(epoch) == f"not bound at epoch {epoch}, the highest is 0"
        whole.bind(2)
        assert whole.workers[0].run(epoch) == f"not bound at epoch {epoch}, the highest is 2"


def test_workers_of_one_secret_link_up_and_others_do_not():
    with pipeline(secret=b"of the house") as whole:
        whole.start(epoch=1)
        whole.to_first.send(microbatch(0, [1], epoch=1))
        assert whole.from_last.receive().token.tolist() == [4]
        whole.bind(2)
        with pytest.raises(LinkClosed):
            whole.dial_first(2, secret=b"of another").receive()


def test_loading_reports_progress_and_happens_once():
    begun, go_on = threading.Event(), threading.Event()
    stage = AddingStage(0, 1, digests={"norm": b"\1" * 32})
    loads = []

    def load(on_progress: Callable[[float], None]) -> AddingStage:
        loads.append(1)
        on_progress(0.25)
        begun.set()
        assert go_on.wait(DEADLINE_S)
        return stage

    with socket_folder() as folder:
        worker = StageWorker("stage-0.0", NEAR, load, lambda: None, secret=b"", socket_dir=folder)
        assert worker.progress() == 0.0
        outcome = in_thread(worker.load)
        assert begun.wait(DEADLINE_S)
        assert worker.progress() == 0.25
        assert worker.stats().steps == 0
        go_on.set()
        loaded = outcome.get(timeout=DEADLINE_S)
        assert (loaded.digests, loaded.numerics, loaded.row_invariant) == ({"norm": b"\1" * 32}, "by hand", True)
        assert worker.progress() == 1.0
        assert worker.load() == loaded
        assert loads == [1]
        worker.close()


@both_doors
def test_descriptors_threads_and_paths_return_to_baseline(node):
    descriptors, threads = open_descriptors(), threading.active_count()
    for _ in range(2):
        with pipeline(node) as whole:
            for epoch in (1, 2):
                whole.start(epoch)
                whole.to_first.send(microbatch(0, [1], epoch=epoch))
                whole.from_last.receive()
                whole.to_first.close()
                whole.reasons()
                whole.from_last.close()
            paths = [Path(worker.address().unix_path) for worker in whole.workers]
            assert all(path.is_socket() for path in paths)
            whole.close()
            assert not any(path.exists() for path in paths)
    wait_until(lambda: (open_descriptors(), threading.active_count()) == (descriptors, threads))
