"""Reads what a checkpoint folder's files beside `tokenizer.model` say about token ids. Pure.

config.json, generation_config.json    the ids of BOS, EOS and padding
added_tokens.json                      tokens that were added after the tokenizer's own: text -> id
tokenizer.json                         the tokenizer's pieces, and added tokens, each special or not
tokenizer_config.json                  added tokens, each special or not; the texts of BOS, EOS and so on
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tramontane.stages.folder import ADDED, CONFIG, GENERATION, TOKENIZER_CONFIG, TOKENIZER_JSON, SmallFiles, shown

ROLE_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROLE_TEXTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ROLE_LISTS = ("additional_special_tokens", "extra_special_tokens")
LARGEST_ID = 2**31 - 1


@dataclass(kw_only=True)
class NamedIds:
    """What the files say, whether the model has rows for these ids or not."""

    texts: dict[int, str] = field(default_factory=dict)
    """The text of each added token."""
    special: set[int] = field(default_factory=set)
    """Ids that a file calls special, added ones and the tokenizer's own. They print nothing."""
    pieces: dict[str, int] = field(default_factory=dict)
    """The id of each piece in `tokenizer.json`."""
    roles: set[int] = field(default_factory=set)
    """Ids that `config.json` or `generation_config.json` name as BOS, EOS or padding."""
    eos_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The EOS ids of each file, by its path; the first file that has some counts."""
    eos_text: str | None = None
    """The token that `tokenizer_config.json` calls EOS."""

    @classmethod
    def read(cls, files: SmallFiles) -> NamedIds:
        """Read a checkpoint folder's files.

        Raises:
            ValueError: a file does not have its form; the message names file, key and value.
        """
        ids = cls()
        for name in (GENERATION, CONFIG):
            if files.contents[name] is not None:
                ids._take_roles(files.folder / name, files.json(name))
        if files.contents[ADDED] is not None:
            for text, token_id in files.json(ADDED).items():
                ids.texts[_id(files.folder / ADDED, text, token_id)] = _whole(text)
        if files.contents[TOKENIZER_JSON] is not None:
            ids._take_tokenizer(files.folder / TOKENIZER_JSON, files.json(TOKENIZER_JSON))
        if files.contents[TOKENIZER_CONFIG] is not None:
            ids._take_tokenizer_config(files.folder / TOKENIZER_CONFIG, files.json(TOKENIZER_CONFIG))
        return ids

    def id_of(self, text: str) -> int | None:
        """The id of an added token, or else of a piece in `tokenizer.json`."""
        added = next((token_id for token_id, added in self.texts.items() if added == text), None)
        return self.pieces.get(text) if added is None else added

    def _take_roles(self, path: Path, values: Mapping[str, Any]) -> None:
        for key in ROLE_IDS:
            value = values.get(key)
            if key == "eos_token_id":
                if path.name == CONFIG and key not in values:
                    value = 2  # the default of transformers' classes
                self.eos_ids[str(path)] = ids = _ids(path, key, value)
                self.roles |= set(ids)
            elif isinstance(value, int) and 0 <= value <= LARGEST_ID:  # some write -1 for none
                self.roles.add(value)

    def _take_tokenizer(self, path: Path, values: Mapping[str, Any]) -> None:
        vocabulary = _object(path, "model", values.get("model")).get("vocab")
        if isinstance(vocabulary, dict):
            self.pieces = {_whole(text): _id(path, text, token_id) for text, token_id in vocabulary.items()}
        elif isinstance(vocabulary, list):  # of a unigram model: pieces with their scores
            self.pieces = {_whole(entry[0]): place for place, entry in enumerate(vocabulary) if _is_scored(entry)}
        added = values.get("added_tokens") or []
        if not isinstance(added, list):
            raise ValueError(f"{path}: added_tokens is {type(added).__name__}, not a list")
        for entry in added:
            token = _object(path, "added_tokens", entry)
            self._add(path, token.get("id"), token)

    def _take_tokenizer_config(self, path: Path, values: Mapping[str, Any]) -> None:
        for number, entry in _object(path, "added_tokens_decoder", values.get("added_tokens_decoder")).items():
            token_id = int(number) if number.isascii() and number.isdigit() and len(number) < 12 else number
            self._add(path, token_id, _object(path, "added_tokens_decoder", entry))
        self.eos_text = _text(values.get("eos_token"))
        by_text = {text: token_id for token_id, text in self.texts.items()}
        listed = [value for key in ROLE_LISTS for value in _listed(values.get(key))]
        for text in map(_text, [*(values.get(key) for key in ROLE_TEXTS), *listed]):
            if text in by_text:
                self.special.add(by_text[text])

    def _add(self, path: Path, token_id: Any, token: Mapping[str, Any]) -> None:
        text = _text(token)
        if text is None:
            raise ValueError(f"{path}: an added token has no content: {shown(token)}")
        self.texts[_id(path, text, token_id)] = text
        if token.get("special") is True:
            self.special.add(token_id)


def _ids(path: Path, key: str, value: Any) -> tuple[int, ...]:
    """The ids of a value that is null, one id or a list of ids."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_id(path, key, token_id) for token_id in listed)


def _id(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_ID:
        raise ValueError(f"{path}: {shown(key)} is {shown(value)}; an id is a whole number from 0 to {LARGEST_ID}")
    return value


def _object(path: Path, key: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} holds {type(value).__name__}, not an object")
    return value


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()


def _text(token: Any) -> str | None:
    """The text of a token, which is written as its text or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return _whole(content) if isinstance(content, str) else None


def _whole(text: str) -> str:
    """The text with lone surrogates replaced: JSON may hold them, and UTF-8 cannot encode them."""
    return text.encode(errors="replace").decode()


def _is_scored(entry: Any) -> bool:
    return isinstance(entry, list) and bool(entry) and isinstance(entry[0], str)
