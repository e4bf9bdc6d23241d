"""What a decode step costs through the whole path beside its pure compute: `python tests/bench/bench_path.py`.

Pure compute is the stages' steps run back to back in this process, nothing between them: the floor of the time between
two tokens of one stream, and with S stages of even cost that floor divided by S is the floor of a full pipeline's
period. The whole path is `tramontane serve` and gRPC streams: gateway, router, links and Ray's processes beside it. A
small model shows the path's own cost, since its steps are short; figures count only as ratios within one run.

`--groups` tries decode in S, S + 1 and S + 2 groups for S stages: more groups leave a stage less time without work, and
each of them reads all weights.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from driving import Drive, greedy_rows, load_stages, make_layout
from service import Service

from tramontane.client import AsyncClient
from tramontane.stages.config import ModelConfig
from tramontane.stages.split import split_layers

EMBEDDED = Path(__file__).parent.parent.parent / "deploy" / "embedded"
PROMPT = [1, *range(300, 363)]


def compute_ms(model_dir: Path, dtype: str, stages: int, users: int, tokens: int) -> float:
    """Median time of a decode step of so many sequences, over all stages, in this process on one thread."""
    torch.set_num_threads(1)
    config = ModelConfig.load(model_dir)
    split = [len(span) for span in split_layers(config, stages)]
    drive = Drive(
        load_stages(model_dir, config, split, dtype=dtype), make_layout(config, chunk=64, block=32, sequences=users)
    )
    sequences = [drive.sequence(PROMPT) for _ in range(users)]
    for sequence in sequences:
        result = drive.step(drive.microbatch((sequence, len(PROMPT)), sampled=greedy_rows([len(PROMPT) - 1])))
        sequence.tokens += result.token.tolist()
    times = []
    for _ in range(tokens):
        microbatch = drive.microbatch(
            *((sequence, 1) for sequence in sequences), sampled=greedy_rows(list(range(users)))
        )
        begin = time.perf_counter()
        result = drive.step(microbatch)
        times.append((time.perf_counter() - begin) * 1e3)
        for sequence, token in zip(sequences, result.token.tolist(), strict=True):
            sequence.tokens.append(token)
    return statistics.median(times)


async def path_ms(target: str, users: int, tokens: int) -> tuple[float, dict[str, float]]:
    """Median time between the tokens of a stream while so many run, and each stage's busy share meanwhile."""
    gaps: list[float] = []

    async def read(client: AsyncClient) -> None:
        async with client.stream(PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True) as stream:
            times = [(time.perf_counter(), len(delta.token_ids)) async for delta in stream]
        for (before, _), (after, count) in itertools.pairwise(times):
            gaps.extend([(after - before) * 1e3 / max(count, 1)] * count)

    async with AsyncClient(target) as client:
        before, begin = await client.stats(), time.perf_counter()
        await asyncio.gather(*(read(client) for _ in range(users)))
        wall_s, after = time.perf_counter() - begin, await client.stats()
    busy = {
        now.name: (now.busy_ns - then.busy_ns) / 1e9 / wall_s
        for now, then in zip(after.stages, before.stages, strict=True)
    }
    return statistics.median(gaps), busy


def main() -> None:
    """Interleave compute and path for each shape, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=16, help="of the crowd, beside one alone")
    parser.add_argument("--groups", action="store_true", help="decode groups, in a crowd only")
    options = parser.parse_args()
    rows = []
    print(f"{'stages':>6} {'groups':>6} {'users':>6} {'compute ms':>11} {'path ms':>8} {'ratio':>6}  busy")
    crowds = (options.users,) if options.groups else (1, options.users)
    for stages, more in itertools.product((1, 2), (0, 1, 2) if options.groups else (0,)):
        shape = ["--stages", str(stages), "--decode-groups", str(stages + more), "--threads", "1"]
        service = Service(str(options.model), *shape, "--dtype", options.dtype)
        try:
            target = service.target
            for users in crowds:
                compute, path = [], []
                for _ in range(options.rounds):
                    compute.append(compute_ms(options.model, options.dtype, stages, users, options.tokens))
                    gap, busy = asyncio.run(path_ms(target, users, options.tokens))
                    path.append(gap)
                row = {
                    "stages": stages,
                    "groups": stages + more,
                    "users": users,
                    "compute_ms": statistics.median(compute),
                    "path_ms": statistics.median(path),
                    "busy": busy,
                }
                rows.append(row)
                shares = ", ".join(f"{name} {share:.0%}" for name, share in busy.items())
                ratio = row["path_ms"] / row["compute_ms"]
                print(
                    f"{stages:6d} {stages + more:6d} {users:6d} {row['compute_ms']:11.2f} {row['path_ms']:8.2f} "
                    f"{ratio:6.2f}  {shares}",
                    flush=True,
                )
        finally:
            service.end()
    about = {"machine": platform.machine(), "cpus": os.cpu_count(), "date": datetime.date.today().isoformat()}
    print(json.dumps({"bench": "path", **about, "rows": rows}))


if __name__ == "__main__":
    main()
