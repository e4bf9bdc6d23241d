"""Sources of prompts: random ids, synthetic text, slices of a file."""

from __future__ import annotations

import pytest

from tramontane.client.loadtest.load.corpus import RandomIds, SyntheticText, TextFile, read_text_file
from tramontane.client.loadtest.load.streams import Stream, generator

LINES = "".join(f"line {number} of the text\n" for number in range(500))


def prompt(source, tokens, number=0, vocabulary=None, seed=1):
    return source.prompt(generator(seed, Stream.PROMPTS, number), tokens, vocabulary)


def test_random_ids_leave_the_special_ones_out():
    ids = prompt(RandomIds(), 2000, vocabulary=10)
    assert len(ids) == 2000
    assert set(ids) == {3, 4, 5, 6, 7, 8, 9}
    assert set(prompt(RandomIds(lowest=0), 2000, vocabulary=5)) == {0, 1, 2, 3, 4}


def test_random_ids_need_a_vocabulary():
    with pytest.raises(ValueError, match="vocabulary is unknown; random token ids need it"):
        prompt(RandomIds(), 4)
    with pytest.raises(ValueError, match="lowest id is 3; it must lie below the vocabulary of 3"):
        prompt(RandomIds(), 4, vocabulary=3)


@pytest.mark.parametrize("source", [SyntheticText(), TextFile(LINES.strip(), "lines.txt"), RandomIds()])
def test_a_prompt_depends_on_its_stream_alone(source):
    assert prompt(source, 20, vocabulary=1024) == prompt(source, 20, vocabulary=1024)
    assert prompt(source, 20, number=1, vocabulary=1024) != prompt(source, 20, vocabulary=1024)
    assert prompt(source, 20, seed=2, vocabulary=1024) != prompt(source, 20, vocabulary=1024)


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("ratio", [0.5, 2.5, 4.0])
def test_synthetic_text_is_as_long_as_its_tokens_are_taken_to_be(tokens, ratio):
    wanted = max(1, round(tokens * ratio))
    for number in range(50):
        text = prompt(SyntheticText(ratio), tokens, number)
        assert wanted - 1 <= len(text) <= wanted  # a blank at the end is left out
        assert text == text.strip()
        assert text.isascii()


def test_slices_begin_with_a_line():
    source = TextFile(LINES.strip(), "lines.txt")
    for number in range(50):
        text = prompt(source, 20, number)
        assert text.startswith("line ")
        assert 78 <= len(text) <= 80
        assert text in LINES


def test_slices_of_long_lines_begin_with_a_word():
    words = " ".join(f"word{number}" for number in range(2000))
    texts = [prompt(TextFile(words, "words.txt"), 10, number) for number in range(50)]
    assert all(text.startswith("word") and text in words for text in texts)
    unbroken = "x" * 1000
    assert prompt(TextFile(unbroken, "x.txt"), 10) == "x" * 40


def test_slices_do_not_begin_with_empty_lines():
    source = TextFile("first\n\n\n\n\n\n\n\n\n\n\n\nlast one", "gaps.txt", 1.0)
    assert {prompt(source, 3, number) for number in range(50)} <= {"fir", "las"}


def test_a_slice_may_be_the_whole_text():
    assert prompt(TextFile("four letters", "f.txt"), 3) == "four letters"
    with pytest.raises(ValueError, match=r"f.txt holds 12 characters; a prompt of 4 tokens needs 16"):
        prompt(TextFile("four letters", "f.txt"), 4)


def test_a_text_file_is_read_without_its_marks(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf\n  some text\n\n")
    assert read_text_file(path) == TextFile("some text", str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is blank; it must hold text"), (b" \n", "is blank"), (b"ab\xff", "is not UTF-8 at byte 2")],
)
def test_a_file_without_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text_file(path)


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_a_ratio_must_be_one(ratio):
    for make in (lambda: SyntheticText(ratio), lambda: TextFile("text", "t.txt", ratio)):
        with pytest.raises(ValueError, match=r"characters a token is .*; it must lie in 0.1 .. 100"):
            make()


def test_words_for_reports():
    assert str(RandomIds()) == "random token ids"
    assert str(SyntheticText(2.5)) == "synthetic text, 2.5 characters a token"
    assert str(TextFile("text", "t.txt")) == "slices of t.txt, 4 characters a token"
