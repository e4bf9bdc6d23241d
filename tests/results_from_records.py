"""A run's result made from records, with plain values where records say nothing."""

from __future__ import annotations

from tramontane.client.loadtest.judging.measures import measure
from tramontane.client.loadtest.judging.timeline import seconds
from tramontane.client.loadtest.result import GeneratorLag, Machine, RunResult, TargetInfo


def result_of(records, load, *, objectives=(), findings=(), stationary=True, workload="16 tokens"):
    window_s = (load.warmup_s, load.duration_s)
    measured = measure(records, load, window_s, objectives)
    return RunResult(
        date="2027-01-01T00:00:00Z",
        tool="tramontane bench",
        command="",
        target=TargetInfo(kind="grpc", address="127.0.0.1:50051", model="fake"),
        machine=Machine(processor="fake", cores=2, memory_gib=8.0, system="Linux"),
        workers=1,
        load=load,
        workload=workload,
        window_s=window_s,
        counts=measured.counts,
        latencies=measured.latencies,
        throughput=measured.throughput,
        objectives=measured.objectives,
        breakdown=measured.breakdown,
        lag=GeneratorLag(send=measured.send_lag, read=None),
        generator_cores=0.1,
        server=None,
        checks=None,
        stationary=stationary,
        stalls=(),
        faults=(),
        ceiling=None,
        findings=tuple(findings),
        timeline=seconds(records, load.duration_s),
        samples=measured.samples,
    )
