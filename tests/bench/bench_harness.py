"""How exact is the load tester? It measures a server whose delays are written down, and the difference is shown.

The server sleeps 100 ms before a request's first token and 20 ms before each other one. What is measured beyond that is
the way there and back, the timers of both sides (1 ms each), and, above a few hundred messages a second, two Python
processes on the same cores:

    python tests/bench/bench_harness.py [--rates 5,20,60] [--seconds 10]

A table for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tramontane.protos import serving_pb2, serving_pb2_grpc

FIRST_S, GAP_S, TOKENS = 0.1, 0.02, 32
TRAMONTANE = Path(sys.executable).with_name("tramontane")
SCRIPTED_MS = {"ttft": FIRST_S * 1e3, "itl": GAP_S * 1e3, "e2el": (FIRST_S + GAP_S * (TOKENS - 1)) * 1e3}


class Scripted(serving_pb2_grpc.ServingServicer, health_pb2_grpc.HealthServicer):
    """Sleeps to absolute times, so that its own lateness does not add up."""

    async def ListModels(self, request, context):  # noqa: N802
        model = serving_pb2.ModelInfo(name="scripted", context_tokens=4096, vocabulary_tokens=1000, serving=True)
        return serving_pb2.ListModelsResponse(models=[model])

    async def Watch(self, request, context):  # noqa: N802
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        await asyncio.Event().wait()

    async def GenerateStream(self, request, context):  # noqa: N802
        loop = asyncio.get_running_loop()
        due_s = loop.time() + FIRST_S
        started = serving_pb2.Started(request_id=request.request_id, seed=request.sampling.seed, version="1")
        for offset in range(TOKENS):
            await asyncio.sleep(due_s - loop.time())
            due_s += GAP_S
            delta = serving_pb2.Delta(token_ids=[offset], offset=offset, log_probabilities=[0.0])
            yield serving_pb2.GenerateEvent(started=None if offset else started, delta=delta)
        usage = serving_pb2.Usage(prompt_tokens=1, completion_tokens=TOKENS)
        yield serving_pb2.GenerateEvent(finished=serving_pb2.Finished(reason=serving_pb2.LENGTH, usage=usage))


async def serve() -> None:
    server = grpc.aio.server()
    serving_pb2_grpc.add_ServingServicer_to_server(Scripted(), server)
    health_pb2_grpc.add_HealthServicer_to_server(Scripted(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def measure(target: str, rate: float, seconds: float) -> dict[str, float]:
    """Median of each measure less what the script says, in milliseconds; and the generator's lag."""
    words = ["run", "--target", target, "--rate", rate, "--duration", f"{seconds}s", "--warmup", "1s"]
    words += ["--prompt-tokens", "4", "--output-tokens", TOKENS, "--alone", "0", "--no-ceiling", "--quiet", "--json"]
    done = subprocess.run([TRAMONTANE, "bench", *map(str, words)], capture_output=True, check=False)
    report = json.loads(done.stdout)
    errors = {name: report[f"median_{name}_ms"] - scripted for name, scripted in SCRIPTED_MS.items()}
    return {"rate": rate, "requests": report["completed"], "valid": done.returncode == 0, **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="5,20,60", help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        target = server.stdout.readline().strip()
        rows = [measure(target, float(rate), options.seconds) for rate in options.rates.split(",")]
    finally:
        server.terminate()
        server.wait()
    print("median beyond the script, ms")
    print(f"{'requests/s':>10} {'requests':>9} {'TTFT':>8} {'ITL':>8} {'end to end':>11}  valid")
    for row in rows:
        figures = f"{row['ttft']:8.2f} {row['itl']:8.2f} {row['e2el']:11.2f}"
        print(f"{row['rate']:10g} {row['requests']:9d} {figures}  {'yes' if row['valid'] else 'no'}")
    print(json.dumps({"scripted_ms": SCRIPTED_MS, "beyond_ms": rows}))


if __name__ == "__main__":
    main()
