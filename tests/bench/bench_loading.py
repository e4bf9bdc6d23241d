"""What hashing every byte of the weights adds to loading them: `python tests/bench/bench_loading.py`.

Loading reads and packs a layer at a time on one thread and hashes beside it, so hashing costs time where no core is
free: with as many stages as cores, all loading at once, that is everywhere. With hashing off the same pieces are read
and nothing is hashed. All loads are on a warm cache, with the CPU's best kernels, and take turns, off and on; each
figure is the median, a ratio that of the pairs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
from synthetic import MODELS, default_folder, make_model

from tramontane.stages import weights
from tramontane.stages.config import ModelConfig
from tramontane.stages.split import split_layers
from tramontane.stages.stage import Stage

EMBEDDED = Path(__file__).parent.parent.parent / "deploy" / "embedded"


class Unhashed:
    """In place of `Hashing`: takes pieces and leaves them as they are."""

    def leaf(self, piece: memoryview) -> Future[bytes]:
        """At once, and always the same."""
        taken: Future[bytes] = Future()
        taken.set_result(b"")
        return taken


def load_one(
    folder: Path, stages: int, index: int, rounds: int, threads: int, start: Barrier, answers: Connection
) -> None:
    """A stage's process: load it once to warm up, then in pairs, beside all other stages; send each load's seconds."""
    torch.set_num_threads(threads)
    config = ModelConfig.load(folder)
    span = split_layers(config, stages)[index]
    seconds = []
    for number in range(1 + 2 * rounds):
        start.wait()
        # Both orders, so that neither always comes first.
        is_hashed = number % 4 in (2, 3)
        with patch.object(weights, "Hashing", weights.Hashing if is_hashed else Unhashed):
            begin = time.perf_counter()
            Stage.load(config, folder, span, dtype="bfloat16", device="cpu")
            seconds.append((is_hashed, time.perf_counter() - begin))
    answers.send(seconds[1:])


def measure(folder: Path, stages: int, rounds: int) -> dict[str, object]:
    """Seconds until the last stage has loaded, without and with hashing."""
    context = multiprocessing.get_context("spawn")
    start, pipes, processes = context.Barrier(stages), [], []
    for index in range(stages):
        mine, theirs = context.Pipe(duplex=False)
        threads = max(1, (os.cpu_count() or 1) // stages)
        processes.append(context.Process(target=load_one, args=(folder, stages, index, rounds, threads, start, theirs)))
        pipes.append(mine)
    for process in processes:
        process.start()
    loads = [
        (stage[0][0], max(seconds for _, seconds in stage))
        for stage in zip(*(pipe.recv() for pipe in pipes), strict=True)
    ]
    for process in processes:
        process.join()
    off = [seconds for is_hashed, seconds in loads if not is_hashed]
    on = [seconds for is_hashed, seconds in loads if is_hashed]
    added = statistics.median(hashed / plain - 1 for plain, hashed in zip(off, on, strict=True))
    return {
        "model": folder.name,
        "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 1),
        "stages": stages,
        "rounds": rounds,
        "off_s": round(statistics.median(off), 3),
        "on_s": round(statistics.median(on), 3),
        "added": round(added, 3),
    }


def main() -> None:
    """Measure, print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of loads (default: %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="mid", help="beside the embedded one (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where models are kept (%(default)s)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a stage's process; torch reads it in the children
    rows = [
        measure(folder, stages, options.rounds)
        for folder in (EMBEDDED, make_model(options.model, options.folder))
        for stages in (1, 2)
    ]
    print(f"{'model':12}{'MB':>8}{'stages':>8}{'off s':>9}{'on s':>9}{'added':>8}")
    for row in rows:
        print(
            f"{row['model']:12}{row['megabytes']:8}{row['stages']:8}{row['off_s']:9}{row['on_s']:9}{row['added']:8.1%}"
        )
    facts = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "date": time.strftime("%F")}
    print(json.dumps({"loading": rows, **facts}))


if __name__ == "__main__":
    main()
