"""Which ids exist, what they print and which end a completion, by the files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_pipeline import tiny_tokenizer, tiny_tokenizer_bytes, vocabulary_of

from tramontane.cluster.text import CompletionText, detokenize
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import SmallFiles

CONFIG = {"architectures": ["MistralForCausalLM"]}
SIZE = tiny_tokenizer().size
"""Ids of the tokenizer; the first that is added after them."""
START, END = "<|im_start|>", "<|im_end|>"
ADDED = {END: SIZE, START: SIZE + 1}


def written(folder: Path, *, sentencepiece: bool = True, rows: int = SIZE + 2, **files: object) -> Path:
    """A folder with a config.json of so many rows, and other files by their names without `.json`."""
    config = CONFIG | {"vocab_size": rows} | files.pop("config", {})
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if sentencepiece:
        (folder / "tokenizer.model").write_bytes(tiny_tokenizer_bytes())
    return folder


def vocabulary(*arguments: object, **files: object) -> Vocabulary:
    folder = written(*arguments, **files)
    small_files = SmallFiles.read(folder)
    config = ModelConfig.read(small_files)
    return Vocabulary.read(small_files, config.vocab, Tokenizer.read(small_files, config))


def printed(words: Vocabulary, *ids: int) -> str:
    return detokenize(words, ids, continuation=True)


def decoder(special: bool) -> dict:
    return {str(token_id): {"content": text, "special": special} for text, token_id in ADDED.items()}


def listed(special: bool) -> list:
    return [{"id": token_id, "content": text, "special": special} for text, token_id in ADDED.items()]


WAYS = {
    "added_tokens.json": {"added_tokens": ADDED},
    "tokenizer_config.json": {"tokenizer_config": {"added_tokens_decoder": decoder(False)}},
    "tokenizer.json": {"tokenizer": {"added_tokens": listed(False), "model": {"vocab": {"a": 5}}}},
}


@pytest.mark.parametrize("way", WAYS)
def test_added_tokens_are_sampled_and_print_their_text(tmp_path, way):
    words = vocabulary(tmp_path, **WAYS[way])
    assert (words.sampleable_ids, words.unnamed_ids) == (SIZE + 2, ())
    assert printed(words, SIZE + 1, SIZE) == START + END
    assert words.remarks == ()


def test_pieces_that_only_tokenizer_json_has_print_their_text(tmp_path):
    pieces = {"\u2581": 5, "\u2581Wort\u2581": SIZE, "\ud800": SIZE + 1, END: SIZE + 2}
    special = [{"id": SIZE + 2, "content": END, "special": True}]
    words = vocabulary(tmp_path, rows=SIZE + 3, tokenizer={"added_tokens": special, "model": {"vocab": pieces}})
    assert words.sampleable_ids == SIZE + 3
    assert printed(words, SIZE, SIZE + 1, SIZE + 2) == " Wort ?"


SPECIAL = {
    "tokenizer_config.json": {"tokenizer_config": {"added_tokens_decoder": decoder(True)}},
    "tokenizer.json": {"tokenizer": {"added_tokens": listed(True)}},
    "by text": {"added_tokens": ADDED, "tokenizer_config": {"additional_special_tokens": [START, {"content": END}]}},
    "by role": {"added_tokens": ADDED, "tokenizer_config": {"pad_token": START, "eos_token": {"content": END}}},
    "by id": {"added_tokens": ADDED, "config": {"eos_token_id": SIZE, "pad_token_id": SIZE + 1}},
}


@pytest.mark.parametrize("way", SPECIAL)
def test_special_ones_are_sampled_and_print_nothing(tmp_path, way):
    words = vocabulary(tmp_path, **SPECIAL[way])
    assert words.sampleable_ids == SIZE + 2
    assert printed(words, SIZE, SIZE + 1) == ""
    assert {SIZE, SIZE + 1} <= words.control


def test_a_piece_that_a_file_calls_special_prints_nothing_and_one_that_pads_does(tmp_path):
    summer = tiny_tokenizer().encode("summer", add_bos=False)[0]
    called = {"added_tokens_decoder": {str(summer): {"content": "x", "special": True}}}
    assert printed(vocabulary(tmp_path, tokenizer_config=called), summer) == ""
    (tmp_path / "tokenizer_config.json").unlink()
    assert printed(vocabulary(tmp_path, config={"pad_token_id": summer}), summer) != ""


def test_rows_that_no_file_names_stay_out(tmp_path):
    words = vocabulary(tmp_path, rows=SIZE + 64)
    assert (words.sampleable_ids, words.unnamed_ids) == (SIZE, ())
    words = vocabulary(tmp_path, rows=SIZE + 64, config={"eos_token_id": SIZE + 5}, added_tokens=ADDED)
    assert (words.sampleable_ids, words.unnamed_ids) == (SIZE + 6, (SIZE + 2, SIZE + 3, SIZE + 4))
    assert printed(words, SIZE + 3, SIZE + 60) == ""


def test_without_a_tokenizer_all_rows_are_sampled_unless_tokenizer_json_lists_them(tmp_path):
    words = vocabulary(tmp_path, sentencepiece=False, rows=40, added_tokens={END: 30})
    assert (words.sampleable_ids, words.unnamed_ids) == (40, ())
    assert printed(words, 30) == ""
    pieces = {"model": {"vocab": {f"p{number}": number for number in range(30)}}}
    words = vocabulary(tmp_path, sentencepiece=False, rows=40, added_tokens={END: 31}, tokenizer=pieces)
    assert (words.sampleable_ids, words.unnamed_ids) == (32, (30,))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (2,)),
        ({"config": {"eos_token_id": None}}, (2,)),
        ({"config": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": [7, SIZE]}}, (7, SIZE)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": None}}, (5,)),
        ({"config": {"eos_token_id": 5}, "generation_config": {}}, (5,)),
        ({"config": {"eos_token_id": SIZE}, "tokenizer_config": {"eos_token": "</s>"}}, (SIZE, 2)),
        ({"tokenizer_config": {"eos_token": {"content": END}}, "added_tokens": ADDED}, (2, SIZE)),
        ({"tokenizer_config": {"eos_token": "nobody's"}}, (2,)),
    ],
    ids=str,
)
def test_who_says_what_ends_a_completion(tmp_path, files, expected):
    words = vocabulary(tmp_path, **files)
    assert words.eos_ids == expected
    assert set(expected) < words.named


def test_without_a_tokenizer_and_an_eos_nothing_ends_a_completion():
    assert vocabulary_of(None).eos_ids == ()


def test_eos_beyond_the_rows_is_passed_over_with_a_line(tmp_path):
    words = vocabulary(tmp_path, generation_config={"eos_token_id": [SIZE + 9, 7]})
    assert words.eos_ids == (7,)
    path = tmp_path / "generation_config.json"
    assert words.remarks == (f"{path}: eos_token_id {SIZE + 9}, beyond the model's {SIZE + 2} rows, is passed over",)
    words = vocabulary(tmp_path, generation_config={"eos_token_id": 10**6}, config={"eos_token_id": 5})
    assert words.eos_ids == (5,)
    assert words.sampleable_ids == SIZE


def test_a_start_is_refused_where_no_eos_is_left(tmp_path):
    files = SmallFiles.read(written(tmp_path, sentencepiece=False, config={"eos_token_id": [10**6, 10**7]}))
    with pytest.raises(
        ValueError, match=r"config\.json: eos_token_id 1000000, 10000000, beyond the model's \d+ rows; no"
    ):
        Vocabulary.read(files, SIZE + 2, None)
    written(tmp_path, config={"eos_token_id": 10**6})
    assert Vocabulary.read(files, SIZE + 2, tiny_tokenizer()).eos_ids == (2,), "the tokenizer's own is left"


def test_added_ids_beyond_the_rows_are_passed_over_with_a_line(tmp_path):
    many = {f"<{number}>": SIZE + number for number in range(9)}
    words = vocabulary(tmp_path, added_tokens=many)
    assert (words.sampleable_ids, len(words.surfaces)) == (SIZE + 2, SIZE + 2)
    first = ", ".join(f"{SIZE + number} ('<{number}>')" for number in (2, 3, 4))
    assert words.remarks == (f"ids beyond the model's {SIZE + 2} rows are passed over: {first} and 4 more",)


def test_an_added_token_is_found_by_a_stop_string_where_it_prints_and_cut_from_the_text_where_it_ends(tmp_path):
    words = vocabulary(tmp_path, added_tokens=ADDED)
    text = CompletionText(words, stop_strings=(END,), stop_ids=(), min_tokens=0)
    assert [text.push(token) for token in [SIZE + 1, SIZE]] == [START, ""]
    assert text.stopped
    text = CompletionText(words, stop_strings=(), stop_ids=(SIZE,), min_tokens=0)
    assert [text.push(token) for token in [SIZE + 1, SIZE]] == [START, ""]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": {"eos_token_id": [2, -1]}}, r"config\.json: 'eos_token_id' is -1; an id is a whole number from 0"),
        ({"generation_config": {"eos_token_id": True}}, r"generation_config\.json: 'eos_token_id' is True"),
        ({"added_tokens": {"x": "7"}}, r"added_tokens\.json: 'x' is '7'"),
        ({"added_tokens": []}, r"added_tokens\.json: holds list, not an object"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}},
            r"tokenizer_config\.json: 'y' is 'x'",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": "y"}}}, "added_tokens_decoder holds str, not an object"),
        ({"tokenizer": {"added_tokens": [{"id": 4}]}}, r"tokenizer\.json: an added token has no content"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_file_of_another_form_is_named(tmp_path, files, said):
    with pytest.raises(ValueError, match=said):
        vocabulary(tmp_path, **files)


def test_a_key_of_a_megabyte_is_cut_in_the_line(tmp_path):
    with pytest.raises(ValueError, match=r"added_tokens\.json: 'xxx.*xxx' is '7'; an id is") as caught:
        vocabulary(tmp_path, added_tokens={"x" * 10**6: "7"})
    assert len(str(caught.value)) < 1000
