"""Ids into text: characters whole, spaces kept, stop strings left out, whatever way the ids were cut into messages."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import (
    LOG_PROBABILITY,
    tiny_model,
    tiny_tokenizer,
    tiny_tokenizer_bytes,
    tiny_vocabulary,
    vocabulary_of,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tramontane.cluster.completion import Clock, Completion
from tramontane.cluster.messages import EndReason, Finished, Sampling, Stopping
from tramontane.cluster.text import CompletionText, StopStrings, detokenize
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.validation import Request
from tramontane.protos import serving_pb2 as pb
from tramontane.stages.config import EXAMPLE, ModelConfig

KINDS = {
    "as our own": {},
    "as Mistral's": {"normalization_rule_name": "identity", "model_type": "bpe", "user_defined_symbols": "<|x|>"},
    "as SentencePiece's defaults": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "model_type": "unigram",
    },
    "no space before": {"add_dummy_prefix": False},
    "no space before, single ones": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
}
EURO = [4 + byte for byte in "\N{EURO SIGN}".encode()]
"""The byte pieces of one character."""
WORDS = ["summer", " ", "  ", "\n", "<s>", "</s>", "[INST]", "<0x41>", "\N{EURO SIGN}", "\N{GRINNING FACE}", "\0", "▁"]
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.lists(
    st.sampled_from(WORDS), min_size=1, max_size=8
).map("".join)
ids_of_any_kind = st.lists(st.integers(0, 399), max_size=30)
"""Beyond 379 they are spare rows."""
kinds = st.sampled_from(list(KINDS))


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_bytes(**KINDS[kind]), bos_id=1)


@settings(deadline=None)
@given(kinds, texts)
def test_text_comes_back_as_sentencepiece_gives_it_back(kind, text):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_bos=True)
    assert detokenize(vocabulary_of(tokenizer), ids, continuation=False) == tokenizer.decode(ids)
    if kind == "as our own":
        assert detokenize(vocabulary_of(tokenizer), ids, continuation=False) == text.replace("▁", " ")


@settings(deadline=None)
@given(kinds, ids_of_any_kind)
def test_any_ids_that_make_valid_text_give_sentencepiece_s_text(kind, ids):
    tokenizer = tokenizer_of(kind)
    known = [token for token in ids if token < tokenizer.size]
    theirs = tokenizer.decode(known)
    assume("\N{REPLACEMENT CHARACTER}" not in theirs)
    assert detokenize(vocabulary_of(tokenizer), ids, continuation=False) == theirs


@pytest.mark.parametrize("kind", list(KINDS))
def test_spaces_at_the_beginning_go_where_sentencepiece_lets_them_go(kind):
    tokenizer = tokenizer_of(kind)
    bare = next(token for token in tokenizer.spaced if tokenizer.surfaces[token] == b" ")
    spaced = next(token for token in tokenizer.spaced if len(tokenizer.surfaces[token]) > 1)
    byte = next(token for token in range(tokenizer.size) if tokenizer.surfaces[token] == b" " and token != bare)
    letter = next(token for token in range(300, tokenizer.size) if tokenizer.surfaces[token].isalpha())
    vocabulary = vocabulary_of(tokenizer)
    for ids in itertools.product((bare, spaced, byte, letter, 0, 1), repeat=3):
        assert detokenize(vocabulary, ids, continuation=False) == tokenizer.decode(ids), ids


@settings(deadline=None)
@given(kinds, texts, texts)
def test_a_continuation_joins_its_beginning(kind, beginning, rest):
    tokenizer = tokenizer_of(kind)
    head, tail = tokenizer.encode(beginning, add_bos=False), tokenizer.encode(rest, add_bos=False)
    assume(tokenizer.decode(head))
    vocabulary = vocabulary_of(tokenizer)
    joined = detokenize(vocabulary, head, continuation=False) + detokenize(vocabulary, tail, continuation=True)
    assert joined == tokenizer.decode(head + tail)


def test_a_continuation_keeps_its_space_and_a_beginning_does_not():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("summer", add_bos=False)
    assert detokenize(vocabulary_of(tokenizer), ids, continuation=True) == " summer"
    assert detokenize(vocabulary_of(tokenizer), ids, continuation=False) == "summer"


@settings(deadline=None)
@given(texts)
def test_user_text_never_becomes_a_control_token(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_bos=True)
    assert ids[0] == tokenizer.bos_id == 1
    assert not {1, 2, 3} & set(ids[1:]), "an id of <s>, </s> or [INST]"


def test_the_embedded_model_s_tokenizer(embedded_dir):
    tokenizer = Tokenizer.load(embedded_dir, ModelConfig.load(embedded_dir))
    assert tokenizer is not None
    text = "ROMEO:\nBut soft! <s> what light </s> \N{EURO SIGN}  breaks?"
    ids = tokenizer.encode(text, add_bos=True)
    assert [ids.count(special) for special in (tokenizer.bos_id, tokenizer.eos_id)] == [1, 0]
    assert detokenize(vocabulary_of(tokenizer), ids, continuation=False) == tokenizer.decode(ids) == text


def test_a_character_waits_for_its_last_byte():
    text = CompletionText(tiny_vocabulary(), stop_strings=(), stop_ids=(2,), min_tokens=0)
    assert [text.push(token) for token in EURO] == ["", "", "\N{EURO SIGN}"]


def test_a_cut_character_becomes_a_replacement_character_at_the_end():
    text = CompletionText(tiny_vocabulary(), stop_strings=(), stop_ids=(2,), min_tokens=0)
    assert [text.push(token) for token in [*EURO[:2], 2]] == ["", "", ""]
    assert text.finish() == "\N{REPLACEMENT CHARACTER}"


def test_control_ids_and_spare_rows_print_nothing():
    assert detokenize(tiny_vocabulary(), [1, 2, 3, 399], continuation=True) == ""


def test_the_text_of_a_stop_id_is_left_out():
    tokenizer = tiny_tokenizer()
    *before, last = tokenizer.encode("a summer", add_bos=False)
    vocabulary = vocabulary_of(tokenizer)
    text = CompletionText(vocabulary, stop_strings=(), stop_ids=(last,), min_tokens=0)
    assert "".join(map(text.push, [*before, last])) + text.finish() == detokenize(vocabulary, before, continuation=True)


def test_the_example_of_the_docstring():
    stops = StopStrings(["END", "\n\n"])
    assert [stops.push(text) for text in ["a\n", "b", "EN", "D"]] == ["a", "\nb", "", ""]
    assert stops.found


def dumb_completion(pieces: list[str], strings: list[str], min_tokens: int) -> tuple[str, int | None]:
    """Read character by character: the text before the first stop string to be complete, and its token's offset."""
    text = ""
    for offset, piece in enumerate(pieces):
        for character in piece:
            text += character
            ends = [string for string in strings if text.endswith(string)]
            if ends and offset >= min_tokens:
                return text[: len(text) - max(map(len, ends))], offset
    return text, None


@settings(deadline=None)
@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 6),
)
@example(pieces=["ab", "x"], strings=["b", "abc"], min_tokens=1)
@example(pieces=["ab", "c"], strings=["b", "abc"], min_tokens=1)
def test_stop_strings_are_found_as_by_reading_character_by_character(pieces, strings, min_tokens):
    expected, end = dumb_completion(pieces, strings, min_tokens)
    stops, sent = StopStrings(strings), ""
    for offset, piece in enumerate(pieces):
        sent += stops.push(piece, match=offset >= min_tokens)
        assert expected.startswith(sent), "text was sent that belongs to a stop string"
        assert stops.found == (offset == end)
        if stops.found:
            break
        so_far = "".join(pieces[: offset + 1])
        assert len(so_far) - len(sent) < max(map(len, strings), default=1), (
            "more was kept back than a stop string needs"
        )
    assert sent + ("" if stops.found else stops.finish()) == expected


def test_a_stop_string_counts_from_the_token_at_min_tokens_on():
    tokenizer, vocabulary = tiny_tokenizer(), tiny_vocabulary()
    once = len(tokenizer.encode("one two,", add_bos=False))
    ids = tokenizer.encode("one two, one two,", add_bos=False)
    assert ids[:once] == tokenizer.encode("one two,", add_bos=False)
    for min_tokens, expected in ((once - 1, " one "), (once, " one two, one ")):
        text, sent = CompletionText(vocabulary, stop_strings=("two,",), stop_ids=(), min_tokens=min_tokens), ""
        while not text.stopped:
            sent += text.push(ids[text.tokens])
        assert sent + text.finish() == expected


def request_of(strings: tuple[str, ...], min_tokens: int) -> Request:
    return Request(
        request_id="r",
        tokens=np.array([1], np.int32),
        sampling=Sampling(temperature=0.0, seed=1),
        stopping=Stopping(max_tokens=100, min_tokens=min_tokens, token_ids=(2,)),
        stop_strings=strings,
    )


def run_cut(ids: list[int], cuts: set[int], request: Request) -> tuple[str, list[int], pb.FinishReason]:
    """One completion whose events are taken at `cuts` and at the end."""
    stopped: list[bool] = []
    clock = Clock(now=lambda: 0.0, arrived_s=0.0, submitted_s=0.0)
    model = tiny_model(tokenizer=tiny_tokenizer())
    completion = Completion(request, model, clock, stop=lambda: stopped.append(True))
    events = []
    for offset, token in enumerate(ids):
        if offset in cuts:
            events.append(completion.take())
        completion.put(offset, token, LOG_PROBABILITY)
        if stopped:
            break
    else:
        completion.end(
            Finished(request=0, reason=EndReason.LENGTH, detail="", queue_ms=0.0, prefill_ms=0.0, decode_ms=0.0)
        )
    events.append(completion.take())
    assert completion.over
    text, out = "", []
    for event in events:
        if event.delta.token_ids:
            assert event.delta.offset == len(out)
        text += event.delta.text
        out += event.delta.token_ids
    assert [event.HasField("finished") for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].finished.usage.completion_tokens == len(out)
    return text, out, events[-1].finished.reason


@settings(deadline=None)
@given(
    texts.map(lambda text: tiny_tokenizer().encode(text, add_bos=False)) | st.lists(st.integers(3, 399), min_size=1),
    st.sets(st.integers(1, 29)),
    st.lists(st.sampled_from(["summer", " ", "m", "me", "\n", "\N{EURO SIGN}", "er"]), max_size=3).map(tuple),
    st.integers(0, 5),
)
def test_any_cutting_into_messages_gives_the_same_completion(ids, cuts, strings, min_tokens):
    assume(ids)
    request = request_of(strings, min_tokens)
    whole = run_cut(ids, set(), request)
    assert run_cut(ids, cuts, request) == run_cut(ids, set(range(1, len(ids))), request) == whole
    text, out, reason = whole
    everything = detokenize(tiny_vocabulary(), out, continuation=True)
    if reason == pb.LENGTH:
        assert (text, out) == (everything, ids)
    else:
        assert reason == pb.STOP_STRING
        assert everything.startswith(text)
        assert any(everything[len(text) :].startswith(string) for string in strings)


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_bytes())


def test_the_first_end_of_a_completion_counts():
    clock = Clock(now=lambda: 0.0, arrived_s=0.0, submitted_s=0.0)
    completion = Completion(request_of((), 0), tiny_model(), clock, stop=lambda: None)
    completion.put(0, 300, LOG_PROBABILITY)
    for reason in (EndReason.LENGTH, EndReason.BROKEN):
        completion.end(Finished(request=0, reason=reason, detail="", queue_ms=0.0, prefill_ms=0.0, decode_ms=0.0))
    assert completion.take().finished.reason == pb.LENGTH


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    size = tiny_tokenizer().size
    assert Tokenizer.load(tmp_path, replace(EXAMPLE, vocab=size)) is not None
    with pytest.raises(ValueError, match=rf"model: has {size} ids, .* {size - 1} rows \(tensor model\.embed_tokens"):
        Tokenizer.load(tmp_path, replace(EXAMPLE, vocab=size - 1))


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00not a model")
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path, EXAMPLE)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert Tokenizer.load(tmp_path, EXAMPLE) is None


def test_the_configuration_s_bos_goes_before_the_tokenizer_s(tmp_path):
    write_tokenizer(tmp_path)
    config = replace(EXAMPLE, vocab=400, bos_id=None)
    for bos_id, expected in ((None, 1), (3, 3)):
        tokenizer = Tokenizer.load(tmp_path, replace(config, bos_id=bos_id))
        assert tokenizer is not None
        assert tokenizer.encode("a", add_bos=True)[0] == expected
