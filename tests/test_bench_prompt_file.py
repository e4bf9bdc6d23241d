"""Prompts from files: their layouts, what is wrong with a line, and files larger than what is held of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.client.loadtest.load import entries, prompt_file
from tramontane.client.loadtest.load.entries import read_entries
from tramontane.client.loadtest.load.passed_over import MAX_REASONS, Tally
from tramontane.client.loadtest.load.prompt_file import Given, read_prompt_file

TALK = [{"from": "human", "value": "Why is it wet?"}, {"from": "gpt", "value": "Because it rains."}]


def write(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def read(tmp_path, text):
    return read_prompt_file(write(tmp_path, text))


def passed_over(file):
    return [(reason.line, reason.entries, reason.problem) for reason in file.passed_over.reasons]


def test_layouts_of_lines(tmp_path):
    path = write(
        tmp_path,
        lines({"prompt": "Once upon a time", "max_tokens": 64}, {"prompt": [12, 7, 99], "id": 5})
        + "\n"
        + lines({"text": "A text"}, {"conversations": TALK, "id": "x"}),
    )
    # 16 characters are 4 tokens, and one for the BOS; ids are exact; the answer's 17 characters are 4 tokens.
    assert read_prompt_file(path).prompts == (
        Given("Once upon a time", 5, 64, 1),
        Given((12, 7, 99), 3, None, 2),
        Given("A text", 3, None, 4),
        Given("Why is it wet?", 5, 4, 5),
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_read_as_its_lines_are(tmp_path, indent):
    values = [{"conversations": TALK}, {"prompt": '}]{["', "max_tokens": 3}]
    given = [each._replace(line=0) for each in read(tmp_path, lines(*values)).prompts]
    assert [each._replace(line=0) for each in read(tmp_path, json.dumps(values, indent=indent)).prompts] == given


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "output_tokens", "output_length", "expected_output_len", "max_completion_tokens"),
        *("max_new_tokens", "OutputTokens", "Output Length", "output-tokens"),
    ],
)
def test_others_names_for_max_tokens(tmp_path, name):
    file = read(tmp_path, lines({"prompt": "one", name: 10}))
    assert (file.prompts[0].max_tokens, file.notes) == (10, ())


def test_of_two_names_in_one_entry_ours_counts_and_the_other_is_named(tmp_path):
    file = read(tmp_path, lines({"output_len": 9, "text": "b", "max_tokens": 10, "prompt": "a"}))
    assert (file.prompts[0].prompt, file.prompts[0].max_tokens) == ("a", 10)
    assert file.notes == ("keys of prompts.jsonl that were not read: 'output_len', 'text'",)
    assert read(tmp_path, lines({"prompt": None, "text": "b", "max_tokens": None, "output_len": 9})).prompts[0][:3] == (
        "b",
        2,
        9,
    )


def test_many_keys_are_named_in_part(tmp_path):
    file = read(tmp_path, lines(*({"prompt": "a", f"key{number}" + "x" * 99: 1} for number in range(20))))
    (note,) = file.notes
    assert note.startswith("keys of prompts.jsonl that were not read: 'key0xxx")
    assert note.endswith("and others")
    assert len(note) < 700


def test_the_first_question_and_its_answer(tmp_path):
    talk = [{"from": "system", "value": "Be kind."}, *TALK, {"from": "human", "value": "Why does it rain?"}]
    assert read(tmp_path, lines({"conversations": talk})).prompts[0].prompt == "Why is it wet?"
    roles = [{"role": each["from"].replace("gpt", "assistant"), "content": each["value"]} for each in talk]
    for key in ("conversations", "messages"):
        assert read(tmp_path, lines({key: roles})).prompts[0][:3] == ("Why is it wet?", 5, 4)


def test_conversations_without_an_exchange_are_passed_over_and_counted(tmp_path):
    empty = [[], TALK[:1], TALK[1:], [TALK[0], TALK[0]], [{"from": "human", "value": " "}, TALK[1]], "talk", [None]]
    file = read(tmp_path, lines(*({"conversations": talk} for talk in [*empty, TALK])))
    assert passed_over(file) == [(1, 7, "the conversation has no question with an answer")]
    assert str(file) == f"1 prompt of {file.name}"
    with pytest.raises(
        ValueError, match=r"holds no prompt; 7 entries of .* the first in line 1: the conversation has no"
    ):
        read(tmp_path, lines(*({"conversations": talk} for talk in empty)))
    assert read(tmp_path, lines({"conversations": TALK[:1], "max_tokens": 3})).prompts[0].max_tokens == 3


def test_a_large_file_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_file, "MAX_PROMPTS", 3)
    path = write(tmp_path, lines(*({"text": f"text {number}"} for number in range(5))) + "no json, and never read")
    file = read_prompt_file(path)
    assert [given.prompt for given in file.prompts] == ["text 0", "text 1", "text 2"]
    assert "was read up to line 4, where the limit of 3 prompts" in file.notes[0]
    monkeypatch.setattr(prompt_file, "MAX_CHARACTERS", 17)
    file = read_prompt_file(path)
    assert len(file.prompts) == 2
    assert "line 3, where the limit of 3 prompts or 17 characters" in file.notes[0]


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ("{", "it is no JSON: Expecting property name"),
        ('{"text": "a"} x', "it is no JSON: Extra data"),
        ("[1]", "it is no JSON object"),
        ("7", "it is no JSON object"),
        ('{"text": NaN}', "it has neither prompt"),
        ('{"prompt": 7}', "prompt is neither text nor a list of token ids"),
        ('{"prompt": [1, "a"]}', "prompt holds 'a'; a token id lies in 0 .. 2^32 - 1"),
        ('{"prompt": [1, -1]}', "prompt holds -1; a token id lies in 0 .. 2^32 - 1"),
        ('{"prompt": [true]}', "prompt holds True"),
        ('{"prompt": ""}', "prompt is empty; it needs at least 1 token"),
        ('{"prompt": []}', "prompt is empty"),
        ('{"question": "a"}', "it has neither prompt nor text nor a conversation"),
        ('{"text": "a", "max_tokens": 0}', "max_tokens is 0; it must lie in 1 .. 10,000,000"),
        ('{"text": "a", "max_tokens": 1' + "0" * 5000 + "}", "got `float`"),
        ('{"text": "a", "output_tokens": 1.5}', "Expected `int | null`, got `float` - at `$.output_tokens`"),
        ('{"conversations": [{"value": "a"}]}', "the conversation has no question"),
        ('{"text": "' + "\\u" + 'd800"}', "prompt holds the lone surrogate U+D800 at character 0"),
        ("[" * 100_000, "it is nested too deep"),
        (b'{"text": "\xff"}', "prompt holds the lone surrogate U+DCFF"),
    ],
)
def test_a_bad_line_is_passed_over_by_its_reason(tmp_path, second, problem):
    second = second if isinstance(second, bytes) else second.encode()
    file = read(tmp_path, b'{"text": "fine"}\n' + second + b'\n{"text": "fine too"}\n')
    assert [given.prompt for given in file.prompts] == ["fine", "fine too"]
    ((line, entries, said),) = passed_over(file)
    assert (line, entries) == (2, 1)
    assert problem in said
    with pytest.raises(
        ValueError, match=r"holds no prompt; 1 entry of prompts.jsonl was passed over, line 1: "
    ) as caught:
        read(tmp_path, second)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "prompts", "line", "problem"),
    [
        ('[{"text": "a"}\n {"text": "b"}]', "a", 2, "after an entry comes '{', where , or ] is due"),
        ('[{"text": "a"}\n', "a", 2, "after an entry comes 'no more', where , or ] is due"),
        ('[{"text": "a"},\n7, {"text": "b"}]', "ab", 2, "it is no JSON object"),
        ('[{"text": "a"},\n12345]', "a", 2, "it is no JSON object"),
        ('[{"text": "a"},\n]', "a", 2, "Expecting value"),
        ('[{"text": "a"},\n{"text":\n"b" "c"}]', "a", 3, "Expecting ',' delimiter"),
        ('[{"text": "a"},\n{"text":\n NaN}, {"text": "b"}]', "ab", 2, "it has neither prompt"),
        ('[{"text": "a"}]\nmore', "a", 2, "more comes after the array"),
        ('[{"text": "' + "\\u" + 'd800"}, {"text": "b"}]', "b", 1, "prompt holds the lone surrogate U+D800"),
        ('[{"text": "a"}, {"text": ' + "[" * 100_000, "a", 1, "nested too deep"),
    ],
)
def test_a_bad_entry_of_an_array_is_passed_over_by_its_reason(tmp_path, text, prompts, line, problem):
    file = read(tmp_path, text)
    assert "".join(given.prompt for given in file.prompts) == prompts
    ((at, entries, said),) = passed_over(file)
    assert (at, entries) == (line, 1)
    assert problem in said


def test_reasons_that_differ_in_numbers_are_one_and_many_are_told_together(tmp_path):
    bad = [{"text": "a", "max_tokens": 0}, {"text": "a", "max_tokens": -5}]
    file = read(tmp_path, lines({"text": "a"}, *bad))
    assert passed_over(file) == [(2, 2, "max_tokens is 0; it must lie in 1 .. 10,000,000")]
    names = [{"prompt": [name]} for name in "abcdefghijklmnopqrst"]
    file = read(tmp_path, lines({"text": "a"}, *names))
    assert file.passed_over.count == 20
    assert len(file.passed_over.reasons) == MAX_REASONS + 1
    assert passed_over(file)[-1][:2] == (14, 8)
    assert passed_over(file)[-1][2].startswith("other reasons; prompt holds 'm'")


def test_an_empty_file_and_an_empty_array_hold_no_prompt(tmp_path):
    for text in ("", "\n\n", "[]", " [\n]\n"):
        path = write(tmp_path, text)
        assert list(read_entries(path, Tally())) == []
        with pytest.raises(ValueError, match="holds no prompt"):
            read_prompt_file(path)


def test_a_table_of_prompts(tmp_path):
    file = read(tmp_path, 'Prompt,Output Tokens,id\n"a, b",3,7\n\n"two\nlines",,8\nthree,x,9\n')
    assert [given[::2] for given in file.prompts] == [("a, b", 3), ("two\nlines", None)]
    assert passed_over(file) == [(6, 1, "Expected `int | null`, got `str` - at `$.Output Tokens`")]
    assert file.notes == ("keys of prompts.jsonl that were not read: 'id'",)


def test_an_endless_entry_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_ENTRY_CHARACTERS", 100)
    monkeypatch.setattr(entries, "CHUNK_CHARACTERS", 10)
    file = read(tmp_path, '{"text": "a"}\n{"text": "' + "x" * 1000 + '"}\n{"text": "b"}\n')
    assert [given.prompt for given in file.prompts] == ["a", "b"]
    assert passed_over(file) == [(2, 1, "it is longer than 100 characters")]
    file = read(tmp_path, '[{"text": "a"}, {"text": "' + "x" * 1000 + '"}]')
    ((line, _, problem),) = passed_over(file)
    assert (line, "an entry has no end within 100 characters" in problem) == (1, True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), max_size=6), st.integers(1, 40))
def test_entries_are_the_same_however_the_file_is_cut(tmp_path_factory, values, chunk):
    path = tmp_path_factory.getbasetemp() / "values.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "CHUNK_CHARACTERS", chunk)
        for indent in (None, 1):
            text = json.dumps(values, indent=indent, ensure_ascii=False)
            path.write_text(text)
            read = list(read_entries(path, Tally()))
            assert [entry.value for entry in read] == values
            assert all(text.split("\n")[entry.line - 1].lstrip().startswith(("{", "[")) for entry in read)
        path.write_text(lines(*values))
        assert [(entry.line, entry.value) for entry in read_entries(path, Tally())] == list(enumerate(values, 1))
