"""What `tramontane bench` says from the outside, and what it makes of files that others wrote."""

from __future__ import annotations

import json
import shlex
import subprocess

import click
import grpc
import pytest
from bench_verbs import FAST, SPOILED, TRAMONTANE, bench_ends, start, to
from fake_server import FakeServer, count_up, refuse

from tramontane.client.loadtest.cli import bench


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


def test_where_it_was_saved_is_said_last(server, tmp_path):
    load = ["--users", "1", "--duration", "0.5s"]
    out, err = bench_ends(0, "run", *to(server), *FAST, *load, "--out", tmp_path / "a")
    assert out.strip().splitlines()[-1] == f"Saved in {tmp_path / 'a'}: report.html, result.json, requests.jsonl"
    out, err = bench_ends(0, "run", *to(server), *FAST[:-3], "--alone", "0", *load, "--out", tmp_path / "b", "--json")
    assert json.loads(out)
    assert f"saved in {tmp_path / 'b'}: report.html" in err
    sweep = [*FAST, "--from", "5", "--to", "5", "--duration", "1s"]
    out, _ = bench_ends(0, "sweep", *to(server), *sweep, "--out", tmp_path / "c")
    assert "report.html, result.json, requests-5.jsonl" in out


@pytest.mark.parametrize(
    ("load", "status"),
    [
        (["--users", "1"], 0),
        (["--rate", "20", "--objective", "ttft:p50<0.001ms"], 3),
        (["--users", "1", "--json"], 0),
    ],
)
def test_a_reader_who_leaves_does_not_change_the_exit_status(server, tmp_path, load, status):
    """`bench run | head -1`: wrong answers have status 1, and a closed pipe must not look like them."""
    run = ["run", *to(server), *FAST, *load, "--duration", "1s", "--out", tmp_path]
    words = shlex.join([str(word) for word in (TRAMONTANE, "bench", *run)])
    script = f"{words} 2> {tmp_path / 'err'} | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) in (status, SPOILED)
    assert (tmp_path / "err").read_text() == ""
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_readers_leaving_before_the_end_is_survived(server, tmp_path, form):
    process = start("run", *to(server), *FAST, "--users", "1", "--duration", "1s", "--out", tmp_path, *form)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "report.html").exists()


def test_help_says_what_is_true():
    def words(verb):
        return " ".join(bench.commands[verb].get_help(click.Context(bench.commands[verb])).split())

    assert "Decides arrivals, lengths, prompts, conducts and requests' own seeds" in words("run")
    assert "Decides what the trace leaves open" in words("replay")
    assert "or the result.json in it" in words("compare")
    assert "certainly" not in words("compare")


def test_the_end_of_a_trace_begins_at_once(server, tmp_path):
    path = tmp_path / "mooncake.jsonl"
    lines = [{"timestamp": at, "input_length": 20, "output_length": 4, "hash_ids": [1]} for at in (25000, 26000, 26500)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "output_length": 0}]))
    out, _ = bench_ends(0, "replay", path, *to(server), "--no-ceiling", "--quiet", "--alone", "0", "--json")
    report = json.loads(out)
    assert report["start_times"] == [0.0, 1.0, 1.5]
    assert report["duration"] < 2, "and no 25 s of silence before"
    assert report["request_rate"] == pytest.approx(2.0, rel=0.01)
    assert report["result"]["load"]["detail"].endswith("its first arrival, at 25 s, is the run's start")
    notes = [finding["text"] for finding in report["result"]["findings"]]
    assert "keys of mooncake.jsonl that were not read: 'hash_ids'" in notes
    assert any("1 entry of mooncake.jsonl was passed over, line 4: max_tokens is 0" in note for note in notes)


def test_prompts_are_counted_by_the_servers_tokenizer(server, tmp_path):
    """A context of 4,096 and a token a character: of prompts of 12,000 bytes, 4,000 characters fit, 4,090 do not."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "天" * count}) + "\n" for count in (4000, 4090, 3)))
    load = ["--rate", "20", "--duration", "1s"]
    out, _ = bench_ends(0, "run", *to(server), *FAST[1:], "--prompts", path, *load)
    asked = {len(seen.request.text) for seen in server.seen if seen.method == "Tokenize"}
    assert asked == {4000, 4090}, "3 characters fit, whatever the tokenizer"
    assert {len(seen.request.text) for seen in server.generated} == {4000, 3}
    assert "a prompt of 4,091 tokens and max_tokens 8 need 4,099; the context is 4,096" in " ".join(out.split())


def test_a_text_longer_than_its_characters_let_one_believe_is_said_before_the_run(server, tmp_path):
    (tmp_path / "text").write_text("a line of text\n" * 4000)
    options = ["--text", tmp_path / "text", "--prompt-tokens", "2000", "--output-tokens", "8", "--rate", "20"]
    _, err = bench_ends(2, "run", *to(server), "--no-ceiling", "--quiet", *options)
    assert "tokens to the server's tokenizer and max_tokens 8; the context is 4,096" in " ".join(err.split())
    assert "1 characters a token" in " ".join(err.split())
    assert not server.generated


def test_refusals_are_shown_with_their_latency(server):
    """Every other request is refused at once: that is no failure of the run, and no goodput."""
    server.plans += [refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full"), count_up] * 500
    load = ["--rate", "50", "--duration", "2s", "--objective", "ttft:p40<10s", "--arrivals", "constant"]
    out, _ = bench_ends(0, "run", *to(server), *FAST[:-1], "0", *load, "--json")
    report = json.loads(out)
    counts = report["result"]["counts"]
    assert report["refused"] == counts["refused"] == counts["by_status"]["RESOURCE_EXHAUSTED"] == 50
    assert counts["first_errors"]["RESOURCE_EXHAUSTED"].startswith("the queue is full")
    assert report["request_goodput"] <= 25
    assert 0 < report["median_refusal_ms"] < 1000
    assert len(server.generated) == 100, "nothing is sent twice"


def test_a_folder_that_cannot_be_made_is_said_before_the_run(server):
    _, err = bench_ends(2, "run", *to(server), *FAST, "--rate", "20", "--duration", "60s", "--out", "/proc/nope")
    assert "/proc/nope" in err
    assert not server.generated
