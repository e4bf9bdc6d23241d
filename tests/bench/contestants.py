"""Who is measured, and how each is asked: a process of its own that lives for one turn.

A turn starts the contestant, warms it up, runs the workloads one after another and ends it, so that nobody's idle
threads, heartbeats or memory lie beside another's measurement. A program (ours in process, transformers, peers) reads
one JSON job from its standard input and prints one line of JSON last:

    {"model": FOLDER, "gguf": FILE, "dtype": "bfloat16", "quantize": null, "device": "cpu", "threads": 2,
     "context": 8192, "warm_up": WORKLOAD,
     "workloads": [{"name": "A", "prompts": [[7, 8, 9]], "new_tokens": 64, "counted": "whole"}]}

    {"about": "who and which version", "runs": {"A": {"wall_s": 1.5, "first_s": 0.5, "tokens": [[3, 4]]}}}

`wall_s` is all of the workload, `first_s` ends with the last request's first token; loading counts for neither. The
service is asked through its client instead (`served.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.workloads import Workload

HERE = Path(__file__).parent
TURN_TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True)
class Job:
    """The same for every contestant."""

    model: Path
    dtype: str
    quantize: str | None
    device: str
    threads: int
    context: int
    warm_up: Workload
    workloads: tuple[Workload, ...]
    gguf: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """As a program reads it."""
        return vars(self) | {
            "model": str(self.model),
            "gguf": str(self.gguf) if self.gguf else None,
            "warm_up": self.warm_up.as_json(),
            "workloads": [workload.as_json() for workload in self.workloads],
        }


@dataclass
class Turn:
    """What a contestant did."""

    about: str
    runs: dict[str, dict[str, Any]]
    """`wall_s`, `first_s` and `tokens` of each workload; the service adds `busy` and `cores`."""
    memory: dict[str, float] = field(default_factory=dict)
    """Of a service: megabytes of its stages, see `served.py`."""


class Failed(Exception):  # noqa: N818  (says what a contestant has done)
    """A contestant gave no result; the message's last lines are its own."""


@dataclass(frozen=True)
class Contestant:
    """A name for tables and how it takes its turn."""

    name: str
    title: str
    take_turn: Callable[[Job], Turn]


def run_program(python: str | Path, script: Path, job: Job) -> Turn:
    """One turn of a program.

    Raises:
        Failed: it did not start, took too long, ended with an error or said nothing.
    """
    words, text = [str(python), str(script)], json.dumps(job.as_json())
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, timeout=TURN_TIMEOUT_S)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Failed(str(error)) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Failed("\n".join(done.stderr.strip().splitlines()[-5:]) or f"exit status {done.returncode}")
    return Turn(**json.loads(lines[-1]))


def run_served(stages: int, job: Job) -> Turn:
    """One turn of a service of so many stages, which share the threads."""
    from bench.served import take_turn  # Ray and gRPC are loaded where they are needed

    return take_turn(job, stages)


def known_contestants(peers: Mapping[str, str]) -> list[Contestant]:
    """All that can be measured here, ours first; `peers` has the Python of each that is installed elsewhere."""
    contestants = [
        Contestant("ours", "ours, in process, 1 stage", partial(run_program, sys.executable, HERE / "inprocess.py")),
        Contestant("grpc1", "ours, gRPC, 1 stage", partial(run_served, 1)),
        Contestant("grpc2", "ours, gRPC, 2 stages", partial(run_served, 2)),
        Contestant("hf", "transformers", partial(run_program, sys.executable, HERE / "peers" / "run_transformers.py")),
    ]
    for name, title in PEERS.items():
        if name in peers:
            script = HERE / "peers" / f"run_{name}.py"
            contestants.append(Contestant(name, title, partial(run_program, peers[name], script)))
    return contestants


PEERS = {"llama": "llama.cpp", "vllm": "vLLM"}
"""Those that live in environments of their own; `peers/run_NAME.py` says how to install each."""

NAMES = ("ours", "grpc1", "grpc2", "hf", *PEERS)
