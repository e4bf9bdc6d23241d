"""Stage workers in threads of one process, over real sockets: a pipeline of stages that each add one to every token."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adding_stages import CONTEXT, LAYOUT, MAX_TOKENS, AddingStage, pipeline
from wires import (
    DEADLINE_S,
    NEAR,
    both_doors,
    dial,
    in_thread,
    microbatch,
    open_descriptors,
    site_at,
    socket_folder,
    wait_until,
)

from tramontane.cluster import doors
from tramontane.cluster.address import Address
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Cancel
from tramontane.cluster.worker import StageWorker
from tramontane.stages.microbatch import Microbatch


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


def test_small_outputs_do_not_overtake_large_ones():
    """16 KiB a row: the large ones leave by the send thread, the small ones from the step loop."""
    rows = [300, 1, 2, 512, 512, 1, 3, 1, 100, 4, 5, 1] * 3
    with pipeline(width=4096) as whole:
        whole.start(epoch=1)
        sender = in_thread(
            lambda: [whole.to_first.send(microbatch(n, np.full(count, n), epoch=1)) for n, count in enumerate(rows)]
        )
        for step in range(len(rows)):
            result = whole.from_last.receive()
            assert (result.step, result.token.tolist()) == (step, [step + 3])
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
        assert sorted(stepped) == sorted(whole.prepared)
        assert len(stepped) == 3


def test_a_thread_that_cannot_be_prepared_leaves_no_neighbour_waiting(caplog):
    caplog.set_level("INFO")
    with pipeline(stages=1) as whole:
        whole.on_step_thread = lambda: 1 / 0
        whole.bind(1)
        link = whole.dial_first(1)
        wait_until(lambda: "stage-0.0 is linked with tester" in caplog.text)
        with pytest.raises(ZeroDivisionError):
            whole.workers[0].run(1)
        with pytest.raises(LinkClosed):
            link.receive()


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


def test_a_step_in_progress_ends_before_the_stage_is_bound_again():
    computing, go_on = threading.Event(), threading.Event()
    epochs = []

    def compute(batch: Microbatch) -> None:
        computing.set()
        assert go_on.wait(DEADLINE_S)
        epochs.append(stage.epoch)

    with pipeline(stages=1) as whole:
        (stage,) = whole.stages
        stage.before_step = compute
        whole.start(epoch=3)
        whole.to_first.send(microbatch(0, [1], epoch=3))
        assert computing.wait(DEADLINE_S)
        binding = in_thread(lambda: whole.bind(4))
        with pytest.raises(LinkClosed):
            whole.from_last.receive()  # the older run has been told to end
        with pytest.raises(queue.Empty):
            binding.get(timeout=0.2)
        go_on.set()
        assert binding.get(timeout=DEADLINE_S) is None
        assert whole.reasons() == ["epoch 4 is bound"]
        assert (epochs, stage.epoch) == ([3], 4)


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
        whole.to_first.send(microbatch(0, [1], epoch=5))
        assert whole.from_last.receive().token.tolist() == [4]  # the first one is in
        with pytest.raises(LinkClosed):
            whole.dial_first(5).receive()
        whole.to_first.send(microbatch(1, [2], epoch=5))
        assert whole.from_last.receive().token.tolist() == [5]


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


@both_doors
def test_a_stage_that_computes_for_longer_than_the_silence_is_not_silent(node, monkeypatch):
    monkeypatch.setattr(doors, "HEARTBEAT_PERIOD_S", 0.025)
    with pipeline(node, silence_s=0.25) as whole:
        whole.start(epoch=1)
        whole.stages[1].before_step = lambda _: time.sleep(1)  # four times as long
        whole.to_first.send(microbatch(0, [1], epoch=1))
        assert whole.from_last.receive().token.tolist() == [4]


def test_workers_of_one_secret_link_up_and_others_do_not():
    with pipeline() as whole:
        whole.start(epoch=1)
        whole.to_first.send(microbatch(0, [1], epoch=1))
        assert whole.from_last.receive().token.tolist() == [4]
        whole.bind(2)
        with pytest.raises(LinkClosed):
            whole.dial_first(2, secret=b"of another")


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
        worker = StageWorker("stage-0.0", site_at(folder), load, lambda: None)
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
    wait_until(lambda: open_descriptors() <= descriptors and threading.active_count() <= threads)
