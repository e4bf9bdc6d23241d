"""Measures the speed of each kernel variant on this CPU, as a row of `stages/cpu_speeds.json`.

    python tests/bench/kernel_table.py                  # prints the row
    python tests/bench/kernel_table.py --write          # puts it into the table, in place of an older one of this CPU

For float32, bfloat16 and int8 weights, and for each matrix: how many times as fast a variant is as the slowest. What is
run, and how the variants take turns, stands in `stages/kernels/native/speeds.py`, which also probes a CPU that has no
row; here it has more rounds. Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json

import torch

from tramontane.stages.cpu import this_cpu
from tramontane.stages.kernel_choice import TABLE, NodeKernels
from tramontane.stages.kernels.native.speeds import measure
from tramontane.stages.variants import numbers_of

NUMBERS = (("float32", None), ("bfloat16", None), ("bfloat16", "int8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the row into the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu, speeds = this_cpu(), {}
    for dtype, quantize in NUMBERS:
        names = NodeKernels("", cpu, "").variants(numbers_of(dtype, quantize))
        speeds[numbers_of(dtype, quantize)] = measure(dtype, quantize, names, options.rounds)
    row = {
        "cpu": cpu.model,
        "name": cpu.name,
        "measured": f"{datetime.date.today()}, {options.threads} threads, {options.rounds} rounds",
        "speeds": speeds,
    }
    print(json.dumps(row, indent=1))
    if options.write:
        others = [each for each in json.loads(TABLE.read_text()) if each["cpu"] != cpu.model]
        rows = sorted([*others, row], key=lambda each: each["cpu"])
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
