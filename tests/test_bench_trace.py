"""Traces: the layouts, their order and speed, and what is wrong with a line."""

from __future__ import annotations

import json

import pytest

from tramontane.client.loadtest.load import trace
from tramontane.client.loadtest.load.asks import make_asks
from tramontane.client.loadtest.load.corpus import RandomIds
from tramontane.client.loadtest.load.lengths import Fixed
from tramontane.client.loadtest.load.recorded_times import Unit
from tramontane.client.loadtest.load.trace import read_trace, replay
from tramontane.client.loadtest.load.workload import Workload
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.report.request_log import RequestLine, request_line


def write(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path, seed=1, *, unit=Unit.AUTO, vocabulary=64, context=100, **options):
    return replay(read_trace(path, unit), seed, vocabulary=vocabulary, context=context, **options)


def passed_over(replayed):
    return [note for note in replayed.notes if "passed over" in note]


def test_layouts(tmp_path):
    replayed = read(
        write(
            tmp_path,
            {"at_s": 0.5, "prompt": "Once", "max_tokens": 8},
            {"at_s": 1, "prompt": [1, 2], "max_tokens": 9, "temperature": 0.5, "seed": 7, "ignore_eos": True},
            {"at_s": 1.25, "prompt_tokens": 12, "max_tokens": 10},
            {"timestamp": 2500, "input_length": 13, "output_length": 11, "hash_ids": [0, 1]},
        )
    )
    assert replayed.arrivals_s == (0.0, 0.5, 0.75, 2.0)
    assert replayed.start == "0.5 s"
    assert [ask.max_tokens for ask in replayed.asks] == [8, 9, 10, 11]
    assert [ask.prompt for ask in replayed.asks[:2]] == ["Once", (1, 2)]
    assert [len(ask.prompt) for ask in replayed.asks[2:]] == [12, 13]
    assert all(3 <= token_id < 64 for ask in replayed.asks[2:] for token_id in ask.prompt)
    # A length that was recorded is one to repeat; a prompt may end where the model ends it.
    assert [ask.ignore_eos for ask in replayed.asks] == [False, True, True, True]
    assert (replayed.asks[1].temperature, replayed.asks[1].seed) == (0.5, 7)
    assert len({ask.seed for ask in replayed.asks}) == 4


def test_the_first_arrival_is_the_runs_start(tmp_path):
    """The end of a Mooncake trace: at 25, 26 and 26.5 s; and the same at a time of day."""
    for origin, start in ((25_000, "25 s"), (1_700_000_000_000, "1700000000 s"), (-500, "-0.5 s"), (0, "")):
        times = (origin, origin + 1000, origin + 1500)
        replayed = read(write(tmp_path, *({"timestamp": at, "input_length": 20, "output_length": 4} for at in times)))
        assert (replayed.arrivals_s, replayed.start) == ((0.0, 1.0, 1.5), start)


def test_lines_are_sorted_and_numbered_by_their_times(tmp_path):
    lines = [{"at_s": at_s, "prompt": name, "max_tokens": 1} for at_s, name in ((3, "c"), (1, "a"), (3, "d"), (2, "b"))]
    replayed = read(write(tmp_path, *lines), speed=2)
    assert replayed.arrivals_s == (0.0, 0.5, 1.0, 1.0)
    assert [(ask.number, ask.prompt) for ask in replayed.asks] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


@pytest.mark.parametrize(
    ("times", "unit", "arrivals_s", "noted"),
    [
        ((1000, 3000), Unit.AUTO, (0.0, 2.0), False),
        ((1000.5, 1002), Unit.AUTO, (0.0, 1.5), True),
        ((1000, 2000.5, 3000), Unit.AUTO, (0.0, 1.0005, 2.0), False),  # one odd line does not decide
        ((1000.5, 3000.5), Unit.MS, (0.0, 2.0), False),
        ((1000, 3000), Unit.S, (0.0, 2000.0), False),
        (("2023-11-16T18:15:46Z", "2023-11-16 19:15:47+01:00"), Unit.AUTO, (0.0, 1.0), False),
        (("1000", "3000"), Unit.AUTO, (0.0, 2.0), False),
    ],
)
def test_what_timestamps_count(tmp_path, times, unit, arrivals_s, noted):
    replayed = read(
        write(tmp_path, *({"timestamp": at, "input_length": 20, "output_length": 4} for at in times)), unit=unit
    )
    assert replayed.arrivals_s == pytest.approx(arrivals_s)
    assert any("read as seconds" in note for note in replayed.notes) == noted


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
    replayed = read(write(tmp_path, *reversed(lines)))
    good = [ask for ask in asks if ask.conduct is not Conduct.BAD]
    assert 0 < len(good) < 30
    assert replayed.arrivals_s == tuple((ask.number - good[0].number) / 4 for ask in good)
    assert replayed.notes == (), "every key of ours is known"
    assert [(len(ask.prompt), ask.max_tokens, ask.seed) for ask in replayed.asks] == [
        (len(ask.prompt), ask.max_tokens, ask.seed) for ask in good
    ]
    if texts:
        assert [ask.prompt for ask in replayed.asks] == [ask.prompt for ask in good]


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


def test_all_keys_of_our_own_requests_are_known():
    assert set(RequestLine.__struct_fields__) <= {*trace._READ, *trace._OUTCOMES}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "a", "max_tokens": 1}, "it has neither at_s nor timestamp nor delay"),
        ({"at_s": 2e15, "prompt": "a", "max_tokens": 1}, "at_s is 2e+15; it must lie in -1e15 .. 1e15"),
        ({"at_s": 3e6, "prompt": "a", "max_tokens": 1}, "it came at 3000000 s, more than 31 days away from the others"),
        ({"at_s": [1], "prompt": "a", "max_tokens": 1}, "Expected `float | null`, got `array` - at `$.at_s`"),
        ({"timestamp": "soon", "prompt": "a", "max_tokens": 1}, "timestamp is 'soon', neither a number nor a date"),
        ({"timestamp": "nan", "prompt": "a", "max_tokens": 1}, "timestamp is nan"),
        ({"at_s": 1, "prompt": "a"}, "it has no max_tokens"),
        ({"at_s": 1, "max_tokens": 1}, "it has no prompt_tokens"),
        ({"at_s": 1, "prompt": "", "max_tokens": 1}, "prompt is empty"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 0}, "max_tokens is 0; it must lie in 1 .. 10,000,000"),
        ({"at_s": 1, "prompt_tokens": 0, "max_tokens": 1}, "prompt_tokens is 0; it must lie in 1 .. 10,000,000"),
        (
            {"at_s": 1, "prompt_tokens": 90, "max_tokens": 11},
            "a prompt of 90 tokens and max_tokens 11 need 101; the context is 100",
        ),
        ({"at_s": 1, "prompt": [64], "max_tokens": 1}, "prompt holds token id 64; it must be below the vocabulary, 64"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "temperature": -1}, "temperature is -1.0"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "top_k": -1}, "top_k is -1"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "top_p": 0}, "top_p is 0.0"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "seed": -1}, "seed is -1"),
        ({"at_s": 1, "prompt": "a", "max_tokens": 1, "stop": ["\ud800"]}, "stop holds the lone surrogate U+D800"),
        ("{", "it is no JSON"),
    ],
)
def test_a_bad_line_is_passed_over_by_its_reason(tmp_path, line, problem):
    good = {"at_s": 9, "prompt": "fine", "max_tokens": 1}
    replayed = read(write(tmp_path, good, line, good, good))
    assert [ask.prompt for ask in replayed.asks] == ["fine"] * 3
    (note,) = passed_over(replayed)
    assert note.startswith("1 entry of trace.jsonl was passed over, line 2: ")
    assert problem in note


def test_a_trace_without_requests_is_refused(tmp_path):
    for lines in ([], [{"conduct": "bad", "at_s": 1, "max_tokens": 10**9}]):
        with pytest.raises(ValueError, match="holds no request"):
            read(write(tmp_path, *lines))
    path = write(tmp_path, *({"at_s": at_s, "prompt_tokens": 200, "max_tokens": 1} for at_s in range(3)))
    with pytest.raises(ValueError, match=r"no request that this model can be asked; 3 entries .* the context is 100"):
        read(path)


def test_a_delay_comes_after_the_line_before_of_its_session(tmp_path):
    lines = [
        {"delay": 100, "prompt": "a", "max_tokens": 1},
        {"delay": 100, "prompt": "b", "max_tokens": 1},
        {"timestamp": 5000, "session_id": 1, "prompt": "c", "max_tokens": 1},
        {"timestamp": 6000, "session_id": 2, "prompt": "e", "max_tokens": 1},
        {"delay": 500, "session_id": 1, "prompt": "d", "max_tokens": 1},
    ]
    replayed = read(write(tmp_path, *lines))
    assert "".join(ask.prompt for ask in replayed.asks) == "abcde"
    assert replayed.arrivals_s == pytest.approx((0.0, 0.1, 4.9, 5.4, 5.9))


def test_text_is_counted_where_that_decides(tmp_path):
    """Of a context of 100: 40 Chinese characters are 120 bytes, so they may or may not fit."""
    lines = [{"at_s": number, "prompt": text, "max_tokens": 5} for number, text in enumerate(("short", "天" * 40))]
    recording = read_trace(write(tmp_path, *lines))
    assert recording.texts_to_count(100) == ["天" * 40]
    assert recording.texts_to_count(None) == recording.texts_to_count(127) == []
    for count, kept in ((95, 2), (96, 1)):
        replayed = replay(recording, 0, vocabulary=64, context=100, counts={"天" * 40: count})
        assert len(replayed.asks) == kept


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_a_speed_must_be_one(tmp_path, speed):
    with pytest.raises(ValueError, match=r"speed is .*; it must be above 0"):
        read(write(tmp_path, {"at_s": 0, "prompt": "a", "max_tokens": 1}), speed=speed)


@pytest.mark.parametrize(("limit", "value"), [("MAX_REQUESTS", 2), ("MAX_HELD", 30)])
def test_a_trace_too_large_for_memory_is_refused(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(trace, limit, value)
    path = write(tmp_path, *({"at_s": number, "prompt_tokens": 15, "max_tokens": 1} for number in range(3)))
    with pytest.raises(ValueError, match=r"line 3: is past .* take a part of the trace"):
        read(path)
