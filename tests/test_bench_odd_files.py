"""Files as others write them: what is read of each, what is passed over and why; and no bytes end in a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tramontane.client.loadtest.load import entries
from tramontane.client.loadtest.load.prompt_file import PromptFile, read_prompt_file
from tramontane.client.loadtest.load.trace import Trace, read_trace, replay

FILES = Path(__file__).parent / "odd_files"

PROMPTS = {
    "vllm.jsonl": [("Why is the sky blue?", 10), ("And the sea?", 12)],
    "sharegpt_null.json": [("Why?", 2), ("How?", 4)],
    "surrogates.json": [("whole \N{GRINNING FACE}", None)],
    "surrogates.jsonl": [("whole \N{GRINNING FACE}", None)],
    "messages.jsonl": [("What is this?", 7), ("Why?", 4), ("And then?", None)],
    "cut_off.json": [("one", None), ("two", None)],
    "latin1.jsonl": [("tea", None)],
    "nan.json": [("one", None), ("two", None)],
    "windows.jsonl": [("one", None), ("two", None)],
    "text_input.jsonl": [("What is the capital of France?", 20)],
    "prompts.csv": [("Why, then?\nAnd how?", 10), ("Where?", None)],
    "odd_lines.jsonl": [("one", None), ((4, 5), 64)],
}
"""Each file's prompts and max_tokens."""

TRACES = {
    "mooncake_tail.jsonl": ([(0.0, 20, 4), (1.0, 21, 5), (1.5, 22, 6)], "25 s"),
    "mooncake_text.jsonl": ([(0.0, "What is it?", 20), (0.5, "And that?", 30)], "1 s"),
    "mooncake_sessions.jsonl": ([(0.0, 9, 4), (1.5, 9, 6), (2.0, 9, 5), (3.0, 9, 7)], ""),
    "bailian.jsonl": ([(0.0, 52, 13), (0.886, 53, 14)], "61.114 s"),
    "burstgpt.csv": ([(0.0, 47, 18), (113.0, 41, 27)], "5 s"),
    "azure.csv": ([(0.0, 37, 4), (4.314579, 39, 10)], "2023-11-16 18:15:46.680590"),
    "azure_2024.csv": ([(0.0, 37, 4), (1.0, 39, 10)], "2024-05-10 00:00:00.009930"),
    "epoch.jsonl": ([(0.0, "two", 4), (0.5, "one", 3)], "1700000000 s"),
    "array.json": ([(0.0, 5, 1), (0.25, 6, 2)], ""),
    "odd_trace.jsonl": ([(0.0, 5, 1), (0.2, 7, 3)], "0.2 s"),
}
"""Each file's arrivals with prompt (or its length) and max_tokens, and when the first came by the file's own clock."""

SAYS = {
    "vllm.jsonl": ["keys of {} that were not read: 'lora'"],
    "sharegpt_null.json": [
        "keys of {} that were not read: 'id'",
        "1 entry of {} was passed over, line 2: the conversation has no question with an answer",
        "1 entry of {} was passed over, line 3: it has neither prompt nor text nor a conversation",
    ],
    "surrogates.json": [
        "line 1: prompt holds the lone surrogate U+D83D at character 4, which cannot be sent",
        "line 2: prompt holds the lone surrogate U+DC00 at character 0, which cannot be sent",
    ],
    "surrogates.jsonl": [
        "line 1: prompt holds the lone surrogate U+D83D at character 4, which cannot be sent",
        "line 2: prompt holds the lone surrogate U+DC00 at character 0, which cannot be sent",
    ],
    "messages.jsonl": ["keys of {} that were not read: 'model'", "line 4: the conversation has no question"],
    "cut_off.json": ["1 entry of {} was passed over, line 3: it cannot be read from there on: Unterminated string"],
    "latin1.jsonl": ["line 1: prompt holds the lone surrogate U+DCE9 at character 3"],
    "nan.json": ["line 1: it is no JSON object", "line 1: it has neither prompt"],
    "text_input.jsonl": ["not read: 'session_id'", "line 2: prompt is empty"],
    "prompts.csv": ["not read: 'id'", "line 5: it has neither prompt"],
    "odd_lines.jsonl": [
        "line 2: prompt is neither text nor a list of token ids",
        "line 3: prompt holds 'a'; a token id lies in 0 .. 2^32 - 1",
        "line 7: prompt holds -1; a token id",
        "2 entries of {} were passed over, the first in line 4: it is no JSON object",
        "line 5: it is no JSON: Expecting property name",
        "line 9: max_tokens is 0; it must lie in 1 .. 10,000,000",
        "line 10: Expected `int | null`, got `str` - at `$.max_tokens`",
        "line 11: it has neither prompt",
        "not read: 'question'",
    ],
    "mooncake_text.jsonl": ["not read: 'hash_ids'"],
    "bailian.jsonl": ["'chat_id', 'parent_chat_id', 'type', 'turn', 'hash_ids'", "read as seconds"],
    "burstgpt.csv": ["'Model', 'Total tokens', 'Log Type'", "line 3: max_tokens is 0"],
    "azure.csv": ["line 4: timestamp is '2023-11-16 soon', neither a number nor a date"],
    "odd_trace.jsonl": [
        "line 1: a prompt of 4,000 tokens and max_tokens 97 need 4,097; the context is 4,096",
        "line 3: it has no max_tokens",
        "line 4: it has neither at_s nor timestamp nor delay",
        "line 6: it came at 1700000000 s, more than 31 days away from the others",
        "line 7: prompt holds the lone surrogate U+D800",
        "line 8: prompt holds token id 70000; it must be below the vocabulary, 1000",
        "line 9: top_p is 7.0, which no request can have",
    ],
}
"""What the report says of each file: sentences, or the parts of them that matter."""


def says(name: str, notes: tuple[str, ...]) -> None:
    parts = [part.format(name) for part in SAYS.get(name, [])]
    for part in parts:
        assert sum(part in note for note in notes) == 1, (part, notes)
    assert len(notes) == len(parts), notes


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_others_wrote(name):
    file = read_prompt_file(FILES / name)
    assert [(given.prompt, given.max_tokens) for given in file.prompts] == PROMPTS[name]
    says(name, (*file.notes, *file.passed_over.sentences(file.name)))


@pytest.mark.parametrize("name", TRACES)
def test_traces_that_others_wrote(name):
    trace = replay(read_trace(FILES / name), 0, vocabulary=1000, context=4096)
    found = [
        (pytest.approx(at_s), ask.prompt if isinstance(ask.prompt, str) else len(ask.prompt), ask.max_tokens)
        for at_s, ask in zip(trace.arrivals_s, trace.asks, strict=True)
    ]
    assert (found, trace.start) == TRACES[name]
    says(name, trace.notes)


def test_every_odd_file_is_tried():
    assert {path.name for path in FILES.iterdir()} == PROMPTS.keys() | TRACES.keys()


def outcome(read: Callable[[Path], PromptFile | Trace], path: Path) -> PromptFile | Trace | str:
    """What a reader makes of a file, or the sentence by which it refuses the file."""
    try:
        return read(path)
    except ValueError as error:
        return str(error)


def all_is_well(found: PromptFile | Trace | str, path: Path) -> bool:
    """A refusal names the file; everything that is read can be sent, and told in a report."""
    match found:
        case str():
            return str(path) in found
        case PromptFile():
            asked = [given.prompt for given in found.prompts]
        case Trace():
            asked = [ask.prompt for ask in found.asks]
    "".join(found.notes).encode()
    return bool(asked) and all(prompt and (not isinstance(prompt, str) or prompt.encode()) for prompt in asked)


pieces = st.lists(
    st.sampled_from(
        [piece for path in sorted(FILES.iterdir()) for piece in path.read_bytes().splitlines(keepends=True)]
        + [b"[", b"]", b"{", b"}", b",", b'"', b"\n", b"\r", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\x00", b"NaN"]
        + [b"1e999", b"9" * 5000, b"-", b"null", b'"prompt":', b'"timestamp":', b"prompt,max_tokens\n", b"[" * 3000]
    ),
    max_size=12,
).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | pieces, st.sampled_from([1, 7, 1 << 20]))
@example(b"[" * 100_000, 1 << 20)
@example(b'{"a":' * 100_000, 1 << 20)
@example(b'[{"prompt": "x"}, ' + b"9" * 5000 + b"]", 1 << 20)
@example(b'prompt,max_tokens\n"' + b"x" * 200_000, 1 << 20)
@example(b'{"at_s": 1e300, "prompt": "x", "max_tokens": 1' + b"0" * 400 + b"}", 1 << 20)
@example(b'{"delay": 1e15, "session_id": [], "prompt": "x", "max_tokens": 1}\n' * 3, 1 << 20)
def test_no_bytes_whatever_end_in_a_traceback(tmp_path_factory, data, chunk):
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "CHUNK_CHARACTERS", chunk)
        assert all_is_well(outcome(read_prompt_file, path), path)
        assert all_is_well(outcome(lambda path: replay(read_trace(path), 0, vocabulary=1000, context=4096), path), path)
