"""Workloads: request k is the same whatever surrounds it, fits the model, and misbehaves where it was drawn to."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.client.loadtest.load import asks as asks_module
from tramontane.client.loadtest.load.asks import fitted_to, make_asks, texts_to_count
from tramontane.client.loadtest.load.corpus import RandomIds, SyntheticText, TextFile
from tramontane.client.loadtest.load.fitting import fitted
from tramontane.client.loadtest.load.lengths import Fixed, LogNormal, Uniform
from tramontane.client.loadtest.load.prompt_file import Given, PromptFile
from tramontane.client.loadtest.load.workload import Workload, describe, notes
from tramontane.client.loadtest.plan import Ask, Conduct

VOCABULARY = 64
CONTEXT = 200
EVERY = {"cancel": 0.2, "slow": 0.1, "churn": 0.1, "bad": 0.2}
FILE = PromptFile(
    (Given("one", 2, 10), Given("two", 2, None), Given("three", 3, 30), Given("far too long", 195, 30)), "f.jsonl"
)
TEXT = TextFile("some words of a text " * 200, "t.txt")
WORKLOADS = (
    Workload(prompt=Uniform(1, 50), completion=Uniform(1, 60)),
    Workload(prompt=LogNormal(40, 1.5), completion=LogNormal(30, 1.5), misbehave=EVERY),
    Workload(prompt=Fixed(5), prefixes=3, prefix_tokens=20, distinct=7),
    Workload(source=SyntheticText(), prompt=Uniform(1, 20), prefixes=2, prefix_tokens=9),
    Workload(source=TEXT, prompt=LogNormal(9, 0.5), misbehave={"bad": 0.5}),
    Workload(source=FILE, distinct=5, prefixes=2, prefix_tokens=9),
    Workload(source=FILE, completion=LogNormal(30, 2)),
)
any_workload = st.sampled_from(WORKLOADS)
seeds = st.integers(0, 2**40)


def asks_of(workload, count=40, seed=1, *, vocabulary=VOCABULARY, context=CONTEXT):
    return make_asks(workload, count, seed, vocabulary=vocabulary, context=context)


@settings(max_examples=150, deadline=None)
@given(any_workload, st.integers(0, 30), st.integers(0, 30), seeds)
def test_a_request_does_not_depend_on_how_many_there_are(workload, count, more, seed):
    """So the levels of a sweep share their requests, and workers that slice the plan get what one would."""
    asks = asks_of(workload, count + more, seed)
    assert asks_of(workload, count, seed) == asks[:count]
    assert [ask.number for ask in asks] == list(range(count + more))
    assert sorted((*asks[0::2], *asks[1::2]), key=lambda ask: ask.number) == list(asks)


@settings(deadline=None)
@given(any_workload, seeds)
def test_misbehaviour_leaves_the_others_as_they_are(workload, seed):
    well = asks_of(replace(workload, misbehave={}), 30, seed)
    for ask, behaved in zip(asks_of(replace(workload, misbehave=EVERY), 30, seed), well, strict=True):
        if ask.conduct is not Conduct.BAD:
            assert replace(ask, conduct=Conduct.NORMAL, cancel_after=0, pause_s=0.0) == behaved


@settings(deadline=None)
@given(st.sampled_from(WORKLOADS[:3]), st.integers(60, 200) | st.none(), seeds)
def test_prompt_and_completion_fit_the_context(workload, context, seed):
    try:
        asks = asks_of(replace(workload, misbehave={}), 30, seed, context=context)
    except ValueError as error:
        assert "the context is" in str(error)  # noqa: PT017  (either is right; the message is what matters)
        return
    for ask in asks:
        assert len(ask.prompt) >= 1
        assert ask.max_tokens >= 1
        assert all(3 <= token_id < VOCABULARY for token_id in ask.prompt)
        assert context is None or len(ask.prompt) + ask.max_tokens <= context


def test_seeds_decide_everything():
    workload = WORKLOADS[1]
    assert asks_of(workload, seed=1) == asks_of(workload, seed=1)
    first, other = asks_of(workload, seed=1), asks_of(workload, seed=2)
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True) if a.prompt and len(a.prompt) > 3)
    assert len({ask.seed for ask in first}) == len(first)
    assert all(0 <= ask.seed < 2**31 for ask in first)


def test_options_reach_the_requests():
    workload = Workload(temperature=0.7, top_k=5, top_p=0.9, stop=("\n",), completion=Fixed(3), ignore_eos=False)
    ask = asks_of(workload, 1)[0]
    assert (ask.temperature, ask.top_k, ask.top_p, ask.stop) == (0.7, 5, 0.9, ("\n",))
    assert (ask.max_tokens, ask.ignore_eos, ask.conduct, len(ask.prompt)) == (3, False, Conduct.NORMAL, 128)


def test_lengths_that_were_asked_for_are_refused_where_they_do_not_fit():
    fits = Workload(prompt=Uniform(1, 100), completion=Fixed(80), prefixes=1, prefix_tokens=20)
    assert asks_of(fits)
    with pytest.raises(ValueError, match="20 of prefix and BOS, and completions of 81, need 201 together; the context"):
        asks_of(replace(fits, completion=Fixed(81)))
    with pytest.raises(ValueError, match="after 1 of prefix and BOS, and completions of 50, need 201"):
        asks_of(Workload(source=SyntheticText(), prompt=Fixed(150), completion=Fixed(50)))
    with pytest.raises(ValueError, match="need 221 together"):
        asks_of(Workload(prompt=LogNormal(10, 1, maximum=100), completion=LogNormal(10, 1, maximum=121)))


def test_open_tails_are_cut():
    closed, far = LogNormal(10, 1, maximum=50), LogNormal(60, 1)
    drawn = [(950, 128), (5, 5), (120, 900)]
    assert fitted(drawn[:2], LogNormal(100, 1), Fixed(128), 0, 1000) == [(872, 128), (5, 5)]
    assert fitted(drawn, far, far, 10, 210) == [(140, 60), (5, 5), (120, 80)]
    assert fitted(drawn, far, closed, 10, 210) == [(150, 50), (5, 5), (120, 80)]
    assert fitted([(30, 500)], Fixed(30), far, 0, 50) == [(30, 20)]


def test_prefixes_are_shared_in_turn():
    asks = asks_of(Workload(prompt=Fixed(4), completion=Fixed(1), prefixes=3, prefix_tokens=16), 9)
    beginnings = [ask.prompt[:16] for ask in asks]
    assert len(set(beginnings)) == 3
    assert beginnings[:3] * 3 == beginnings
    assert all(len(ask.prompt) == 20 for ask in asks)
    assert len({ask.prompt[16:] for ask in asks}) == 9
    texts = [ask.prompt for ask in asks_of(Workload(source=FILE, prefixes=1, prefix_tokens=16), 3)]
    assert {text.rpartition(" ")[2] for text in texts} == {"one", "two", "three"}
    assert len({text.rpartition(" ")[0] for text in texts}) == 1


def test_distinct_requests_repeat_with_their_options_and_seed():
    asks = asks_of(Workload(distinct=3, prompt=Uniform(1, 9), completion=Uniform(1, 9)), 8)
    assert [replace(ask, number=0) for ask in asks[:3]] * 2 == [replace(ask, number=0) for ask in asks[3:]] + [
        replace(asks[2], number=0)
    ]
    assert asks[:3] == asks_of(Workload(prompt=Uniform(1, 9), completion=Uniform(1, 9)), 3)


def test_a_files_prompts_come_in_a_drawn_order_over_and_over():
    asks = asks_of(Workload(source=FILE), 6)
    by_prompt = {ask.prompt: (ask.max_tokens, ask.ignore_eos) for ask in asks}
    assert by_prompt == {"one": (10, True), "two": (128, False), "three": (30, True)}  # the long one does not fit
    assert [ask.prompt for ask in asks[:3]] == [ask.prompt for ask in asks[3:]]
    orders = {tuple(ask.prompt for ask in asks_of(Workload(source=FILE), 3, seed)) for seed in range(50)}
    assert len(orders) == 6


def test_a_files_completions_may_be_told():
    asks = asks_of(Workload(source=FILE, completion=Fixed(5)), 8)
    assert {ask.prompt: (ask.max_tokens, ask.ignore_eos) for ask in asks} == dict.fromkeys(
        ("one", "two", "three", "far too long"), (5, True)
    )
    for ask in asks_of(Workload(source=FILE, completion=LogNormal(100, 3)), 50):
        assert ask.max_tokens <= CONTEXT - next(given.tokens for given in FILE.prompts if given.prompt == ask.prompt)


def test_a_file_that_cannot_serve_is_refused():
    with pytest.raises(ValueError, match=r"f.jsonl holds no prompt that .*; 4 entries .*need 12; the context is 8"):
        asks_of(Workload(source=FILE), context=8)
    ids = PromptFile((Given((1, 64), 2, 5),), "ids.jsonl")
    with pytest.raises(ValueError, match=r"prompt holds token id 64; it must be below the vocabulary, 64"):
        asks_of(Workload(source=ids))
    assert asks_of(Workload(source=ids), 1, vocabulary=None)[0].prompt == (1, 64)
    with pytest.raises(ValueError, match=r"prompt is token ids, and prefixes go before text only"):
        asks_of(Workload(source=ids, prefixes=2, prefix_tokens=3), vocabulary=65)
    with pytest.raises(ValueError, match=r"stop holds the lone surrogate U\+DCFF at character 1"):
        Workload(stop=("ok", "a\udcff"))


def test_prompts_that_cannot_be_asked_are_passed_over():
    mixed = PromptFile((*FILE.prompts[:2], Given((1, 64), 2, 5, line=9), Given((1, 63), 2, 5)), "mixed.jsonl")
    workload = fitted_to(Workload(source=mixed), 1, vocabulary=64, context=CONTEXT)
    assert [given.prompt for given in workload.source.prompts] == ["one", "two", (1, 63)]
    assert notes(workload) == (
        "1 entry of mixed.jsonl was passed over, line 9: prompt holds token id 64; it must be below the vocabulary, 64",
    )
    assert len({ask.prompt for ask in asks_of(Workload(source=mixed), 9)}) == 3
    with_prefixes = Workload(source=mixed, prefixes=1, prefix_tokens=3)
    assert all(isinstance(ask.prompt, str) for ask in asks_of(with_prefixes, 9))


CHINESE = "天地玄黃" * 10  # 40 characters, 120 bytes


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [CHINESE]),  # 120 bytes, BOS, blank and 128 tokens out are more than 200, and the short ones fit anyhow
        ({"completion": Fixed(78)}, []),
        ({"completion": Fixed(79)}, [CHINESE]),
        ({"completion": LogNormal(5, 1)}, ["one", "two", CHINESE]),  # what is left of the context hangs on it
        ({"completion": Fixed(40), "prefixes": 1, "prefix_tokens": 10}, [CHINESE, "prefix"]),
    ],
)
def test_what_must_be_counted_before_it_is_known_to_fit(changes, wanted):
    file = PromptFile(
        (Given("one", 2, 10), Given("two", 2, 10), Given(CHINESE, 41, None), Given((5,), 1, 99)), "f.jsonl"
    )
    texts = texts_to_count(Workload(source=file, **changes), 1, CONTEXT)
    assert [text if text in ("one", "two", CHINESE) else "prefix" for text in texts] == wanted
    assert texts_to_count(Workload(source=file, **changes), 1, None) == []


def test_a_count_decides_what_fits():
    file = PromptFile((Given("one", 2, 10), Given(CHINESE, 41, 79)), "f.jsonl")
    workload = Workload(source=file)
    for count, prompts in ((121, {"one", CHINESE}), (122, {"one"})):
        asks = make_asks(workload, 8, 1, vocabulary=VOCABULARY, context=CONTEXT, counts={CHINESE: count})
        assert {ask.prompt for ask in asks} == prompts
    open_tail = replace(workload, completion=LogNormal(500, 0.1))
    asks = make_asks(open_tail, 8, 1, vocabulary=VOCABULARY, context=CONTEXT, counts={CHINESE: 150, "one": 3})
    assert {(ask.prompt, ask.max_tokens) for ask in asks} == {("one", 197), (CHINESE, 50)}


def test_shares_are_kept():
    counts = Counter(ask.conduct for ask in asks_of(Workload(completion=Fixed(8), misbehave=EVERY), 4000))
    for conduct, share in {**EVERY, "normal": 0.4}.items():
        assert abs(counts[Conduct(conduct)] - 4000 * share) < 5 * sqrt(4000 * share * (1 - share))


def test_all_may_misbehave():
    assert {ask.conduct for ask in asks_of(Workload(completion=Fixed(8), misbehave={"slow": 1.0}))} == {Conduct.SLOW}
    thirds = {"cancel": 1 / 3, "slow": 1 / 3, "churn": 1 / 3}
    assert Conduct.NORMAL not in {ask.conduct for ask in asks_of(Workload(completion=Fixed(8), misbehave=thirds), 999)}


def test_cancels_leave_before_the_end_and_slow_readers_pause():
    cancels = asks_of(Workload(completion=Fixed(4), misbehave={"cancel": 1.0}), 400)
    assert {ask.cancel_after for ask in cancels} == {0, 1, 2, 3}
    slow = asks_of(Workload(completion=Fixed(4), misbehave={"slow": 1.0}, pause_s=0.2))
    assert {ask.pause_s for ask in slow} == {0.2}


def is_wrong(ask: Ask, *, context: int, vocabulary: int) -> list[str]:
    """Everything that a server must refuse in it."""
    wrong = {
        "max_tokens": len(ask.prompt) + ask.max_tokens > context,
        "temperature": ask.temperature < 0,
        "top_p": ask.top_p is not None and not 0 < ask.top_p <= 1,
        "id": isinstance(ask.prompt, tuple) and any(token_id >= vocabulary for token_id in ask.prompt),
        "empty": not ask.prompt,
    }
    return [name for name, holds in wrong.items() if holds]


@pytest.mark.parametrize("source", [RandomIds(), SyntheticText(characters_per_token=1)])
def test_bad_requests_are_wrong_in_one_way_each_in_turn(source):
    asks = asks_of(Workload(source=source, completion=Fixed(8), misbehave={"bad": 1.0}), 10)
    kinds = [is_wrong(ask, context=CONTEXT, vocabulary=VOCABULARY) for ask in asks]
    assert kinds == [["max_tokens"], ["temperature"], ["top_p"], ["id"], ["empty"]] * 2
    assert {type(ask.prompt) for ask in asks[4::5]} == {type(asks[0].prompt)}


def test_bad_requests_to_a_server_that_tells_little():
    workload = Workload(source=SyntheticText(), completion=Fixed(8), misbehave={"bad": 1.0})
    asks = asks_of(workload, 6, vocabulary=None, context=None)
    kinds = [is_wrong(ask, context=10**9, vocabulary=0) for ask in asks]
    assert kinds == [["max_tokens"], ["temperature"], ["top_p"]] * 2
    assert all(ask.max_tokens < 2**31 for ask in asks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Workload(misbehave={"shout": 0.1}),
            "misbehave holds 'shout'; it must be one of cancel, slow, churn, bad",
        ),
        (lambda: Workload(misbehave={"normal": 0.1}), "misbehave holds 'normal'"),
        (lambda: Workload(misbehave={"bad": -0.1}), "misbehave's share of bad is -0.1; it must lie in 0 .. 1"),
        (lambda: Workload(misbehave={"bad": float("nan")}), "share of bad is nan"),
        (lambda: Workload(misbehave={"bad": 0.6, "slow": 0.6}), "add up to 1.2; their sum must be at most 1"),
        (lambda: Workload(distinct=0), "distinct is 0; it must be at least 1"),
        (lambda: Workload(prefixes=2), "prefixes is 2 and prefix_tokens 0; both must be above 0, or both 0"),
        (lambda: Workload(prefix_tokens=2), "prefixes is 0 and prefix_tokens 2"),
        (lambda: Workload(prefixes=-1, prefix_tokens=2), "prefixes is -1"),
        (lambda: Workload(pause_s=float("nan")), "pause_s is nan; it must lie in 0 .. 3,600"),
        (lambda: asks_of(Workload(), -1), "requests are -1; they must be 0 .. 1,000,000"),
        (lambda: asks_of(Workload(), 1, seed=-1), "seed is -1"),
        (lambda: asks_of(Workload(), 1, vocabulary=None, context=None), "vocabulary is unknown"),
    ],
)
def test_what_makes_no_workload_is_refused(make, message):
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    assert message in str(caught.value)


def test_a_plan_too_large_for_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(asks_module, "MAX_HELD", 1000)
    workload = Workload(prompt=Fixed(10), completion=Fixed(1), prefixes=1, prefix_tokens=10)
    assert asks_of(workload, 50)
    with pytest.raises(
        ValueError, match="prompts hold 1,020 tokens together; they must be at most 1,000: ask for fewer"
    ):
        asks_of(workload, 51)
    assert asks_of(replace(workload, distinct=50), 51)


def test_words_for_reports():
    cut = Workload(prompt=LogNormal(40, 1.5), completion=LogNormal(30, 1.5), distinct=1000, temperature=0.5)
    assert describe(cut) == (
        "random token ids; prompts log-normal with median 40 and sigma 1.5 tokens; completions log-normal with median "
        "30 and sigma 1.5 tokens; prompts cut to leave the context room for the completion; completions cut where the "
        "context ends; 1,000 different requests, repeated; temperature 0.5"
    )
    assert describe(Workload(source=FILE)) == (
        "4 prompts of f.jsonl, without those that do not fit the context; completions as long as the file says, else "
        "128 tokens"
    )
    assert describe(Workload(completion=Fixed(3), misbehave={"bad": 0.05})).endswith("completions 3 tokens; bad 5 %")
