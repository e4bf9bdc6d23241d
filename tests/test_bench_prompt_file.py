"""Prompts from files: their layouts, what is wrong with a line, and files larger than what is held of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.client.loadtest.load import entries, prompt_file
from tramontane.client.loadtest.load.entries import BadEntry, read_entries
from tramontane.client.loadtest.load.prompt_file import Given, read_prompt_file

TALK = [{"from": "human", "value": "Why is it wet?"}, {"from": "gpt", "value": "Because it rains."}]


def write(tmp_path, text):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_layouts_of_lines(tmp_path):
    path = write(
        tmp_path,
        lines({"prompt": "Once upon a time", "max_tokens": 64}, {"prompt": [12, 7, 99], "id": 5})
        + "\n"
        + lines({"text": "A text"}, {"conversations": TALK, "id": "x"}),
    )
    # 16 characters are 4 tokens, and one for the BOS; ids are exact; the answer's 17 characters are 4 tokens.
    assert read_prompt_file(path).prompts == (
        Given("Once upon a time", 5, 64),
        Given((12, 7, 99), 3, None),
        Given("A text", 3, None),
        Given("Why is it wet?", 5, 4),
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_read_as_its_lines_are(tmp_path, indent):
    values = [{"conversations": TALK}, {"prompt": '}]{["', "max_tokens": 3}]
    given = read_prompt_file(write(tmp_path, lines(*values))).prompts
    assert read_prompt_file(write(tmp_path, json.dumps(values, indent=indent))).prompts == given


def test_the_first_question_and_its_answer(tmp_path):
    talk = [{"from": "system", "value": "Be kind."}, *TALK, {"from": "human", "value": "Why does it rain?"}]
    assert read_prompt_file(write(tmp_path, lines({"conversations": talk}))).prompts[0].prompt == "Why is it wet?"


def test_conversations_without_an_exchange_are_passed_over_and_counted(tmp_path):
    empty = [[], TALK[:1], TALK[1:], [TALK[0], TALK[0]], [{"from": "human", "value": " "}, TALK[1]]]
    file = read_prompt_file(write(tmp_path, lines(*({"conversations": talk} for talk in [*empty, TALK]))))
    assert file.passed_over == 5
    assert str(file) == f"1 prompts of {file.name} (5 passed over)"
    with pytest.raises(ValueError, match="holds no prompt; 5 conversations have no question and answer"):
        read_prompt_file(write(tmp_path, lines(*({"conversations": talk} for talk in empty))))


def test_a_large_file_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_file, "MAX_PROMPTS", 3)
    path = write(tmp_path, lines(*({"text": f"text {number}"} for number in range(5))) + "no json, and never read")
    assert [given.prompt for given in read_prompt_file(path).prompts] == ["text 0", "text 1", "text 2"]
    monkeypatch.setattr(prompt_file, "MAX_CHARACTERS", 17)
    with pytest.raises(ValueError, match="holds more than 17 characters of prompts; take a part of it"):
        read_prompt_file(path)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ("{", "Input data was truncated"),
        ('{"text": "a"} x', "JSON is malformed: trailing characters"),
        ('{"text": NaN}', "JSON is malformed: invalid character"),
        ("[1]", "Expected `object`, got `array`"),
        ("7", "Expected `object`, got `int`"),
        ('{"prompt": 7}', "Expected `str | array | null`, got `int` - at `$.prompt`"),
        ('{"prompt": [1, "a"]}', "Expected `int`, got `str` - at `$.prompt[1]`"),
        ('{"prompt": [1, -1]}', "prompt holds -1; a token id lies in 0 .. 2^32 - 1"),
        ('{"prompt": ""}', "prompt is empty; it needs at least 1 token"),
        ('{"prompt": []}', "prompt is empty"),
        ('{"question": "a"}', "has neither prompt nor text nor conversations"),
        ('{"text": "a", "max_tokens": 0}', "max_tokens is 0; it must be at least 1"),
        ('{"text": "a", "max_tokens": 1.5}', "Expected `int | null`, got `float` - at `$.max_tokens`"),
        ('{"conversations": [{"value": "a"}]}', "missing required field `from` - at `$.conversations[0]`"),
        ('{"text": "' + "\\u" + 'd800"}', ""),
        ("[" * 100_000, ""),
    ],
)
def test_a_bad_line_is_named(tmp_path, second, problem):
    path = write(tmp_path, '{"text": "fine"}\n' + second + '\n{"text": "fine"}\n')
    with pytest.raises(BadEntry) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[{"text": "a"}\n {"text": "b"}]', 2, "must go on with , or ] after an entry; it has '{'"),
        ('[{"text": "a"}\n', 2, "must go on with , or ] after an entry; it has 'no more'"),
        ('[{"text": "a"},\n7]', 2, "must be an object; it begins with '7'"),
        ('[{"text": "a"},\n]', 2, "must be an object; it begins with ']'"),
        ('[{"text": "a"},\n{"text":\n"b" "c"}]', 3, "Expecting ',' delimiter"),
        ('[{"text": "a"},\n{"text":\n NaN}]', 2, "holds NaN, which is no JSON"),
        ('[{"text": "a"}]\nmore', 2, "has more after its array"),
        ('[{"text": "' + "\\u" + 'd800"}]', 1, "prompt holds the lone surrogate U+D800, which cannot be sent"),
        ('[{"text": ' + "[" * 100_000, 1, "recursion"),
    ],
)
def test_a_bad_entry_of_an_array_is_named(tmp_path, text, line, problem):
    path = write(tmp_path, text)
    with pytest.raises(BadEntry) as caught:
        read_prompt_file(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert problem in str(caught.value)


def test_an_empty_file_and_an_empty_array_hold_no_prompt(tmp_path):
    for text in ("", "\n\n", "[]", " [\n]\n"):
        assert list(read_entries(write(tmp_path, text))) == []
        with pytest.raises(ValueError, match="holds no prompt"):
            read_prompt_file(write(tmp_path, text))


def test_other_encodings(tmp_path):
    assert read_prompt_file(write(tmp_path, b'\xef\xbb\xbf{"text": "a mark before"}')).prompts
    with pytest.raises(BadEntry, match="is not UTF-8, here or further on"):
        read_prompt_file(write(tmp_path, b'{"text": "\xff"}'))


def test_an_endless_entry_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "MAX_ENTRY_CHARACTERS", 100)
    monkeypatch.setattr(entries, "CHUNK_CHARACTERS", 10)
    for text, line in (('{"text": "a"}\n{"text": "' + "x" * 1000, 2), ('[{"text": "' + "x" * 1000 + '"}]', 1)):
        with pytest.raises(BadEntry, match=rf"line {line}: .*100 characters"):
            read_prompt_file(write(tmp_path, text))


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
            read = list(read_entries(path))
            assert [entry.value for entry in read] == values
            assert all(text.split("\n")[entry.line - 1].lstrip().startswith(("{", "[")) for entry in read)
        path.write_text(lines(*values))
        assert [(entry.line, entry.value) for entry in read_entries(path)] == list(enumerate(values, 1))
