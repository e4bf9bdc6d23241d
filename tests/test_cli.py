"""The command line: output, exit statuses, interruption."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result
from fake_server import count_up, events, hold, refuse
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

from tramontane import __version__
from tramontane.client.cli import main

TRAMONTANE = str(Path(sys.executable).with_name("tramontane"))


@pytest.fixture
def run(server, monkeypatch):
    monkeypatch.setenv("TRAMONTANE_TARGET", server.target)

    def run(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=stdin)

    return run


def test_generate_prints_the_text_alone(run):
    result = run("generate", "ab", "--max-tokens", "3")
    assert (result.stdout, result.stderr, result.exit_code) == ("cde\n", "", 0)


def test_generate_prints_figures_when_asked(run):
    result = run("generate", "ab", "--max-tokens", "4", "--seed", "7", "-v")
    assert result.stdout == "cdef\n"
    assert result.stderr.startswith("3 + 4 tokens, first after ")
    assert result.stderr.endswith(" s, 10.0 tokens/s, ended by length, seed 7\n")


def test_generate_as_json(run):
    result = run("generate", "ab", "--max-tokens", "2", "--seed", "7", "--json")
    completion = json.loads(result.stdout)
    assert (completion["text"], completion["token_ids"], completion["finish_reason"]) == ("cd", [99, 100], "length")
    assert (completion["seed"], completion["usage"]) == (7, {"prompt_tokens": 3, "completion_tokens": 2})


def test_every_option_reaches_the_request(server, run):
    options = "--ids 5,97 --max-tokens 2 --min-tokens 1 --temperature 0 --top-k 3 --top-p 0.5 --min-p 0.25 --seed 7"
    result = run("generate", *options.split(), "--stop", "x", "--stop", "\n", "--ignore-eos", "--model", "counting")
    assert result.exit_code == 0, result.output
    request = server.seen[0].request
    assert list(request.tokens.ids) == [5, 97]
    assert (request.stopping.max_tokens, request.stopping.min_tokens, request.stopping.ignore_eos) == (2, 1, True)
    assert list(request.stopping.strings) == ["x", "\n"]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed) == (0, 3, 0.5, 0.25, 7)
    assert sampling.HasField("temperature")
    assert request.model == "counting"


def test_the_prompt_may_come_from_standard_input(server, run):
    assert run("generate", "-", "--max-tokens", "1", stdin="ab\n").exit_code == 0
    assert server.seen[0].request.text == "ab\n"


def test_models(run):
    lines = run("models").stdout.splitlines()
    assert lines[0].split() == [
        "NAME",
        "SERVING",
        "CONTEXT",
        "WINDOW",
        "DTYPE",
        "WEIGHTS",
        "TOKENIZER",
        "STAGES",
        "VERSION",
    ]
    assert lines[1].split() == ["counting", "yes", "4096", "128", "float32", "int8", "yes", "2", "counting-1"]
    assert lines[2].split() == ["full", "no", "64", "of", "128", "none", "none", "0"]
    infos = json.loads(run("models", "--json").stdout)
    assert [info["name"] for info in infos] == ["counting", "full"]
    assert [info["context_lowered"] for info in infos] == ["", "128 do not fit"]


def test_health_is_0_only_when_serving(server, run):
    for arguments in (["health"], ["health", "--model", "counting"]):
        assert (run(*arguments).stdout, run(*arguments).exit_code) == ("SERVING\n", 0)
    server.set_serving(False)
    for arguments in (["health"], ["health", "--model", "counting"]):
        assert (run(*arguments).stdout, run(*arguments).exit_code) == ("NOT_SERVING\n", 1)
    result = run("health", "--json")
    assert (json.loads(result.stdout)["status"], result.exit_code) == ("NOT_SERVING", 1)
    unknown = run("health", "--model", "other")
    assert (unknown.stdout, unknown.exit_code) == ("", 1)
    assert "has no model 'other'" in unknown.stderr
    nobody = run("health", "--target", "127.0.0.1:1")
    assert (nobody.stdout, nobody.exit_code) == ("", 1)


def test_version(run):
    assert run("version").stdout == run("--version").stdout == f"tramontane {__version__}\n"
    assert json.loads(run("version", "--json").stdout)["tramontane"] == __version__


def test_errors_are_one_line_and_status_1(server, run):
    server.plans += [
        refuse(
            grpc.StatusCode.INVALID_ARGUMENT,
            "two\nlines",
            BadRequest(field_violations=[BadRequest.FieldViolation(field="sampling.top_p", description="is 7")]),
        ),
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", RetryInfo(retry_delay=Duration(seconds=400))),
        events(),
        refuse(grpc.StatusCode.UNAUTHENTICATED, "a token is missing"),
        refuse(
            grpc.StatusCode.INVALID_ARGUMENT,
            "min_p is 7",
            BadRequest(field_violations=[BadRequest.FieldViolation(field="sampling.min_p", description="min_p is 7")]),
        ),
    ]
    says = [
        "two lines (request",
        "sampling.top_p: is 7",
        "full (request",
        "try again in 400 s",
        "without its last event",
    ]
    says.append("--token-file names the file")
    results = [run("generate", "a") for _ in range(5)]
    results += [run("generate", "a", "--top-k", "-1"), run("models", "--target", "127.0.0.1:1")]
    for result in results:
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    assert all(any(text in result.stderr for result in results) for text in says)
    assert results[4].stderr.startswith("Error: min_p is 7 (request")
    assert results[4].stderr.count("min_p") == 1
    assert "top_k is -1" in results[5].stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "give PROMPT or --ids"),
        (["generate", "a", "--ids", "1"], "not both"),
        (["generate", "--ids", "1,x"], "'1,x' is not a list of token ids"),
        (["generate", "a", "--timeout", "0"], "0"),
        (["models", "--token-file", "/nonexistent"], "does not exist"),
    ],
)
def test_wrong_usage_is_status_2(server, run, arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not server.seen


def test_token_file(server, run, tmp_path):
    (tmp_path / "token").write_text("sesame\n")
    assert run("models", "--token-file", str(tmp_path / "token")).exit_code == 0
    assert server.seen[0].metadata["authorization"] == "Bearer sesame"
    abroad = run("models", "--token-file", str(tmp_path / "token"), "--target", "10.0.0.1:1")
    assert abroad.exit_code == 1
    assert "in clear" in abroad.stderr


def test_text_leaves_at_once_and_ctrl_c_cancels(server):
    server.plans.append(hold(after=2))
    command = [TRAMONTANE, "generate", "x", "--target", server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(2) == b"ab"
        assert not server.seen[0].ended.is_set()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == b""
    assert server.seen[0].ended.wait(30)


def test_a_reader_that_leaves_is_no_error(server):
    command = f"{TRAMONTANE} generate x --target {server.target} --max-tokens 100000 | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (result.stdout, result.stderr) == (b"y", b"")
    assert server.seen[0].ended.wait(30)


def test_what_it_waits_for_is_said(server):
    server.set_serving(False)
    command = [TRAMONTANE, "generate", "ab", "--max-tokens", "3", "--timeout", "30", "--target", server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline().decode() == (f"waiting: {server.target} does not serve (loading, 43 %)\n")
        server.set_serving(True)
        assert process.communicate(timeout=60) == (b"cde\n", b"")


def test_models_says_why_one_does_not_serve(server, run):
    server.set_serving(False, "no pipeline is linked")
    assert "counting is not serving: no pipeline is linked\n" in run("models").stderr


def test_ids_are_printed_where_there_is_no_text(server, run):
    def ids_only(request, context):
        for event in count_up(request, context):
            event.delta.text = ""
            if event.HasField("started"):
                event.started.ids_only = True
            yield event

    server.plans.append(ids_only)
    result = run("generate", "--ids", "5,97", "--max-tokens", "3")
    assert (result.stdout, result.exit_code) == ("98,99,100\n", 0)


def test_a_terminal_of_another_encoding_shows_what_it_can(server):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [TRAMONTANE, "generate", "--ids", "8211", "--max-tokens", "1", "--target", server.target]  # then U+2014
    result = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == (b"\\u2014\n", b"", 0)


@pytest.mark.parametrize("arguments", [["--help"], ["version", "--json"], ["models"], ["generate", "a"]])
def test_a_full_disk_is_one_line(server, arguments):
    target = [] if arguments[0] in ("--help", "version") else ["--target", server.target]
    with open("/dev/full", "wb") as full:
        result = subprocess.run([TRAMONTANE, *arguments, *target], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert result.stderr == b"Error: the output cannot be written: No space left on device\n"
    assert result.returncode == 1


def test_standard_input_that_is_no_text_is_one_line(server):
    command = [TRAMONTANE, "generate", "-", "--target", server.target]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, input=b"ab\xff", capture_output=True, env=environment, timeout=60)
    assert result.stderr == b"Error: standard input is no text in utf-8: byte 0xff at place 2\n"
    assert result.returncode == 1
    assert not server.seen


def test_a_terminal_gets_colour_and_figures(server):
    def on_a_terminal(*arguments: str) -> bytes:
        ours, theirs = pty.openpty()
        with subprocess.Popen([TRAMONTANE, *arguments], stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            while chunk := _read(ours):
                shown += chunk
            assert process.wait(60) == 0
        os.close(ours)
        return shown

    assert on_a_terminal("health", "--target", server.target) == b"\x1b[32mSERVING\x1b[0m\r\n"
    server.plans.append(count_up)
    shown = on_a_terminal("generate", "ab", "--max-tokens", "2", "--target", server.target)
    assert shown.startswith(b"cd\r\n\x1b[2m3 + 2 tokens")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux: the other side is closed
        return b""
