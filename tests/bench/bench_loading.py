"""What hashing every byte of the weights adds to loading them: `python tests/bench/bench_loading.py`.

Loading reads and packs a layer at a time on one thread and hashes beside it, so hashing costs time where no core is
free: with as many stages as cores, all loading at once, that is everywhere. Each load is of processes of its own, one a
stage, as in a service, on a warm cache and with the CPU's best kernels; with hashing off the same bytes are read and
nothing is hashed. `load` is reading, packing and hashing in the slowest stage; `process` is all from the start of the
processes, so importing torch is in it. Loads take turns, off and on; figures are medians, ratios those of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from synthetic import MODELS, default_folder, make_model

from tramontane.stages import weights
from tramontane.stages.config import ModelConfig
from tramontane.stages.split import split_layers
from tramontane.stages.stage import Stage

EMBEDDED = Path(__file__).parent.parent.parent / "deploy" / "embedded"


class Unhashed:
    """In place of `Hashing`: takes tensors and leaves them as they are."""

    def digest(self, *_: object) -> Future[bytes]:
        """At once, and always the same."""
        taken: Future[bytes] = Future()
        taken.set_result(b"")
        return taken


def load_stage(folder: Path, stages: int, index: int, *, is_hashed: bool) -> float:
    """Seconds to load one stage in this process."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // stages))
    if not is_hashed:
        weights.Hashing = Unhashed
    config = ModelConfig.load(folder)
    span = split_layers(config, stages)[index]
    begin = time.perf_counter()
    Stage.load(config, folder, span, dtype="bfloat16", device="cpu")
    return time.perf_counter() - begin


def load_all(folder: Path, stages: int, how: str) -> tuple[float, float]:
    """Seconds of the slowest stage, and from the start of all processes to the end of the last."""
    command = [sys.executable, __file__, "--stage", str(folder), str(stages)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as in a stage's process
    begin = time.perf_counter()
    processes = [
        subprocess.Popen([*command, str(index), how], env=environment, stdout=subprocess.PIPE, text=True)
        for index in range(stages)
    ]
    seconds = [float(process.communicate()[0]) for process in processes]
    return max(seconds), time.perf_counter() - begin


def measure(folder: Path, stages: int, rounds: int) -> dict[str, object]:
    """One row of the table: both times, without and with hashing."""
    load_all(folder, stages, "on")  # warms the cache
    times: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    for number in range(rounds):
        for how in ("off", "on") if number % 2 else ("on", "off"):
            times[how].append(load_all(folder, stages, how))
    row: dict[str, object] = {
        "model": folder.name,
        "megabytes": round((folder / "model.safetensors").stat().st_size / 1e6, 1),
        "stages": stages,
        "rounds": rounds,
    }
    for column, name in enumerate(("load", "process")):
        off, on = ([each[column] for each in times[how]] for how in ("off", "on"))
        row[f"{name}_off_s"], row[f"{name}_on_s"] = round(statistics.median(off), 3), round(statistics.median(on), 3)
        row[f"{name}_added"] = round(statistics.median(b / a - 1 for a, b in zip(off, on, strict=True)), 3)
    return row


def main() -> None:
    """Measure, print a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of loads (default: %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="mid", help="beside the embedded one (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where models are kept (%(default)s)")
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        folder, stages, index, how = options.stage
        print(load_stage(Path(folder), int(stages), int(index), is_hashed=how == "on"))
        return
    rows = [
        measure(folder, stages, options.rounds)
        for folder in (EMBEDDED, make_model(options.model, options.folder))
        for stages in (1, 2)
    ]
    print(f"{'':28}{'load: off s':>12}{'on s':>8}{'added':>8}{'process: off s':>17}{'on s':>8}{'added':>8}")
    for row in rows:
        print(
            f"{row['model']:12}{row['megabytes']:6} MB{row['stages']:>4} st"
            f"{row['load_off_s']:>12}{row['load_on_s']:>8}{row['load_added']:>8.1%}"
            f"{row['process_off_s']:>17}{row['process_on_s']:>8}{row['process_added']:>8.1%}"
        )
    facts = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "date": time.strftime("%F")}
    print(json.dumps({"loading": rows, **facts}))


if __name__ == "__main__":
    main()
