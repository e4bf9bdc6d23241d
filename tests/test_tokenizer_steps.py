"""Texts cut into ids in steps: the same ids as in one go, never more than may be, and no text that fits is refused."""

from __future__ import annotations

import functools

import pytest
from fake_pipeline import tiny_tokenizer_bytes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tramontane.cluster import tokenizer as tokenizers
from tramontane.cluster.steps import finish
from tramontane.cluster.tokenizer import Tokenizer, TooLong

KINDS = {
    "byte pairs": {},
    "byte pairs with symbols of users": {"user_defined_symbols": "<|x|>,su"},
    "byte pairs without bytes": {"byte_fallback": False},
    "pieces across spaces": {"split_by_whitespace": False},
    "pieces across spaces, one of a user": {"user_defined_symbols": "a▁b"},
    "spaces as suffixes": {"treat_whitespace_as_suffix": True},
    "unigram": {"model_type": "unigram"},
    "a normalizer that shortens": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no space before": {"add_dummy_prefix": False},
}
CUT = {"byte pairs", "byte pairs with symbols of users", "byte pairs without bytes", "a normalizer that shortens"}
CUT |= {"no space before"}
WORDS = ["summer", "summers ", "su", " ", "  ", "   ", "▁", "\n", "\t", "</s>", "<|x|>", "<|x|", "a b", "eternal"]
WORDS += [
    "\N{EURO SIGN}",
    "\N{GRINNING FACE}",
    "\N{LATIN SMALL LIGATURE FFI}",
    "é",
    "e\N{COMBINING ACUTE ACCENT}",
    "\0",
]
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=40).map("".join)
kinds = st.sampled_from(list(KINDS))


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_bytes(**KINDS[kind]), bos_id=1)


def ids_of(kind: str, text: str, most: int = 1 << 30) -> list[int]:
    return finish(tokenizer_of(kind).encode_in_steps(text, add_bos=True, most=most)).tolist()


@settings(deadline=None, max_examples=500)
@given(kinds, texts, st.integers(0, 12))
@example("byte pairs without bytes", "\N{EURO SIGN} \N{EURO SIGN}", 0)
@example("pieces across spaces, one of a user", "a b a b", 1)
def test_steps_give_the_ids_of_one_go(kind, text, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "STEP_CHARACTERS", step)
        assert ids_of(kind, text) == tokenizer_of(kind).encode(text, add_bos=True)


@settings(deadline=None, max_examples=300)
@given(kinds, texts.map(lambda text: text * 3), st.integers(0, 12))
def test_a_text_is_refused_just_where_it_has_more_ids(kind, text, step):
    tokenizer = tokenizer_of(kind)
    exact = len(tokenizer.encode(text, add_bos=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "STEP_CHARACTERS", step)
        assert len(ids_of(kind, text, most=exact)) == exact
        for most in {exact // 4, exact - 1} - {0}:
            with pytest.raises(TooLong) as refused:
                ids_of(kind, text, most=most)
            assert most < int(refused.value.tokens.removeprefix("at least ")) <= exact


@pytest.mark.parametrize("kind", list(KINDS))
def test_words_are_cut_apart_where_no_piece_can_join_them(kind):
    steps = tokenizer_of(kind).encode_in_steps("so long lives this " * 20_000, add_bos=True, most=1 << 20)
    count = sum(1 for _ in steps)
    assert count == (2 + 6 if kind in CUT else 3)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_cannot_fit_is_refused_at_a_glance_where_nothing_shortens_it(kind):
    steps = tokenizer_of(kind).encode_in_steps("x" * 4000, add_bos=True, most=100)
    if kind in {"byte pairs without bytes", "a normalizer that shortens"}:
        next(steps)
    else:
        with pytest.raises(TooLong, match="at least"):
            next(steps)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("byte pairs without bytes", "\N{EURO SIGN}" * 100_000),
        ("a normalizer that shortens", "a" + " " * 300_000 + "b"),
    ],
)
def test_large_texts_of_few_ids_fit(kind, text):
    assert len(ids_of(kind, text, most=8)) <= 8


def test_counting_stops_at_the_limit():
    steps = tokenizer_of("byte pairs").encode_in_steps("so long lives this " * 100_000, add_bos=True, most=300_000)
    done = 0
    with pytest.raises(TooLong):
        for done, _ in enumerate(steps):  # noqa: B007
            pass
    assert 2 < done < 20
