"""How fast we serve a realistic model, beside its limits and beside others: `make bench`, or this file with options.

Random checkpoints are made once (`synthetic.py`). Then, in interleaved rounds, every contestant has a turn on four
workloads (`workloads.py`): ours in process with one stage, ours through gRPC with one stage of all threads and with two
stages of half of them, transformers, and the peers whose Python is named. What limits what:

    A, D   decode of many rows reads nearly all experts each step; prefill beside it is arithmetic
    B      one row reads the attention and the two experts of each layer that it chose, and the head: memory bandwidth
    C      a long prompt is arithmetic
    gRPC   one stage pays the path per step; two stages also wait for each other where their steps are uneven

Every figure stands beside the least time that its reads and operations need on this machine in this round
(`limits.py`, `ceilings.py`). Other parts: what two stages lose to all that is between them (`pipeline_tax.py`), each
kernel beside the ceilings (`kernel_bench.py`), and with `--growth` cost over length under a window (`growth.py`).

    python tests/bench/bench_model.py --quick                     # the tiny model, under a minute
    python tests/bench/bench_model.py --only ours,hf --workloads B,C --rounds 5
    python tests/bench/bench_model.py --peer llama=PYTHON --llama-source LLAMA_CPP --peer vllm=PYTHON
    python tests/bench/bench_model.py --growth
    python tests/bench/bench_model.py --device cuda               # ours in process and transformers on a GPU

How to install a peer stands at the head of its driver in `peers/`. Tables for people, then one JSON line; on the
error stream, whose turn it is.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bench import kernel_bench, report, synthetic, workloads
from bench.ceilings import measure_ceilings, others_busy_cpus
from bench.contestants import NAMES, PEERS, Contestant, Failed, Job, known_contestants
from bench.growth import measure_growth
from bench.inprocess import serving_layout
from bench.limits import WEIGHT_BYTES, kv_place_bytes, parameters
from bench.llama_file import gguf_path, make_gguf
from bench.pipeline_tax import Recording
from bench.results import Results, Round
from bench.routing import count_touched
from tramontane.client import TramontaneError
from tramontane.stages.config import ModelConfig

EMBEDDED = Path(__file__).parent.parent.parent / "deploy" / "embedded"
PIPELINE_WORKLOAD = "A"
ON_CUDA = ("ours", "hf")
"""The contestants that `--device cuda` can measure."""


def main() -> None:
    # As Ctrl-C does: whoever has a turn, a service for example, is ended with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    options = parse(sys.argv[1:])
    about = report.machine([Path(sys.argv[0]).name, *sys.argv[1:]]) | {
        "model": options.model,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "device": options.device,
        "threads": options.threads,
    }
    print("{machine}, {cpus} CPUs, {date}, load {load_before}: {command}".format(**about), flush=True)
    if options.growth:
        growth(options, about)
        return
    model = synthetic.make_model(options.model, options.models)
    results, titles = None, {}
    if not options.kernels:
        results, titles = measure_workloads(options, model)
    more = {} if options.only else kernels(options, model)
    if results is not None:
        print_workloads(options, results, titles)
        more |= pipeline(results)
    print(report.as_json(about, results, **more))


def parse(words: list[str]) -> argparse.Namespace:
    """The options, those that `--quick` changes resolved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=synthetic.MODELS, help="default: mid, with --quick tiny")
    parser.add_argument("--models", type=Path, default=synthetic.default_folder(), help="where they are kept")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quantize", choices=["int8"], help="passed on to ours; llama.cpp takes Q8_0")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: no kernels, gRPC or peers")
    parser.add_argument("--threads", type=int, default=2, help="of every contestant, all stages together")
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--workloads", default="A,B,C,D")
    parser.add_argument("--only", default="", help="contestants: ours,grpc1,grpc2,hf and the peers; no kernels then")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=" or ".join(PEERS))
    parser.add_argument("--llama-source", type=Path, help="llama.cpp's source tree, to make the GGUF once")
    parser.add_argument("--quick", action="store_true", help="tiny model and workloads")
    parser.add_argument("--kernels", action="store_true", help="the kernels only")
    parser.add_argument("--growth", action="store_true", help="cost over length under a window only")
    options = parser.parse_args(words)
    options.size = "tiny" if options.quick else "mid"
    options.model = options.model or options.size
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.number = options.quantize or options.dtype
    options.peers = {name: python for name, _, python in (peer.partition("=") for peer in options.peer)}
    options.workloads = options.workloads.split(",")
    options.only = [name for name in options.only.split(",") if name]
    for option, given, known in (
        ("peer", options.peers, PEERS),
        ("workloads", options.workloads, "ABCD"),
        ("only", options.only, NAMES),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"--{option} {', '.join(unknown)}; known: {', '.join(known)}")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda, and this process sees no CUDA device")
        if options.kernels or options.growth or options.quantize:
            parser.error("--device cuda takes no --kernels, --growth or --quantize")
        options.only = options.only or list(ON_CUDA)
        if unable := [name for name in options.only if name not in ON_CUDA]:
            parser.error(f"--device cuda, --only {', '.join(unable)}; on CUDA there are {', '.join(ON_CUDA)}")
    return options


def measure_workloads(options: argparse.Namespace, model: Path) -> tuple[Results, dict[str, str]]:
    """All rounds, and the title of each contestant."""
    config = ModelConfig.load(model)
    sizes = workloads.QUICK if options.quick else workloads.FULL
    chosen = workloads.make_workloads(config.vocab, sizes)
    job = Job(
        model=model,
        gguf=_gguf(options, model),
        dtype=options.dtype,
        quantize=options.quantize,
        device=options.device,
        threads=options.threads,
        context=config.context,
        warm_up=workloads.make_warm_up(config.vocab),
        workloads=tuple(chosen[name] for name in options.workloads),
    )
    contestants = choose_contestants(options)
    decoding = tuple(each for each in job.workloads if each.new_tokens > 1)
    experts = count_touched(model, options.dtype, options.threads, decoding) if config.experts else {}
    titles = {each.name: each.title for each in contestants}
    rounds: list[Round] = []
    with ExitStack() as stack:
        recording = None
        if "grpc2" in titles and PIPELINE_WORKLOAD in options.workloads:
            loaded = chosen[PIPELINE_WORKLOAD]
            recording = stack.enter_context(Recording(model, options.dtype, loaded, options.quantize))
        for number in range(options.rounds):
            rounds.append(measure_round(options, contestants, job, recording))
            show(report.round_lines(number + 1, rounds[-1]))
    return Results(config, options.number, job.workloads, rounds, experts), {
        each.name: each.title for each in contestants
    }


def choose_contestants(options: argparse.Namespace) -> list[Contestant]:
    """Those that are here and wanted; says of each peer that is not."""
    wanted = options.only
    for name in PEERS:
        if name not in options.peers and (not wanted or name in wanted):
            print(f"{PEERS[name]} is skipped: no --peer {name}=PYTHON (tests/bench/peers/run_{name}.py)")
    return [each for each in known_contestants(options.peers) if not wanted or each.name in wanted]


def measure_round(
    options: argparse.Namespace, contestants: list[Contestant], job: Job, recording: Recording | None
) -> Round:
    """One turn of each; one that fails is told, and does not come again."""

    def ceilings() -> Any:
        return measure_ceilings(options.threads, int8=options.number == "int8", device=options.device)

    others, before, turns, replay = others_busy_cpus(), ceilings(), {}, None
    for contestant in list(contestants):
        print(f"{time.strftime('%T')} {contestant.title}", file=sys.stderr, flush=True)
        try:
            turns[contestant.name] = contestant.take_turn(job)
        except (Failed, AssertionError, TramontaneError) as error:
            print(f"{contestant.title} failed and is skipped: {error}", flush=True)
            contestants.remove(contestant)
            continue
        if contestant.name == "grpc2" and recording is not None:
            replay = recording.replay()
    after = ceilings()
    return Round(before, after, turns, replay, (others + others_busy_cpus()) / 2)


def _gguf(options: argparse.Namespace, model: Path) -> Path | None:
    if "llama" not in options.peers:
        return None
    path = gguf_path(model, options.number)
    if not path.exists():
        if options.llama_source is None:
            raise SystemExit(f"{path} is not there; --llama-source names llama.cpp's source tree, to make it")
        make_gguf(model, options.number, options.llama_source)
    return path


def kernels(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Measure and print the kernels; what goes into the JSON line."""
    dense = synthetic.make_model(f"{options.size}-dense", options.models)
    shapes = kernel_bench.QUICK if options.quick else kernel_bench.FULL
    before = measure_ceilings(options.threads, int8=options.number == "int8")
    name, parts = kernel_bench.measure_kernels(model, dense, options.dtype, options.threads, shapes, options.quantize)
    ceilings = before.mean(measure_ceilings(options.threads, int8=options.number == "int8"))
    print(f"kernels: {name}; {report.ceilings_line(ceilings)}")
    show(report.kernel_table(parts, ceilings, options.number))
    steps = kernel_bench.decode_steps(parts, ModelConfig.load(model).layers)
    show(report.step_lines(steps, ceilings, options.number))
    listed = [vars(part) | {"cost": vars(part.cost)} for part in parts]
    return {"numerics": name, "kernels": listed, "kernel_ceilings": vars(ceilings)}


def print_workloads(options: argparse.Namespace, results: Results, titles: dict[str, str]) -> None:
    """The tables of the rounds."""
    abouts = {name: turn.about for each in results.rounds for name, turn in each.turns.items()}
    show(f"{titles[name]}: {about}" for name, about in abouts.items())
    show(report.workload_table(results, titles))
    show(report.cores_lines(results, titles, PIPELINE_WORKLOAD))
    layout = serving_layout(results.config, (range(results.config.layers),), options.dtype)
    places = sum(layout.pool_blocks) * layout.block
    pools = places * kv_place_bytes(results.config, options.dtype) * results.config.layers
    held = parameters(results.config) * WEIGHT_BYTES[options.number]
    show(report.memory_lines(results, titles, pools, held))


def pipeline(results: Results) -> dict[str, Any]:
    """What two stages lose, printed, if that was measured; what goes into the JSON line."""
    found = results.pipeline(PIPELINE_WORKLOAD, "grpc2")
    if found is None:
        return {}
    show(report.pipeline_lines(PIPELINE_WORKLOAD, found))
    return {"pipeline": asdict(found) | {"of_bound": found.of_bound}}


def show(lines: Iterable[str]) -> None:
    """A table, or nothing."""
    for line in lines:
        print(line, flush=True)


def growth(options: argparse.Namespace, about: dict[str, Any]) -> None:
    """Both windowed models."""
    ceilings = measure_ceilings(options.threads)
    print(report.ceilings_line(ceilings), flush=True)
    listed = {}
    for name, folder in (
        (f"{options.size}-w", synthetic.make_model(f"{options.size}-w", options.models)),
        ("embedded", EMBEDDED),
    ):
        points = measure_growth(folder, options.dtype, options.threads, ceilings)
        show(report.growth_table(name, points))
        listed[name] = [vars(point) for point in points]
    print(report.as_json(about, None, growth=listed, ceilings=vars(ceilings)))


if __name__ == "__main__":
    main()
