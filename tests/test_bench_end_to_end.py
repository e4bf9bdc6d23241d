"""The harness against a real service over Ray: figures of both sides, and a fault that costs what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from service import Service

pytestmark = pytest.mark.ray

TRAMONTANE = Path(sys.executable).with_name("tramontane")


def bench(*arguments: object) -> dict:
    words = [str(word) for word in (TRAMONTANE, "bench", *arguments, "--no-ceiling", "--quiet", "--json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    # On a busy machine the figures may be invalid; what is counted is right all the same.
    assert done.returncode in (0, 4), done.stdout[-2000:] + done.stderr
    return json.loads(done.stdout)


def test_a_run_tells_both_sides(service: Service) -> None:
    load = ["--rate", 4, "--duration", "6s", "--warmup", "1s", "--prompt-tokens", "uniform:8-64", "--output-tokens", 12]
    report = bench(
        "run", "--target", service.target, *load, "--cancel", 0.15, "--bad", 0.15, "--churn", 0.15, "--alone", 6
    )
    result = report["result"]
    checks = result["checks"]
    assert report["failed"] == 0
    assert report["output_lens"] == [12] * report["completed"]
    # In float32 on the CPU a request's tokens do not depend on its company.
    assert checks["alone_checked"] >= 4
    found = [
        checks[name] for name in ("alone_wrong", "texts_wrong", "offsets_wrong", "bad_accepted", "alone_unanswered")
    ]
    assert found == [0] * 5, checks
    assert result["server"]["stage_busy"].keys() == {"0.0", "0.1"}
    assert result["server"]["microbatches"] > 0
    roles = {process["role"] for process in result["server"]["processes"]}
    assert roles == {"controller", "gateway", "router", "stage"}
    breakdown = result["breakdown"]
    whole = result["latencies"]["e2el"]["mean"]
    assert sum(breakdown.values()) == pytest.approx(whole)
    assert breakdown["prefill_ms"] > 0 < breakdown["decode_ms"]
    assert not any("still holds" in finding["text"] for finding in result["findings"])


def test_a_stopped_stage_is_a_stall_and_no_error(service: Service) -> None:
    load = ["--rate", 4, "--duration", "8s", "--warmup", "0s", "--prompt-tokens", 16, "--output-tokens", 16]
    report = bench(
        "run", "--target", service.target, *load, "--alone", 0, "--fault", "stop:stage=0.1,for=2s@3s", "--workers", 2
    )
    (fault,) = report["result"]["faults"]
    assert fault["error"] == ""
    assert fault["target"].startswith("stage 0.1")
    assert fault["errors"] == report["failed"] == 0
    assert fault["stall_s"] > 1.5
    assert any(stall["start_s"] < 4 and stall["end_s"] > 4.5 for stall in report["result"]["stalls"])
