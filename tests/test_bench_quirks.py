"""`tramontane bench` against a server with a quirk in each of its models: what is healthy ends with status 0 and every
request OK, and a failure is a failed request, with its reason in the table.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI, content, end

TRAMONTANE = Path(sys.executable).with_name("tramontane")
LOAD = ["--rate", "20", "--duration", "0.5s", "--warmup", "0s", "--arrivals", "constant", "--no-ceiling", "--quiet"]
REQUESTS = 10

GO_ON = [content("a"), content("b"), end(completion_tokens=2)]
HEALTHY = {
    "empty data between events": ["data: \n\n", GO_ON[0], "data:\n\n", *GO_ON[1:]],
    "comments, names and retries": [": relay\n\n", "retry: 3\n\n", "event: message\nid: 7\n", *GO_ON],
    "several data lines, no blank": ['data:{"choices":\ndata:[{"text":"a"}]}\n\n', *GO_ON[1:], "data:[DONE]\n\n"],
    "CR LF": ['data: {"choices": [{"text": "a"}]}\r\n\r\n', *GO_ON[1:]],
    "null everywhere": [
        {"choices": None, "usage": None, "error": None},
        {"choices": [{"text": None, "delta": None, "finish_reason": None}]},
        *GO_ON,
    ],
    "lists of parts": [{"choices": [{"delta": {"content": [{"type": "text", "text": "a"}]}}]}, *GO_ON[1:]],
    "unknown fields and a ping": [{"type": "ping"}, {"choices": [{"text": "a", "x": [{}]}], "y": {"z": 1}}, *GO_ON[1:]],
    "no usage": [content("a"), content("b"), end()],
    "DONE instead of a reason": [content("a"), content("b"), "data: [DONE]\n\n"],
    "NaN among the numbers": ['data: {"choices": [{"text": "a", "logprob": NaN}]}\n\n', *GO_ON[1:]],
    "no stream at all": (200, json.dumps({"choices": [{"message": {"content": "ab"}, "finish_reason": "stop"}]})),
}
FAILING = {
    "refused in the stream": ([{"error": {"code": 400, "message": "too long"}}], "HTTP_400", "in the stream: too long"),
    "an error amid the stream": ([content("a"), {"error": {"message": "lost"}}], "STREAM_ERROR", "in the stream: lost"),
    "refused by its status": ((429, '{"error": {"message": "come back later"}}'), "HTTP_429", "come back later"),
    "broken off": ([content("a")], "INCOMPLETE", "the stream ended with neither a finish_reason nor [DONE]"),
}


async def bench(model: str, script: object, *options: str) -> subprocess.CompletedProcess[str]:
    fake = FakeOpenAI(quirks={model: script})
    async with fake.serve() as address:
        words = [str(TRAMONTANE), "bench", "run", "--target", address, "--model", model, *LOAD, *options]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False, timeout=120)
    assert len(fake.bodies) == REQUESTS, done.stderr
    assert done.stderr == ""
    return done


@pytest.mark.parametrize("quirk", HEALTHY)
async def test_a_healthy_quirk_is_no_fault(quirk):
    done = await bench(quirk, HEALTHY[quirk], "--json")
    counts = json.loads(done.stdout)["result"]["counts"]
    assert (counts["by_status"], counts["first_errors"]) == ({"OK": REQUESTS}, {})
    assert done.returncode == 0 or "generator's own lag" in done.stdout, done.stdout


@pytest.mark.parametrize("quirk", FAILING)
async def test_a_failure_is_a_failed_request_with_its_reason(quirk):
    script, status, reason = FAILING[quirk]
    done = await bench(quirk, script)
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [status, str(REQUESTS), reason] in [[cell.strip() for cell in row] for row in rows]
    assert ["failed", str(REQUESTS), "100 %"] in rows
    assert done.returncode == 4, "nothing was answered, so there are no figures; and yet no answer was wrong"
    assert "wrong answers" not in done.stdout


async def test_what_cannot_be_decoded_makes_the_run_invalid():
    done = await bench("garbage", [content("a"), "data: {garbage\n\n"])
    assert done.returncode == 4
    assert f"{REQUESTS} answers could not be decoded; the first: Expecting" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("These figures cannot be trusted: none of 10 requests")


async def test_fields_that_were_not_sent_are_named():
    done = await bench("tiny", GO_ON)
    assert "seed, stream_options, ignore_eos were not sent, as this server is not known to take them" in done.stdout
    done = await bench("tiny", GO_ON, "--send", "seed", "--send", "stream_options", "--ignore-eos")
    assert "were not sent" not in done.stdout
