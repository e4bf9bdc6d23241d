"""What the bench prints: tables for people, one JSON line for programs. Text in, text out."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.growth import Point
from bench.kernel_bench import Part, Step
from bench.limits import Ceilings
from bench.results import Pipeline, Results, Round
from bench.workloads import Workload

CONTESTANT_WIDTH = 26


def machine(command: Sequence[str]) -> dict[str, Any]:
    """Where and when this was."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "machine": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": shlex.join(command),
    }


def ceilings_line(ceilings: Ceilings) -> str:
    """One line.

    >>> ceilings_line(Ceilings(read_gb_s=21.26, float32_gflop_s=152.0, bfloat16_gflop_s=24.5))
    'reads 21.3 GB/s; products float32 152, bfloat16 24 GFLOP/s'
    """
    line = f"reads {ceilings.read_gb_s:.1f} GB/s; products float32 {ceilings.float32_gflop_s:.0f}, "
    line += f"bfloat16 {ceilings.bfloat16_gflop_s:.0f} GFLOP/s"
    return line + (f", int8 {ceilings.int8_gflop_s:.0f} GOP/s" if ceilings.int8_gflop_s else "")


def round_lines(number: int, each: Round) -> Iterator[str]:
    """What the machine could do at both ends of a round, and what others took of it."""
    yield f"round {number}, before: {ceilings_line(each.before)}"
    yield f"{'':8} after: {ceilings_line(each.after)}; others keep {each.others_busy_cpus:.1f} CPUs busy"


def workload_table(results: Results, titles: Mapping[str, str]) -> Iterator[str]:
    """Each workload's limit, and what every contestant reached of it."""
    yield f"tokens/s, median (min..max) of {len(results.rounds)} rounds"
    columns = f"{'of limit':>9} {'of ours':>8} {'same 1st':>9}"
    yield f"{'':3}{'':{CONTESTANT_WIDTH}} {'tokens/s':>9} {'min..max':>17} {columns}"
    for workload in results.workloads:
        yield f"{workload.name:3}{describe(workload)}"
        limit = f"{results.median_limit(workload):9.1f}  {_limit_words(results, workload)}"
        yield f"{'':3}{'limit':{CONTESTANT_WIDTH}} {limit}"
        for name, title in titles.items():
            figure = results.figure(workload, name)
            if figure is None:
                continue
            spread = f"{min(figure.tokens_per_s):.1f}..{max(figure.tokens_per_s):.1f}"
            ratio = "" if figure.of_ours is None else f"{figure.of_ours:.2f}"
            same = "" if figure.same_first is None else f"{figure.same_first:.0%}"
            line = f"{'':3}{title:{CONTESTANT_WIDTH}} {figure.median:9.1f} {spread:>17} {figure.of_limit:9.0%}"
            yield f"{line} {ratio:>8} {same:>9}"


def describe(workload: Workload) -> str:
    """In words.

    >>> describe(Workload("B", ((5, 6, 7),), 4, "decode"))
    '1 request of 3 + 4 tokens: tokens after the first, over the time after it'
    """
    low, high, count = min(workload.lengths), max(workload.lengths), len(workload.prompts)
    length = str(low) if low == high else f"{low}..{high}"
    counted = {
        "whole": "generated tokens over all the time",
        "decode": "tokens after the first, over the time after it",
        "prefill": "prompt tokens over the time to the first token",
    }[workload.counted]
    return f"{count} request{'s' if count > 1 else ''} of {length} + {workload.new_tokens} tokens: {counted}"


def _limit_words(results: Results, workload: Workload) -> str:
    least = results.median_floor(workload)
    words = []
    if workload.counted != "decode":
        words.append(f"prefill {_seconds(least.prefill_s)} (arithmetic)")
    if workload.counted != "prefill":
        words.append(f"decode {_seconds(least.decode_s)} ({least.decode_bound})")
        if workload.name in results.experts:
            words[-1] += f", {results.experts[workload.name]:.1f} experts touched"
    return " + ".join(words)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds > 0.1 else f"{seconds * 1e3:.1f} ms"


def pipeline_lines(workload: str, found: Pipeline) -> Iterator[str]:
    """What two stages lose between them."""
    yield f"two stages x 1 thread, {workload}: gRPC, router and links against the same steps with nothing between them"
    alone = ", ".join(f"{seconds:.2f} s" for seconds in found.stage_s)
    path = f"whole path {found.wall_s:.2f} s: {found.of_floor:.0%} of their rate"
    yield f"   stages alone {alone} (layers {_split(found.split)}); {path}"
    most = f"the best split in whole layers ({_split(found.bound.split)}) allows {_shares(found.bound.busy)}"
    yield f"   busy {_shares(found.busy)}; {most}: {found.of_bound:.0%} of that"


def _shares(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


def cores_lines(results: Results, titles: Mapping[str, str], workload: str) -> Iterator[str]:
    """Who used the cores while the services worked on it."""
    for name, title in titles.items():
        runs = [each.turns[name].runs.get(workload, {}) for each in results.rounds if name in each.turns]
        cores = [run["cores"] for run in runs if "cores" in run]
        if cores:
            shares = {who: statistics.median(each[who] for each in cores) for who in cores[0]}
            yield f"cores of {title}, {workload}: " + ", ".join(f"{who} {share:.2f}" for who, share in shares.items())


def memory_lines(results: Results, titles: Mapping[str, str], pool_bytes: int, weight_bytes: float) -> Iterator[str]:
    """What the services' stages hold, beside what they must."""
    for name, title in titles.items():
        memory = [each.turns[name].memory for each in results.rounds if name in each.turns and each.turns[name].memory]
        if memory:
            own = statistics.median(each["stages_mb"] - each["idle_mb"] for each in memory)
            stages = 2 if name == "grpc2" else 1
            weights, pools = weight_bytes / 2**20, stages * pool_bytes / 2**20
            yield (
                f"memory of {title}: {own:.0f} MiB beyond idle processes with torch; "
                f"weights {weights:.0f} + KV pools {pools:.0f} = {weights + pools:.0f} MiB"
            )


def kernel_table(parts: Sequence[Part], ceilings: Ceilings, number: str) -> Iterator[str]:
    """Each part beside both ceilings. Its limit is the longer of reading and arithmetic, both is their sum."""
    yield f"{'part':22} {'shape':>15} {'ms':>9} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>9} {'of both':>8}  bound"
    for part in parts:
        rates = f"{part.cost.bytes / part.seconds / 1e9:7.1f} {part.cost.operations / part.seconds / 1e9:8.1f}"
        share = part.cost.seconds(ceilings, number) / part.seconds
        both = part.cost.serial_s(ceilings, number) / part.seconds
        bound = part.cost.bound(ceilings, number)
        yield f"{part.name:22} {part.shape:>15} {part.seconds * 1e3:9.3f} {rates} {share:9.0%} {both:8.0%}  {bound}"


def step_lines(steps: Iterable[Step], ceilings: Ceilings, number: str) -> Iterator[str]:
    """Whole decode steps, beside the sums of what their parts need at least."""
    for step in steps:
        limit_s, serial_s = step.limit_s(ceilings, number), step.serial_s(ceilings, number)
        line = (
            f"decode step of {step.rows}: {step.seconds * 1e3:.2f} ms; part by part, {step.seconds / limit_s:.2f} times"
        )
        line += f" the longer of reading and arithmetic ({limit_s * 1e3:.2f})"
        yield f"{line} and {step.seconds / serial_s:.2f} times both"


def growth_table(name: str, points: Sequence[Point]) -> Iterator[str]:
    """One line a length."""
    yield f"{name}: one sequence, time of a decode step and memory of its keys and values"
    yield f"{'windows':>9} {'tokens':>7} {'ms':>8} {'limit ms':>9} {'KV MiB':>8} {'full attention MiB':>19}"
    for point in points:
        memory = f"{point.kv_bytes / 2**20:8.2f} {point.full_kv_bytes / 2**20:19.2f}"
        yield f"{point.windows:9d} {point.tokens:7d} {point.step_ms:8.2f} {point.limit_ms:9.2f} {memory}"


def as_json(about: Mapping[str, Any], results: Results | None, **more: Any) -> str:
    """Everything in one line; generated tokens are left out."""
    line: dict[str, Any] = {"bench": "model", **about}
    if results is not None:
        line["experts_touched"] = dict(results.experts)
        line["rounds"] = [_round(each) for each in results.rounds]
        line["figures"] = [
            asdict(figure) | {"median": figure.median, "limit": results.median_limit(workload)}
            for workload in results.workloads
            for name in dict.fromkeys(name for each in results.rounds for name in each.turns)
            if (figure := results.figure(workload, name)) is not None
        ]
    return json.dumps(line | more)


def _round(each: Round) -> dict[str, Any]:
    values = asdict(each)
    for turn in values["turns"].values():
        for run in turn["runs"].values():
            del run["tokens"]
    return values


def _split(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))
