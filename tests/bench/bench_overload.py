"""What a crowd gets: `python tests/bench/bench_overload.py`.

An open loop of Poisson arrivals with a deadline of 10 s, at twice and five times the rate at which the service answers
the most in time. Users do not wait for each other, so whatever the service cannot do piles up or is refused; refusing
takes the gateway and the generator time, too, on a machine that all share. Five figures say how it went:

    goodput     answers that came whole and in time, a second, beside those at the peak
    TTFT, ITL   of these answers: who is let in must be served as well as at the peak, after a bounded wait
    refusals    from a call's arrival at the gateway to its status, and as the client sees it
    CPU         of generator and gateway, as a part of the machine. Where it is above a tenth, the peak is measured
                again beside as many calls that are refused for another reason (wrong options), so that what is
                compared is admission and not the cost of calls

The peak is the best goodput of a sweep over rates in the same run. Figures count as ratios within one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from service import Service

from tramontane.client import Client, GatewayStats

TRAMONTANE = Path(sys.executable).with_name("tramontane")
DEADLINE = "10s"
WORKLOAD = ["--prompt-tokens", "uniform:32-256", "--output-tokens", "64"]
SWEEP = (0.6, 0.8, 0.9, 1.0, 1.1, 1.25)
"""Rates tried for the peak, in answers a second of a closed loop."""
USERS = 64
"""Of the closed loop that finds out where to look."""
MUCH_CPU = 0.1


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one load gave, of the requests that arrived after its warm-up."""

    load: str
    rate: float
    goodput: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p95_ms: float
    refused: float
    """A second."""
    late: float
    """Failed otherwise, a second."""
    gateway_p99_ms: float
    """Of refusals: the upper bound of a bucket."""
    client_p99_ms: float
    cpu: float
    """Of generator and gateway, of the whole machine."""

    def row(self, peak: Level | None) -> str:
        """For the table; the last column is goodput beside the peak's."""
        share = f"{self.goodput / peak.goodput:8.0%}" if peak else ""
        return (
            f"{self.load:24} {self.rate:7.1f} {self.goodput:8.1f} {self.ttft_p50_ms:8.0f} {self.ttft_p95_ms:8.0f} "
            f"{self.itl_p95_ms:7.1f} {self.refused:8.1f} {self.late:6.2f} {self.gateway_p99_ms:8.0f} "
            f"{self.client_p99_ms:8.0f} {self.cpu:5.0%} {share}"
        )


HEAD = (
    f"{'load':24} {'rate/s':>7} {'good/s':>8} {'TTFT p50':>8} {'p95 ms':>8} {'ITL p95':>7} {'refused':>8} {'late':>6} "
    f"{'gw p99':>8} {'cl. p99':>8} {'CPU':>5} of the peak"
)


def measure(target: str, load: str, rate: float, seconds: int, *options: str) -> Level:
    """One open loop, and what the gateway counted meanwhile."""
    with tempfile.TemporaryDirectory() as folder, Client(target) as client:
        before = client.stats().gateways
        arrivals = ["--rate", f"{rate:.3f}", "--duration", f"{seconds}s", "--timeout", DEADLINE]
        result = bench(target, Path(folder), *arrivals, *options)
        after = client.stats().gateways
        warm_up_s, end_s = result["result"]["window_s"]
        lines = (json.loads(line) for line in (Path(folder) / "requests.jsonl").read_text().splitlines())
        window = [each for each in lines if warm_up_s <= each["at_s"] < end_s]
    good = [each for each in window if each["status"] == "OK"]
    refused = [each for each in window if each["status"] == "RESOURCE_EXHAUSTED"]
    asked = [each for each in window if each["status"] != "INVALID_ARGUMENT"]
    span_s = end_s - warm_up_s
    server = {process["role"]: process["cores"] for process in result["result"]["server"]["processes"]}
    return Level(
        load=load,
        rate=rate,
        goodput=len(good) / span_s,
        ttft_p50_ms=quantile((each["ttft_ms"] for each in good), 0.5),
        ttft_p95_ms=quantile((each["ttft_ms"] for each in good), 0.95),
        itl_p95_ms=quantile((gap for each in good for gap in each["itls_ms"]), 0.95),
        refused=len(refused) / span_s,
        late=(len(asked) - len(good) - len(refused)) / span_s,
        gateway_p99_ms=refusal_quantile_s(before, after, 0.99) * 1e3,
        client_p99_ms=quantile(((each["ended_s"] - each["sent_s"]) * 1e3 for each in refused), 0.99),
        cpu=(result["result"]["generator_cores"] + server["gateway"]) / (os.cpu_count() or 1),
    )


def bench(target: str, folder: Path, *options: str) -> dict:
    """`tramontane bench run`; its result.json. (Status 4: figures that cannot be trusted, as on a busy machine.)"""
    command = [TRAMONTANE, "bench", "run", "--target", target, "--no-ceiling", "--alone", "0", "--quiet"]
    done = subprocess.run(
        [*command, *WORKLOAD, *options, "--out", folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode in (0, 3, 4), f"{done.args}: {done.returncode}\n{done.stderr}"
    return json.loads((folder / "result.json").read_text())


def quantile(values: Iterable[float], q: float) -> float:
    """A value that occurred; NaN where there is none.

    >>> quantile([5.0, 1.0, 4.0, 2.0, 3.0], 0.5)
    3.0
    """
    ordered = sorted(values)
    return ordered[math.ceil(q * len(ordered)) - 1] if ordered else math.nan


def refusal_quantile_s(before: Iterable[GatewayStats], after: Iterable[GatewayStats], q: float) -> float:
    """The upper bound of the bucket in which this quantile of the gateway's refusals lies."""
    (old,), (new,) = before, after
    counts = [now - then for now, then in zip(new.refusal_counts, old.refusal_counts, strict=True)]
    if not sum(counts):
        return math.nan
    return quantile((b for b, n in zip(new.refusal_bounds_s, counts, strict=True) for _ in range(n)), q)


def health(target: str) -> str:
    """Whether it serves at once after the crowd, and how soon one request has its first token."""
    with Client(target) as client:
        status, begin = client.health().name, time.perf_counter()
        with client.stream([1, 300, 301], max_tokens=4, temperature=0) as stream:
            next(stream)
            return f"{status}, a request has its first token after {(time.perf_counter() - begin) * 1e3:.0f} ms"


def overload(stages: int, seconds: int, sweep_s: int, times: list[float], options: list[str]) -> dict:
    """Sweep, then overload, on a service of its own."""
    service = Service("--stages", str(stages), *options)
    levels: list[Level] = []

    def run(load: str, rate: float, duration_s: int, peak: Level | None, *more: str) -> Level:
        levels.append(measure(service.target, load, rate, duration_s, *more))
        print(levels[-1].row(peak), flush=True)
        return levels[-1]

    try:
        with tempfile.TemporaryDirectory() as folder:
            users = ["--users", str(USERS), "--duration", f"{sweep_s}s"]
            closed = bench(service.target, Path(folder), *users)["result"]["throughput"]["requests_per_s"]
        print(f"\n{stages} stage{'s' * (stages > 1)}; a closed loop of {USERS} gets {closed:.1f}/s\n{HEAD}")
        peak = max(
            (run(f"sweep {share:g}", share * closed, sweep_s, None) for share in SWEEP), key=lambda each: each.goodput
        )
        easy = run("0.8 x peak", 0.8 * peak.goodput, seconds, peak)
        rows = []
        for factor in times:
            rate = factor * peak.goodput
            crowd = run(f"{factor:g} x peak", rate, seconds, peak)
            after = health(service.target)
            print(f"{'':24} {after}")
            fair = peak
            if crowd.cpu > MUCH_CPU:
                bad = ["--bad", f"{1 - 1 / factor:.4f}"]
                fair = run(f"peak beside {1 - 1 / factor:.0%} wrong", rate, seconds, peak, *bad)
            rows.append(
                {
                    "times": factor,
                    "goodput_of_peak": crowd.goodput / fair.goodput,
                    "ttft_p95_less_easy_ms": crowd.ttft_p95_ms - easy.ttft_p95_ms,
                    "itl_p95_of_peak": crowd.itl_p95_ms / fair.itl_p95_ms,
                    "gateway_refusal_p99_ms": crowd.gateway_p99_ms,
                    "after": after,
                }
            )
            print(
                f"{'':24} goodput {rows[-1]['goodput_of_peak']:.0%} of the peak, ITL p95 "
                f"{rows[-1]['itl_p95_of_peak']:.2f} times, TTFT p95 {rows[-1]['ttft_p95_less_easy_ms']:.0f} ms above "
                "that at 0.8",
                flush=True,
            )
        return {"stages": stages, "peak": asdict(peak), "rows": rows, "levels": [asdict(level) for level in levels]}
    finally:
        service.end()


def main() -> None:
    """Print the table for each number of stages, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--seconds", type=int, default=60, help="of each overload")
    parser.add_argument("--sweep-seconds", type=int, default=20, help="of each rate of the sweep")
    parser.add_argument("--times", default="2,5", help="of the peak")
    parser.add_argument("serve", nargs="*", help="options and model for `tramontane serve`, after --")
    options = parser.parse_args()
    runs = [
        overload(
            int(count), options.seconds, options.sweep_seconds, [*map(float, options.times.split(","))], options.serve
        )
        for count in options.stages.split(",")
    ]
    about = {"machine": platform.machine(), "cpus": os.cpu_count(), "date": datetime.date.today().isoformat()}
    print(json.dumps({"bench": "overload", **about, "runs": runs}))


if __name__ == "__main__":
    main()
