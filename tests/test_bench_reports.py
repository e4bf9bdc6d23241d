"""What a load test's reports say: the JSON, the request log, the terminal's table and the page."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console
from sample_results import HOSTILE, poor_run
from simulated_queue import THE_EXAMPLE, answer

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.judging.compare import Change, Comparison, Verdict
from tramontane.client.loadtest.judging.quantiles import distribution
from tramontane.client.loadtest.plan import Ask
from tramontane.client.loadtest.record import PROTOCOL, ServerTimings
from tramontane.client.loadtest.report.console import open_console
from tramontane.client.loadtest.report.json_report import from_json, to_json
from tramontane.client.loadtest.report.request_log import request_line
from tramontane.client.loadtest.report.table import print_comparison, print_run, print_sweep
from tramontane.client.loadtest.report.wording import sweep_verdict
from tramontane.client.loadtest.result import ObjectiveResult


@pytest.fixture(scope="module")
def poor():
    return poor_run()


def printed(show, value, width=120, **terminal):
    console = Console(file=io.StringIO(), width=width, highlight=False, **terminal)
    show(console, value)
    return console.file.getvalue()


# JSON


def test_json_gives_back_what_it_was_given(one, many, poor):
    for result in (one, many, poor):
        assert from_json(to_json(result)) == result


def test_json_has_vllms_names_where_they_mean_the_same(one):
    document = json.loads(to_json(one))
    assert document["schema"] == "tramontane.bench/1"
    assert document["kind"] == "run"
    ttft = one.latencies["ttft"]
    expected = {
        "backend": "grpc",
        "model_id": "shakespeare-7m",
        "num_prompts": 1231,
        "completed": 1200,
        "failed": 31,
        "duration": 100.0,
        "request_rate": 12.0,
        "burstiness": 1.0,
        "max_concurrency": None,
        "request_goodput": one.throughput.goodput_per_s,
        "output_throughput": one.throughput.output_tokens_per_s,
        "total_output_tokens": sum(one.samples.output_lens),
        "mean_ttft_ms": ttft.mean,
        "median_ttft_ms": ttft.at(0.5),
        "p99_ttft_ms": ttft.at(0.99),
        "p99.9_ttft_ms": None,
        "p99.9_itl_ms": one.latencies["itl"].at(0.999),
    }
    assert {name: document[name] for name in expected} == expected
    assert document["ttfts"][0] == pytest.approx(one.samples.ttfts_ms[0] / 1000, abs=1e-6)
    assert len(document["itls"]) == len(document["input_lens"]) == one.counts.completed


def test_a_sweeps_json_has_every_levels_summary(many):
    document = json.loads(to_json(many))
    assert document["kind"] == "sweep"
    assert document["best_rate"] == 16.0
    assert [level["request_rate"] for level in document["levels"]] == [4.0, 16.0, 24.0]


def test_json_counts_refusals_and_says_how_long_they_took(one):
    document = json.loads(to_json(one))
    assert (document["refused"], document["p99_refusal_ms"]) == (0, None)
    refused = replace(
        one,
        counts=replace(one.counts, refused=20, first_errors={"HTTP_429": "full"}),
        refusals=distribution(range(2000)),
    )
    document = json.loads(to_json(refused))
    assert (document["failed"], document["refused"]) == (31, 20)
    assert (document["median_refusal_ms"], document["p99_refusal_ms"]) == (999, 1979)
    assert document["result"]["counts"]["first_errors"] == {"HTTP_429": "full"}
    assert from_json(to_json(refused)) == refused


def test_a_result_from_before_refusals_were_counted_is_read(one):
    document = json.loads(to_json(one))
    del document["result"]["refusals"], document["result"]["counts"]["refused"]
    del document["result"]["counts"]["first_errors"], document["result"]["target"]["unsent"]
    assert from_json(json.dumps(document).encode()) == one


def test_json_holds_no_nan(one):
    assert from_json(to_json(one))
    data = to_json(replace(one, generator_cores=float("nan")))
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"ready", "not a result of `tramontane bench`"),
        (b'{"ttfts": []}', "it names no schema"),
        (b'{"schema": "tramontane.bench/9", "kind": "run"}', "its schema is 'tramontane.bench/9'"),
        (b'{"schema": "tramontane.bench/1", "kind": "walk"}', "'run' or 'sweep', not 'walk'"),
        (b'{"schema": "tramontane.bench/1", "kind": "run", "result": {"date": 3}}', "damaged"),
        (b'{"schema": "tramontane.bench/1", "kind": "run", "result": ' + b"[" * 100_000, "not a result"),
    ],
)
def test_json_of_another_kind_is_refused_with_a_reason(data, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        from_json(data)


# The request log


def test_a_line_of_the_request_log():
    record = replace(
        THE_EXAMPLE,
        number=7,
        finish_reason="length",
        server=ServerTimings(queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0),
        token_ids=(1, 52, 77),
        text="secret",
    )
    ask = Ask(number=7, prompt=(5, 6, 7, 8), max_tokens=3, seed=11)
    line = request_line(record, ask)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line) == {
        "number": 7,
        "at_s": 2.0,
        "sent_s": 2.001,
        "first_token_s": 2.101,
        "ended_s": 2.152,
        "status": "OK",
        "finish_reason": "length",
        "prompt_tokens": 4,
        "max_tokens": 3,
        "completion_tokens": 3,
        "temperature": 0.0,
        "seed": 11,
        "ttft_ms": 101.0,
        "e2el_ms": 152.0,
        "itls_ms": [50.0],
        "message_tokens": [1, 2],
        "server": {"queue_ms": 1.0, "prefill_ms": 2.0, "decode_ms": 3.0},
        "ids_sha256": hashlib.sha256(b"1,52,77").hexdigest(),
    }
    assert msgspec.json.decode(request_line(record, ask, texts=True))["text"] == "secret"


def test_a_failed_requests_line_says_why_and_claims_nothing():
    nothing = {"message_times_s": (), "message_tokens": (), "prompt_tokens": 0, "completion_tokens": 0}
    record = answer(1.0, 1.0, 1.5, status=PROTOCOL, error="no last event\nat all", **nothing)
    line = msgspec.json.decode(request_line(record, Ask(number=0, prompt="To be", max_tokens=3)))
    assert line["error"] == "no last event\nat all"
    assert line.keys().isdisjoint({"ttft_ms", "e2el_ms", "first_token_s", "itls_ms", "ids_sha256"})
    assert line["prompt_tokens"] == 1  # five characters, so that the line can be replayed


# The table


def test_the_table_is_plain_where_no_terminal_is(one):
    text = printed(print_run, one)
    assert "\x1b" not in text
    assert re.search(r"^  ttft +1200 .* -$", text, re.MULTILINE), "too few samples for p99.9"
    assert re.search(r"^  ttft p95 < 1000 ms +\S+ +kept$", text, re.MULTILINE)
    assert re.search(r"^  ended UNAVAILABLE +31 +2.52 %$", text, re.MULTILINE)
    assert "kill:stage=0.1@70s on stage 0.1, pid 4242" in text
    assert max(map(len, text.splitlines())) <= 120


def test_findings_come_before_figures_worst_first_and_the_verdict_last(one):
    findings = (
        Finding(severity=Severity.NOTE, text="a small thing"),
        Finding(severity=Severity.WRONG, text="other tokens than alone"),
    )
    text = printed(print_run, replace(one, findings=findings))
    places = [text.index(part) for part in ("WRONG  other tokens", "NOTE  a small thing", "Latency, ms")]
    assert places == sorted(places)
    assert text.strip().endswith("The server gave wrong answers: other tokens than alone.")


@pytest.mark.parametrize(
    ("findings", "says"),
    [
        ([(Severity.INVALID, "too late"), (Severity.MISSED, "ttft")], "These figures cannot be trusted: too late."),
        ([(Severity.MISSED, "ttft"), (Severity.MISSED, "itl")], "An objective was not kept: ttft; and 1 more."),
    ],
)
def test_the_verdict_says_why(one, findings, says):
    found = tuple(Finding(severity=severity, text=text) for severity, text in findings)
    assert printed(print_run, replace(one, findings=found)).strip().endswith(says)


def test_the_table_says_why_requests_failed_and_how_long_refusals_took(one):
    counts = replace(
        one.counts,
        failed=31,
        refused=20,
        by_status={"OK": 1200, "RESOURCE_EXHAUSTED": 20, "UNAVAILABLE": 11},
        first_errors={"RESOURCE_EXHAUSTED": "the queue is full", "UNAVAILABLE": "stage 0.1\x1b[2J died"},
    )
    text = printed(print_run, replace(one, counts=counts, refusals=distribution(range(1, 2001))))
    assert re.search(r"^  refused, among the failed +20 +1.62 %$", text, re.MULTILINE)
    assert re.search(r"^  RESOURCE_EXHAUSTED +20 +the queue is full *$", text, re.MULTILINE)
    assert re.search("^  UNAVAILABLE +11 +stage 0.1\N{REPLACEMENT CHARACTER}\\[2J died *$", text, re.MULTILINE)
    assert re.search(r"^  refusal +2000 +1000 +1000 .* 1980 +-$", text, re.MULTILINE)
    assert "The slowest took 2000 ms." in text
    assert "stage 1 of replica 0 busy" in text
    assert "Refusals" not in printed(print_run, one)


def test_a_sweeps_table_says_why_requests_failed(many):
    levels = tuple(
        replace(level, counts=replace(level.counts, by_status={"HTTP_429": 2}, first_errors={"HTTP_429": f"full {n}"}))
        for n, level in enumerate(many.levels)
    )
    text = printed(print_sweep, replace(many, levels=levels))
    assert re.search(r"^  HTTP_429 +6 +full 0 *$", text, re.MULTILINE)


def test_a_narrow_terminal_loses_intervals_and_not_figures(one):
    def latency(width):
        return printed(print_run, one, width).partition("Latency")[2].partition("Throughput")[0]

    p95 = one.latencies["ttft"].quantiles[3]
    assert f"{p95.low:.0f}-{p95.high:.0f}" in latency(120)
    assert f"{p95.low:.0f}-{p95.high:.0f}" not in latency(80)
    assert re.search(rf"ttft .*{p95.value:.0f} ", latency(80))


def test_whatever_is_missing_is_a_dash_or_left_out(poor):
    text = printed(print_run, poor)
    assert "nan" not in text.lower()
    assert re.search(r"ttft p95 < 1000 ms +- +no verdict", text)
    assert "Checks" not in text


def test_a_sweeps_table_and_verdict(many):
    text = printed(print_sweep, many)
    assert len(re.findall(r"^  \d+ requests/s .*(kept|MISSED)$", text, re.MULTILINE)) == 3
    assert text.strip().endswith("Every objective held up to 16 requests/s; at 24 one was missed.")


def test_a_sweep_that_ended_in_an_invalid_level_does_not_call_its_best_rate_the_highest_tried(many):
    spoiled = replace(many.levels[2], findings=(Finding(severity=Severity.INVALID, text="the generator was late"),))
    ended = replace(many, levels=(*many.levels[:2], spoiled), first_missed_rate=None)
    _, said = sweep_verdict(ended)
    assert said == (
        "Every objective held up to 16 requests/s; of 24, which was tried, nothing is known: the generator was late."
    )
    _, said = sweep_verdict(replace(ended, levels=many.levels[:2]))
    assert said == "Every objective held up to 16 requests/s; the highest that was tried."


def test_a_sweep_whose_objectives_held_while_requests_piled_up_says_so(many):
    last = many.levels[2]
    kept = tuple(replace(each, met=True) for each in last.objectives)
    piled = replace(many, levels=(*many.levels[:2], replace(last, objectives=kept, stationary=False)))
    assert sweep_verdict(piled)[1] == "Every objective held up to 16 requests/s; at 24 open requests piled up."


def test_a_sweep_of_which_nothing_is_known_says_why(many):
    found = (Finding(severity=Severity.INVALID, text="nothing is known from 4 requests/s on: too late"),)
    ended = replace(many, levels=many.levels[:1], best_rate=None, first_missed_rate=None, findings=found)
    assert sweep_verdict(ended) == (
        Severity.INVALID,
        "These figures cannot be trusted: nothing is known from 4 requests/s on: too late.",
    )
    assert ended.exit_status == 4
    missed = replace(ended, findings=(), first_missed_rate=4.0)
    assert sweep_verdict(missed)[1] == "No level kept every objective."


def test_a_comparisons_table():
    change = Change(
        name="ttft p95 ms", a=80.0, b=96.0, ratio=1.2, low=1.12, high=1.29, less_is_better=True, verdict=Verdict.WORSE
    )
    comparison = Comparison(changes=(change,), threshold=0.05, warnings=("the seed differs: 1 in A, 2 in B",))
    text = printed(print_comparison, comparison)
    assert re.search(r"^  ttft p95 ms +80.0 +96.0 +1.200 +1.12-1.29 +worse$", text, re.MULTILINE)
    assert "NOTE  the seed differs" in text
    assert text.strip().endswith("B is worse: ttft p95 ms.")


def test_a_servers_text_does_not_steer_the_terminal(one):
    hostile = replace(
        one,
        target=replace(one.target, model=HOSTILE),
        findings=(Finding(severity=Severity.WRONG, text=HOSTILE),),
    )
    text = printed(print_run, hostile)
    assert "\x1b" not in text
    assert "[red]" in text, "no markup is read"


def test_the_console_is_120_columns_wide_without_a_terminal():
    assert open_console(io.StringIO()).width == 120


def test_objectives_without_a_verdict_are_no_success(one):
    kept = tuple(ObjectiveResult(objective=each.objective, value_ms=1.0, met=None) for each in one.objectives)
    assert "No verdict" in printed(print_run, replace(one, objectives=kept))


def test_a_result_whose_samples_do_not_match_is_damaged(one):
    document = json.loads(to_json(one))
    document["result"]["samples"]["ttfts_ms"].append(1.0)
    with pytest.raises(ValueError, match=r"damaged.*one row a request"):
        from_json(json.dumps(document).encode())
