"""Traces: the layouts, their order and speed, and what is wrong with a line."""

from __future__ import annotations

import json

import pytest

from tramontane.client.loadtest.load import trace
from tramontane.client.loadtest.load.corpus import RandomIds
from tramontane.client.loadtest.load.entries import BadEntry
from tramontane.client.loadtest.load.lengths import Fixed
from tramontane.client.loadtest.load.trace import read_trace
from tramontane.client.loadtest.load.workload import Workload, make_asks
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.report.request_log import request_line


def write(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path, seed=1, *, vocabulary=64, context=100, **options):
    return read_trace(path, seed, vocabulary=vocabulary, context=context, **options)


def test_layouts(tmp_path):
    replay = read(
        write(
            tmp_path,
            {"at_s": 0.5, "prompt": "Once", "max_tokens": 8},
            {"at_s": 1, "prompt": [1, 2], "max_tokens": 9, "temperature": 0.5, "seed": 7, "ignore_eos": True},
            {"at_s": 1.25, "prompt_tokens": 12, "max_tokens": 10},
            {"timestamp": 2500, "input_length": 13, "output_length": 11, "hash_ids": [0, 1]},
        )
    )
    assert replay.arrivals_s == (0.5, 1.0, 1.25, 2.5)
    assert [ask.max_tokens for ask in replay.asks] == [8, 9, 10, 11]
    assert [ask.prompt for ask in replay.asks[:2]] == ["Once", (1, 2)]
    assert [len(ask.prompt) for ask in replay.asks[2:]] == [12, 13]
    assert all(3 <= token_id < 64 for ask in replay.asks[2:] for token_id in ask.prompt)
    # A length that was recorded is one to repeat; a prompt may end where the model ends it.
    assert [ask.ignore_eos for ask in replay.asks] == [False, True, True, True]
    assert (replay.asks[1].temperature, replay.asks[1].seed) == (0.5, 7)
    assert len({ask.seed for ask in replay.asks}) == 4


def test_lines_are_sorted_and_numbered_by_their_times(tmp_path):
    lines = [{"at_s": at_s, "prompt": name, "max_tokens": 1} for at_s, name in ((3, "c"), (1, "a"), (3, "d"), (2, "b"))]
    replay = read(write(tmp_path, *lines), speed=2)
    assert replay.arrivals_s == (0.5, 1.0, 1.5, 1.5)
    assert [(ask.number, ask.prompt) for ask in replay.asks] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


def test_the_seed_decides_what_the_trace_leaves_open(tmp_path):
    path = write(tmp_path, *({"at_s": number, "prompt_tokens": 20, "max_tokens": 1} for number in range(5)))
    assert read(path) == read(path)
    assert all(a.prompt != b.prompt for a, b in zip(read(path).asks, read(path, seed=2).asks, strict=True))


def test_prompts_are_text_where_the_vocabulary_is_unknown(tmp_path):
    path = write(tmp_path, {"at_s": 0, "prompt_tokens": 20, "max_tokens": 1})
    prompt = read(path, vocabulary=None, characters_per_token=2.0).asks[0].prompt
    assert isinstance(prompt, str)
    assert 39 <= len(prompt) <= 40


@pytest.mark.parametrize("texts", [True, False])
def test_our_own_requests_are_a_trace(tmp_path, texts):
    """By two roads: a plan, and what is read back from the file of the run that sent it."""
    shares = {"cancel": 0.2, "slow": 0.2, "bad": 0.2}
    workload = Workload(source=RandomIds(), prompt=Fixed(12), completion=Fixed(9), misbehave=shares)
    asks = make_asks(workload, 30, 1, vocabulary=64, context=100)
    lines = [request_line(record_of(ask), ask, texts=texts).decode().strip() for ask in asks]
    replay = read(write(tmp_path, *reversed(lines)))
    good = [ask for ask in asks if ask.conduct is not Conduct.BAD]
    assert 0 < len(good) < 30
    assert replay.arrivals_s == tuple(ask.number / 4 for ask in good)
    assert [(len(ask.prompt), ask.max_tokens, ask.seed) for ask in replay.asks] == [
        (len(ask.prompt), ask.max_tokens, ask.seed) for ask in good
    ]
    if texts:
        assert [ask.prompt for ask in replay.asks] == [ask.prompt for ask in good]


def record_of(ask: Ask) -> Record:
    return Record(
        number=ask.number,
        intended_s=ask.number / 4,
        sent_s=ask.number / 4,
        message_times_s=(),
        message_tokens=(),
        ended_s=100.0,
        status="UNAVAILABLE",
        conduct=ask.conduct,
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "a", "max_tokens": 1}, "has neither at_s nor timestamp"),
        ({"at_s": -1, "prompt": "a", "max_tokens": 1}, "at_s is -1; it must lie in 0 .. 2678400"),
        ({"at_s": 1.7e9, "prompt": "a", "max_tokens": 1}, "at_s is 1700000000; it must lie in 0 .. 2678400"),
        (
            {"timestamp": 1.7e12, "input_length": 1, "output_length": 1},
            "timestamp is 1700000000000; it must lie in 0 ..",
        ),
        ({"at_s": "1", "prompt": "a", "max_tokens": 1}, "Expected `float | null`, got `str` - at `$.at_s`"),
        ({"at_s": 1, "prompt": "a"}, "has neither max_tokens nor output_length"),
        ({"at_s": 1, "max_tokens": 1}, "has neither prompt_tokens nor input_length"),
        ({"at_s": 1, "prompt": "", "max_tokens": 1}, "prompt is empty"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 0}, "max_tokens is 0; it must lie in 1 .. 10,000,000"),
        ({"at_s": 1, "prompt_tokens": 0, "max_tokens": 1}, "prompt_tokens is 0; it must lie in 1 .. 10,000,000"),
        ({"timestamp": 1, "input_length": 0, "output_length": 1}, "input_length is 0"),
        ({"at_s": 1, "prompt_tokens": 100, "max_tokens": 1}, "prompt_tokens is 100; the context is 100"),
        (
            {"at_s": 1, "prompt_tokens": 90, "max_tokens": 11},
            "a prompt of 90 tokens and max_tokens 11 need 101; the context is 100",
        ),
        ({"at_s": 1, "prompt": [64], "max_tokens": 1}, "prompt holds token id 64; it must be below the vocabulary, 64"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "temperature": -1}, "temperature is -1; it must be at least 0"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "seed": -1}, "seed is -1; it must lie in 0 .. 2^64 - 1"),
        ("{", "Input data was truncated"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = write(tmp_path, {"at_s": 9, "prompt": "fine", "max_tokens": 1}, line)
    with pytest.raises(BadEntry) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert problem in str(caught.value)


def test_a_trace_without_requests_is_refused(tmp_path):
    for lines in ([], [{"conduct": "bad", "at_s": 1, "max_tokens": 10**9}]):
        with pytest.raises(ValueError, match="holds no request; it must hold at least 1"):
            read(write(tmp_path, *lines))


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_a_speed_must_be_one(tmp_path, speed):
    with pytest.raises(ValueError, match=r"speed is .*; it must be above 0"):
        read(write(tmp_path), speed=speed)


@pytest.mark.parametrize(("limit", "value"), [("MAX_REQUESTS", 2), ("MAX_HELD", 30)])
def test_a_trace_too_large_for_memory_is_refused(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(trace, limit, value)
    path = write(tmp_path, *({"at_s": number, "prompt_tokens": 15, "max_tokens": 1} for number in range(3)))
    with pytest.raises(BadEntry, match=r"line 3: is past .* take a part of the trace"):
        read(path)
