"""Distributions of lengths: what is drawn, and what their text forms may say."""

from __future__ import annotations

from math import exp
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.client.loadtest.load.lengths import MAX_LENGTH, Fixed, LogNormal, Uniform, parse_lengths
from tramontane.client.loadtest.load.streams import Stream, generator


def draw(lengths, count, seed=1):
    return lengths.sample(generator(seed, Stream.PROMPT_LENGTHS), count)


def test_text_forms():
    assert parse_lengths("128") == Fixed(128)
    assert parse_lengths("uniform:32-512") == Uniform(32, 512)
    assert parse_lengths("lognormal:median=128,sigma=0.8") == LogNormal(128, 0.8)
    assert parse_lengths("lognormal: sigma=1, median=99.5, max=1024, min=4") == LogNormal(99.5, 1, 4, 1024)


def test_words_for_reports():
    assert [str(parse_lengths(text)) for text in ("7", "uniform:1-2", "lognormal:median=128,sigma=0.8,min=4")] == [
        "7",
        "uniform 1 to 2",
        "log-normal with median 128 and sigma 0.8, at least 4",
    ]
    assert str(parse_lengths("lognormal:median=9,sigma=1,max=20")).endswith("sigma 1, at most 20")


def test_fixed_lengths():
    assert draw(Fixed(5), 3) == (5, 5, 5)


def test_uniform_lengths_reach_both_ends_and_no_further():
    drawn = draw(Uniform(3, 6), 4000)
    assert set(drawn) == {3, 4, 5, 6}
    for length in (3, 4, 5, 6):  # 1,000 expected with a standard deviation of 27
        assert abs(drawn.count(length) - 1000) < 5 * 27.4


def test_log_normal_lengths_have_their_median_and_sigma():
    drawn = draw(LogNormal(1000, 0.8), 20_000)
    assert abs(median(drawn) / 1000 - 1) < 0.04
    # A normal variable is below its mean plus one deviation in 84.13 % of draws; that share spreads by 0.26 % here.
    assert abs(sum(length < 1000 * exp(0.8) for length in drawn) / 20_000 - 0.8413) < 5 * 0.0026


def test_log_normal_lengths_beyond_a_limit_become_it():
    drawn = draw(LogNormal(100, 2, 50, 200), 1000)
    assert min(drawn) == 50
    assert max(drawn) == 200
    assert draw(LogNormal(2, 5), 1000)
    assert min(draw(LogNormal(1, 5), 1000)) == 1
    assert max(draw(LogNormal(MAX_LENGTH, 5), 1000)) == MAX_LENGTH


@settings(deadline=None)
@given(
    st.sampled_from([Fixed(3), Uniform(1, 9), Uniform(1, MAX_LENGTH), LogNormal(50, 1.5)]),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 2**40),
)
def test_more_lengths_begin_with_the_fewer(lengths, count, more, seed):
    fewer = draw(lengths, count, seed)
    assert draw(lengths, count + more, seed)[:count] == fewer
    assert all(type(length) is int and lengths.minimum <= length for length in fewer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "length is ''; it must be a whole number"),
        ("12.5", "length is '12.5'"),
        ("0", "length is 0; it must lie in 1 .. 10,000,000"),
        ("-3", "length is -3"),
        ("10000001", "length is 10000001; it must lie in 1 .. 10,000,000"),
        ("zipf:3", "lengths is 'zipf:3'; it must be a number, or begin with uniform: or lognormal:"),
        ("uniform:32", "uniform takes LEAST-GREATEST"),
        ("uniform:a-4", "uniform's least length is 'a'"),
        ("uniform:0-4", "uniform's least length is 0"),
        ("uniform:9-4", "uniform's greatest length is 4; it must lie in 9 .. 10,000,000"),
        ("lognormal:", "lognormal holds ''"),
        ("lognormal:median=128", "lognormal has no sigma"),
        ("lognormal:sigma=1", "lognormal has no median"),
        ("lognormal:median=128,sigma=0", "lognormal's sigma is 0; it must be above 0 and at most 5"),
        ("lognormal:median=128,sigma=9", "lognormal's sigma is 9"),
        ("lognormal:median=nan,sigma=1", "lognormal's median is 'nan'; it must be a number"),
        ("lognormal:median=128,sigma=1,max=64", "lognormal's median is 128; it must lie in 1 .. 64"),
        ("lognormal:median=8,sigma=1,min=9", "lognormal's median is 8; it must lie in 9 .."),
        ("lognormal:median=8,sigma=1,min=9,max=7", "lognormal's max is 7; it must lie in 9 .."),
        ("lognormal:median=8,sigma=1,min=x", "lognormal's min is 'x'"),
        ("lognormal:median=8,median=9,sigma=1", "lognormal holds median twice"),
        ("lognormal:mean=8", "lognormal holds 'mean=8'; it takes median="),
    ],
)
def test_what_is_no_length_is_refused(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_lengths(text)
    assert message in str(caught.value)
