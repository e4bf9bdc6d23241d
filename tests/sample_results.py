"""Plausible results for the tests of what shows them: a queue that fills as the rate nears 20 requests a second."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.judging.quantiles import distribution, grouped_distribution
from tramontane.client.loadtest.plan import Load
from tramontane.client.loadtest.result import (
    Breakdown,
    Ceiling,
    Checks,
    Counts,
    FaultReport,
    GeneratorLag,
    Machine,
    Objective,
    ObjectiveResult,
    ProcessShare,
    RunResult,
    Samples,
    Second,
    ServerView,
    Stall,
    SweepResult,
    TargetInfo,
    Throughput,
)

OBJECTIVES = (
    Objective(measure="ttft", q=0.95, limit_ms=1000),
    Objective(measure="itl", q=0.95, limit_ms=80),
)
HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x>\x1b[2J[red]{{ 7 * 7 }}"
"""What a server may say of itself."""
STALLED = "1 stall: requests were open and no message came, the longest for 5.2 s from 70.1 s on"
MEANT_FOR_RATE = 20.0
DURATION_S, WARMUP_S = 120.0, 20.0


def samples(rate: float, seed: int) -> Samples:
    random = np.random.default_rng(seed)
    count = int(rate * (DURATION_S - WARMUP_S))
    arrived = np.sort(random.uniform(WARMUP_S, DURATION_S, count))
    load = rate / MEANT_FOR_RATE
    queue = (arrived - WARMUP_S) * max(load - 1, 0) * 150 + 40 * load / max(1.02 - load, 0.05)
    ttfts = queue * random.gamma(2, 0.5, count) + random.lognormal(4.0, 0.4, count)
    outputs = random.integers(8, 120, count)
    itls = tuple(tuple((random.lognormal(2.9 + 0.7 * load, 0.35, n - 1)).round(3).tolist()) for n in outputs)
    e2els = [ttft + sum(gaps) for ttft, gaps in zip(ttfts, itls, strict=True)]
    met = [bool(ttft < 1000 and np.quantile(gaps, 0.95) < 80) for ttft, gaps in zip(ttfts, itls, strict=True)]
    return Samples(
        arrived_s=tuple(arrived.tolist()),
        ttfts_ms=tuple(ttfts.tolist()),
        e2els_ms=tuple(float(each) for each in e2els),
        tpots_ms=tuple(float(np.mean(gaps)) for gaps in itls),
        itls_ms=itls,
        input_lens=tuple(random.integers(4, 400, count).tolist()),
        output_lens=tuple(outputs.tolist()),
        met=tuple(met),
    )


def timeline(found: Samples, rate: float, seed: int, fault_at: int | None) -> tuple[Second, ...]:
    random = np.random.default_rng(seed + 1)
    seconds, waiting = [], 0
    for at in range(int(DURATION_S) + 12):
        silent = fault_at is not None and fault_at <= at < fault_at + 5
        arrived = int(random.poisson(rate)) if at < DURATION_S else 0
        failed = int(random.poisson(rate / 2)) if silent else 0
        ended = 0 if silent else min(waiting + arrived, int(random.poisson(min(rate, MEANT_FOR_RATE) * 1.1)))
        waiting = max(waiting + arrived - ended - failed, 0)
        near = [t for t, a in zip(found.ttfts_ms, found.arrived_s, strict=True) if at <= a + t / 1000 < at + 1]
        seconds.append(
            Second(
                at_s=at,
                arrived=arrived,
                ended=ended,
                failed=failed,
                open=waiting + int(rate),
                output_tokens=0 if silent else int(ended * random.normal(60, 6)),
                ttft_ms=float(np.median(near)) if near and not silent else None,
            )
        )
    return tuple(seconds)


def run(rate: float = 12.0, seed: int = 1, *, fault: bool = False, **changes) -> RunResult:
    """One run; `changes` replace fields of it."""
    found = samples(rate, seed)
    latencies = {
        "ttft": distribution(found.ttfts_ms),
        "itl": grouped_distribution(found.itls_ms),
        "itl_per_token": grouped_distribution(found.itls_ms),
        "tpot": distribution(found.tpots_ms),
        "e2el": distribution(found.e2els_ms),
        "e2el_per_token": distribution(np.asarray(found.e2els_ms) / found.output_lens),
    }
    values = [latencies[each.measure].at(each.q) for each in OBJECTIVES]
    kept = tuple(
        ObjectiveResult(objective=each, value_ms=value, met=value < each.limit_ms)
        for each, value in zip(OBJECTIVES, values, strict=True)
    )
    findings = [
        Finding(severity=Severity.MISSED, text=f"{each.objective} was missed: it is {each.value_ms:.1f} ms")
        for each in kept
        if not each.met
    ]
    if fault:
        findings.append(
            Finding(
                severity=Severity.NOTE,
                text=STALLED,
            )
        )
    failed = 31 if fault else 0
    seconds = DURATION_S - WARMUP_S
    completed = len(found.ttfts_ms)
    result = RunResult(
        date="2026-11-28T09:15:02Z",
        tool="tramontane bench 0.2.0",
        command="tramontane bench run --target 127.0.0.1:50051 "
        f"--rate {rate:g} --duration {DURATION_S:g}s --warmup {WARMUP_S:g}s --seed {seed}",
        target=TargetInfo(
            kind="grpc",
            address="127.0.0.1:50051",
            model="shakespeare-7m",
            version="sha256:1f0c9a",
            dtype="bfloat16",
            stages=2,
            context_tokens=4096,
            row_invariant=True,
        ),
        machine=Machine(processor="AMD EPYC 7763", cores=8, memory_gib=31.4, system="Linux 6.1, Python 3.11.9"),
        workers=2,
        load=Load(kind="poisson", duration_s=DURATION_S, warmup_s=WARMUP_S, seed=seed, rate=rate),
        workload="prompts of 4-400 tokens, completions of 8-120 tokens, greedy",
        window_s=(WARMUP_S, DURATION_S),
        counts=Counts(
            sent=completed + failed,
            completed=completed,
            failed=failed,
            cut=0,
            by_status={"OK": completed, "UNAVAILABLE": failed} if failed else {"OK": completed},
        ),
        latencies=latencies,
        throughput=Throughput(
            requests_per_s=completed / seconds,
            goodput_per_s=sum(found.met) / seconds,
            goodput_share=sum(found.met) / (completed + failed),
            input_tokens_per_s=sum(found.input_lens) / seconds,
            output_tokens_per_s=sum(found.output_lens) / seconds * min(1, MEANT_FOR_RATE / rate),
            tokens_per_message=1.0,
        ),
        objectives=kept,
        breakdown=Breakdown(client_lag_ms=0.4, queue_ms=81.3, prefill_ms=58.2, decode_ms=1890.5, network_ms=3.1),
        lag=GeneratorLag(
            send=distribution(np.random.default_rng(2).gamma(2, 0.2, 1200)),
            read=distribution(np.random.default_rng(3).gamma(2, 0.1, 6000)),
        ),
        generator_cores=0.31,
        server=ServerView(
            seconds=seconds + 0.02,
            stage_busy={"0.0": min(0.99, rate / 21), "0.1": min(0.97, rate / 22)},
            microbatches=4210,
            rows_per_microbatch=rate * 0.6,
            preemptions=0,
            processes=(
                ProcessShare(role="gateway", name="0", cpu_s=22.4, cores=0.22),
                ProcessShare(role="router", name="0", cpu_s=18.9, cores=0.19),
                ProcessShare(role="stage", name="0.0", cpu_s=188.0, cores=1.88),
                ProcessShare(role="stage", name="0.1", cpu_s=181.3, cores=1.81),
                ProcessShare(role="controller", name="0", cpu_s=0.6, cores=0.006),
            ),
        ),
        checks=Checks(
            offsets_wrong=0,
            texts_checked=completed,
            texts_wrong=0,
            alone_checked=20,
            alone_wrong=0,
            repeats_checked=36,
            repeats_wrong=0,
            bad_accepted=0,
            must_match=True,
        ),
        stationary=rate < MEANT_FOR_RATE,
        stalls=(Stall(start_s=70.1, end_s=75.3),) if fault else (),
        faults=(
            FaultReport(
                fault="kill:stage=0.1@70s",
                at_s=70.1,
                target="stage 0.1, pid 4242",
                errors=31,
                stall_s=5.2,
                completed_per_s_before=11.8,
                completed_per_s_after=11.6,
            ),
        )
        if fault
        else (),
        ceiling=Ceiling(requests_per_s=1900.0, messages_per_s=41000.0),
        findings=tuple(findings),
        timeline=timeline(found, rate, seed, 70 if fault else None),
        samples=found,
    )
    return replace(result, **changes)


def poor_run() -> RunResult:
    """A closed loop over HTTP in which nothing was answered: whatever can be missing is."""
    whole = run(4.0)
    return replace(
        whole,
        load=replace(whole.load, kind="closed", rate=None, users=3),
        counts=Counts(sent=3, completed=0, failed=1, cut=2, by_status={"CUT": 2, "HTTP_500": 1}),
        latencies={},
        throughput=replace(
            whole.throughput, requests_per_s=0.0, goodput_per_s=None, goodput_share=None, tokens_per_message=None
        ),
        objectives=tuple(replace(kept, value_ms=None, met=None) for kept in whole.objectives),
        breakdown=None,
        lag=GeneratorLag(send=None, read=None),
        server=None,
        checks=None,
        stationary=None,
        ceiling=None,
        timeline=(),
        samples=Samples(),
    )


def sweep(rates=(4.0, 8.0, 12.0, 16.0, 20.0, 24.0)) -> SweepResult:
    levels = tuple(run(rate, seed) for seed, rate in enumerate(rates))
    held = [level.load.rate for level in levels if all(kept.met for kept in level.objectives)]
    missed = [level.load.rate for level in levels if level.load.rate not in held]
    return SweepResult(
        levels=levels,
        objectives=OBJECTIVES,
        best_rate=max(held, default=None),
        first_missed_rate=min(missed, default=None),
    )
