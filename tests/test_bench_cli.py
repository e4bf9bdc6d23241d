"""`tramontane bench` from the outside: its verbs against a server whose answers are known, and every exit status."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import click
import grpc
import pytest
from bench_verbs import FAST, SPOILED, bench_ends, ended, start, steady, to
from fake_openai import FakeOpenAI
from fake_server import FakeServer, count_up, delta, finished, refuse, started

from tramontane.client.loadtest.cli import bench
from tramontane.client.loadtest.result import MEASURES
from tramontane.protos import serving_pb2

TARGET = {"--target", "--model", "--tls", "--ca", "--cert", "--key", "--token-file", "--chat", "--connections"}
TARGET |= {"--timeout", "--workers", "--drain", "--objective", "--server-name", "--clear-token", "--send"}
CHECKING = {"--fault", "--alone", "--texts", "--ceiling"}
OUTPUT = {"--out", "--save-texts", "--json", "--quiet"}
WORKLOAD = {"--prompt-tokens", "--output-tokens", "--text", "--prompts", "--words", "--characters-per-token"}
WORKLOAD |= {"--prefixes", "--prefix-tokens", "--distinct", "--temperature", "--top-k", "--top-p", "--stop"}
WORKLOAD |= {"--ignore-eos", "--cancel", "--slow", "--churn", "--bad", "--pause", "--seed"}
LOADS = TARGET | CHECKING | OUTPUT
OPTIONS = {
    "run": LOADS
    | WORKLOAD
    | {"--rate", "--arrivals", "--burstiness", "--steps", "--ramp", "--users", "--duration", "--warmup"},
    "sweep": LOADS | WORKLOAD | {"--from", "--to", "--tolerance", "--duration", "--warmup"},
    "replay": LOADS | {"--speed", "--timestamps", "--warmup", "--seed", "--characters-per-token"},
    "soak": LOADS | WORKLOAD | {"--rate", "--duration", "--warmup"},
    "compare": {"--threshold", "--json"},
}


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_are_a_tested_list(verb):
    command = bench.commands[verb]
    options = [parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)]
    assert sorted(options) == sorted(OPTIONS[verb])
    assert command.help
    if verb != "compare":
        help_text = command.get_help(click.Context(command))
        assert all(words in help_text for words in MEASURES.values())


def test_a_run(server, tmp_path):
    out, _ = bench_ends(
        0, "run", *to(server), *FAST, "--rate", "30", "--duration", "2s", "--workers", "2", "--json", "--out", tmp_path
    )
    report = json.loads(out)
    assert report["schema"] == "tramontane.bench/1"
    assert report["completed"] == report["num_prompts"] == len(server.generated) - 4  # four again alone
    assert report["failed"] == 0
    assert report["output_lens"] == [8] * report["completed"]
    checks = report["result"]["checks"]
    assert (checks["alone_checked"], checks["alone_wrong"]) == (4, 0)
    assert (checks["texts_checked"], checks["texts_wrong"]) == (report["completed"], 0)
    assert json.loads((tmp_path / "result.json").read_text()) == report
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == report["completed"]
    assert all(line["status"] == "OK" for line in lines)
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "counting" in page


def test_the_table_is_for_people(server):
    out, err = bench_ends(0, "run", *to(server), *FAST[:-3], "--alone", "2", "--users", "2", "--duration", "1s")
    assert "hides overload" in out
    assert "ttft" in out
    assert "\x1b" not in out + err  # no terminal, no colours
    assert "counting at" in err


def test_an_objective_that_is_missed(server):
    out, _ = bench_ends(
        3, "run", *to(server), *FAST, "--rate", "20", "--duration", "2s", "--objective", "ttft:p50<0.001ms"
    )
    assert "MISSED" in out


def test_wrong_offsets_are_found(server):
    """A server that counts offsets from 1."""

    def off_by_one(request, context):
        for event in count_up(request, context):
            if event.HasField("delta"):
                event.delta.offset += 1
            yield event

    server.plans += [off_by_one] * 1000
    out, _ = bench_ends(1, "run", *to(server), *FAST, "--rate", "20", "--duration", "1s")
    assert "WRONG" in out
    assert "offset 1 after 0 tokens" in out


def test_anothers_tokens_are_found(server):
    """A server that now and then answers with the tokens of the request before."""
    last: list[int] = []

    def leaking(request, context):
        ids = [ord(request.text[-1]) + 1 + offset for offset in range(8)]
        shown = last[0] if last and len(server.generated) % 5 == 0 else ids
        last[:] = [ids]
        event = serving_pb2.GenerateEvent(started=started(request), delta=delta(0, *shown))
        yield event
        yield serving_pb2.GenerateEvent(finished=finished(len(request.text) + 1, 8))

    server.plans += [leaking] * 1000
    out, _ = bench_ends(1, "run", *to(server), *FAST, "--alone", "100", "--rate", "20", "--duration", "2s")
    assert "WRONG" in out
    assert "under load" in out


def test_a_stall_is_found(server):
    """A server that is silent for two seconds from its 20th request on."""
    silent_until: list[float] = []

    def stalling(request, context):
        for event in count_up(request, context):
            if len(server.generated) >= 20 and not silent_until:
                silent_until.append(time.monotonic() + 2.0)
            if silent_until:
                time.sleep(max(0.0, silent_until[0] - time.monotonic()))
            yield event
            time.sleep(0.01)

    server.plans += [stalling] * 1000
    out, _ = bench_ends(0, "run", *to(server), *FAST, "--rate", "10", "--duration", "8s", "--json")
    result = json.loads(out)["result"]
    assert any(stall["end_s"] - stall["start_s"] > 1.5 for stall in result["stalls"])
    assert any("stall" in finding["text"] for finding in result["findings"])


def test_sweep_replay_and_compare(server, tmp_path):
    sweep = [*FAST, "--from", "5", "--to", "10", "--duration", "2s"]
    out, _ = bench_ends(0, "sweep", *to(server), *sweep, "--json", "--out", tmp_path / "sweep")
    found = json.loads(out)
    assert found["best_rate"] == 10
    assert [level["request_rate"] for level in found["levels"]] == [5, 10]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "result.json",
        "report.html",
        "requests-5.jsonl",
        "requests-10.jsonl",
    }
    seen = len(server.generated)
    replay = [
        "replay",
        tmp_path / "sweep" / "requests-10.jsonl",
        *to(server),
        "--quiet",
        "--no-ceiling",
        "--alone",
        "0",
    ]
    out, _ = bench_ends(0, *replay, "--json", "--out", tmp_path / "a")
    again = json.loads(out)
    assert again["num_prompts"] == found["levels"][1]["num_prompts"] == len(server.generated) - seen
    bench_ends(2, "compare", tmp_path / "sweep" / "result.json", tmp_path / "a" / "result.json")


def test_compare(server, tmp_path):
    for name in ("a", "b"):
        server.plans += [steady] * 500
        bench_ends(0, "run", *to(server), *FAST, "--rate", "30", "--duration", "6s", "--out", tmp_path / name)
    a, b = (tmp_path / name / "result.json" for name in ("a", "b"))
    process = start("compare", a, b, "--json")
    out, err = process.communicate(timeout=60)
    if process.returncode != 2:  # a busy machine may have spoiled one of them
        changes = json.loads(out)["changes"]
        assert process.returncode == any(change["verdict"] == "worse" for change in changes), err
        assert all(0.5 < change["ratio"] < 2 for change in changes if change["name"] == "ttft p50 ms")
    bench_ends(2, "compare", a, tmp_path / "a" / "requests.jsonl")


def test_ctrl_c_ends_a_soak_with_its_report(server):
    process = start("soak", *to(server), *FAST, "--rate", "20", "--duration", "10m", "--json")
    while len(server.generated) < 20:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = ended(process, 0)
    report = json.loads(out)
    assert report["completed"] >= 15
    assert any("stopped by its user" in finding["text"] for finding in report["result"]["findings"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "give one of --rate"),
        (["run", "--rate", "2", "--users", "3"], "given are rate, users"),
        (["run", "--rate", "2", "--duration", "2s", "--warmup", "5s"], "warmup is 5 s"),
        (["run", "--rate", "2", "--objective", "ttft<1s"], "objective"),
        (["run", "--rate", "2", "--fault", "melt:stage@1s"], "allowed are kill, stop"),
        (["run", "--rate", "2", "--prompt-tokens", "many"], "many"),
        (["sweep", "--from", "9", "--to", "3"], "rates are 9 .. 3"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, says):
    _, err = bench_ends(2, *arguments)
    assert says in err


def test_a_result_is_not_overwritten(server, tmp_path):
    (tmp_path / "result.json").write_text("precious")
    _, err = bench_ends(2, "run", *to(server), *FAST, "--rate", "20", "--duration", "60s", "--out", tmp_path)
    assert "holds a result already" in err
    assert not server.generated


def test_a_short_run_has_a_short_warm_up(server):
    out, _ = bench_ends(0, "run", *to(server), *FAST[:3], *FAST[5:], "--rate", "20", "--duration", "2s", "--json")
    assert json.loads(out)["result"]["window_s"] == [0.4, 2.0]


def test_a_fault_that_could_not_be_done_is_not_passed_over(server):
    load = ["--rate", "20", "--duration", "2s", "--fault", "kill:stage=0.7@1s"]
    out, _ = bench_ends(SPOILED, "run", *to(server), *FAST, *load)
    assert "was not done" in out


def test_a_server_that_refuses_most_is_no_success(server):
    server.plans += [refuse(grpc.StatusCode.UNAVAILABLE, "broken")] * 1000
    server.plans.insert(5, count_up)
    out, _ = bench_ends(SPOILED, "run", *to(server), *FAST, "--rate", "20", "--duration", "2s")
    assert "most were not served" in out


def test_a_sweep_takes_a_server_that_refuses_most_for_a_miss(server):
    server.plans += [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")] * 1000
    out, _ = bench_ends(3, "sweep", *to(server), *FAST, "--from", "20", "--duration", "2s")
    assert "does not hold" in out
    assert "nothing is known" not in out


def test_a_server_that_is_not_there():
    with FakeServer() as gone:
        target = gone.target
    _, err = bench_ends(5, "run", "--target", target, "--rate", "2", "--no-ceiling")
    assert target in err


async def test_an_http_server():
    """It refuses nothing, and bad requests are judged there, too."""
    fake = FakeOpenAI()
    async with fake.serve() as address:
        process = start("run", "--target", address, *FAST, "--rate", "20", "--duration", "2s", "--bad", "0.2", "--json")
        out, _ = await asyncio.to_thread(ended, process, 1)
    report = json.loads(out)
    assert report["backend"] == "openai"
    checks = report["result"]["checks"]
    assert report["completed"] + checks["bad_accepted"] == len(fake.bodies)
    assert checks["bad_accepted"] > 0
    assert checks["alone_checked"] == checks["texts_checked"] == 0


def test_ctrl_c_in_the_warm_up(server):
    process = start("run", *to(server), *FAST, "--rate", "20", "--duration", "60s", "--warmup", "50s", "--json")
    while len(server.generated) < 10:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = ended(process, SPOILED)
    report = json.loads(out)
    assert report["duration"] == 0
    assert any("nothing was measured" in finding["text"] for finding in report["result"]["findings"])


def test_ctrl_c_in_a_sweep_learns_nothing_from_the_level_that_it_cut(server):
    server.plans += [steady] * 2000
    process = start("sweep", *to(server), *FAST, "--from", "5", "--duration", "4s", "--json")
    while len(server.generated) < 40:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, SPOILED), err
    found = json.loads(out)
    rates = [level["request_rate"] for level in found["levels"]]
    assert found["best_rate"] in (None, *rates[:-1])
    assert any("stopped by its user" in finding["text"] for finding in found["result"]["findings"])
