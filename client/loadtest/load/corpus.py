"""Where prompts come from, when their lengths are chosen by the run: random ids, made-up text, a text file.

`prompt_file.py` reads prompts that are there already. A text's tokens are known to the server's tokenizer only; here
they are taken from its characters: of ASCII about 4 a token, as English has with the vocabularies of large models, and
each other character for a token of its own. 100 tokens are then 400 English characters, or 100 Chinese ones. Where it
matters whether a prompt fits, a server with a tokenizer is asked (`counting.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

Prompt: TypeAlias = str | tuple[int, ...]

CHARACTERS_PER_TOKEN = 4.0
MAX_TEXT_BYTES = 256 << 20
LOOK_BACK = 200
"""Characters in which a slice of a file looks for the start of its line."""

_WORD_LIST = (
    "a about after again all along and any as at away back before bell boat bread bridge bright by call carry child "
    "clear cloud coast cold come could day deep door down each early east evening far farm field find fire first "
    "forest friend from garden give glass go grain green ground half hand harbour head hear high hill hold home horse "
    "house in into keep kind lake lamp land last late leave letter light like line little long look low make many "
    "market meadow morning mountain name near never night north of old on once open orchard other our out over paper "
    "path people place plain quiet rain ran red river road roof room round sail salt sea season seven shore side slow "
    "small snow so some song south spring stand star still stone street summer table tall tell than that the then "
    "there they thing three through time to town tree turn two under until up valley village voice wait walk wall "
    "warm was water way well west when where while white who wide wind window winter with wood word work year young"
)
_WORDS = _WORD_LIST.split()
_SHORTEST = 2
"""Characters of the shortest word with the blank after it."""


class Source(Protocol):
    """Makes a prompt of any length."""

    @property
    def is_text(self) -> bool:
        """Whether prompts are text. The server then puts its BOS before them, one token more."""

    def prompt(self, generator: np.random.Generator, tokens: int, vocabulary: int | None) -> Prompt:
        """A prompt of so many tokens, decided by the generator alone.

        Raises:
            ValueError: the source cannot make it.
        """

    def __str__(self) -> str:
        """Words for the report."""


@dataclass(frozen=True, slots=True)
class RandomIds:
    """Token ids, each as likely as any other: exact lengths, and prompts that no cache has seen.

    Ids below `lowest` are left out. In the vocabularies of Llama and Mistral 0, 1 and 2 are <unk>, <s> and </s>: no
    user's text holds them, and a model that reads </s> in the middle of a prompt may end at once.
    """

    lowest: int = 3

    @property
    def is_text(self) -> bool:
        """No."""
        return False

    def prompt(self, generator: np.random.Generator, tokens: int, vocabulary: int | None) -> Prompt:
        """Ids in lowest .. vocabulary - 1."""
        if vocabulary is None:
            raise ValueError("vocabulary is unknown; random token ids need it, so take text for this server")
        if not 0 <= self.lowest < vocabulary:
            raise ValueError(f"lowest id is {self.lowest}; it must lie below the vocabulary of {vocabulary}")
        every = _numbers(vocabulary)  # one object an id, however often it comes: a quarter of the memory
        return tuple(map(every.__getitem__, generator.integers(self.lowest, vocabulary, tokens).tolist()))

    def __str__(self) -> str:
        return "random token ids"


@dataclass(frozen=True, slots=True)
class SyntheticText:
    """Plain English words in no order, for servers that take text only."""

    characters_per_token: float = CHARACTERS_PER_TOKEN

    def __post_init__(self) -> None:
        _check_ratio(self.characters_per_token)

    @property
    def is_text(self) -> bool:
        """Yes."""
        return True

    def prompt(self, generator: np.random.Generator, tokens: int, vocabulary: int | None) -> Prompt:
        """Words up to the length; the last may be cut."""
        wanted = characters(tokens, self.characters_per_token)
        places = generator.integers(0, len(_WORDS), wanted // _SHORTEST + 1).tolist()
        return " ".join(_WORDS[place] for place in places)[:wanted].rstrip()

    def __str__(self) -> str:
        return f"synthetic text, {self.characters_per_token:g} characters a token"


@dataclass(frozen=True, slots=True)
class TextFile:
    """Slices of a text, each from the start of a line or word near a random place."""

    text: str
    name: str
    """Of the file, for reports and errors."""
    characters_per_token: float = CHARACTERS_PER_TOKEN

    def __post_init__(self) -> None:
        _check_ratio(self.characters_per_token)

    @property
    def is_text(self) -> bool:
        """Yes."""
        return True

    def prompt(self, generator: np.random.Generator, tokens: int, vocabulary: int | None) -> Prompt:
        """At most the asked length: blanks at its start and end are left out."""
        wanted = characters(tokens, self.characters_per_token)
        if wanted > len(self.text):
            raise ValueError(
                f"{self.name} holds {len(self.text):,} characters; a prompt of {tokens:,} tokens needs {wanted:,}"
            )
        start = _line_start(self.text, int(generator.integers(0, len(self.text) - wanted, endpoint=True)))
        return _cut(self.text[start : start + wanted], tokens, self.characters_per_token).rstrip()

    def __str__(self) -> str:
        return f"slices of {self.name}, {self.characters_per_token:g} characters a token"


def read_text_file(path: Path, characters_per_token: float = CHARACTERS_PER_TOKEN) -> TextFile:
    """A source from a file of UTF-8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than 256 MiB, no UTF-8, or blank.
    """
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} is {size:,} bytes; it must be at most {MAX_TEXT_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start:,}") from None
    if not text.strip():
        raise ValueError(f"{path} is blank; it must hold text")
    return TextFile(text.strip(), str(path), characters_per_token)


def characters(tokens: int, characters_per_token: float) -> int:
    """What so many tokens are taken to be; at least one."""
    return max(1, round(tokens * characters_per_token))


def estimated_tokens(text: str, characters_per_token: float) -> int:
    """What a text is taken to be; at least one.

    >>> estimated_tokens("four words of ASCII", 4.0), estimated_tokens("天地玄黃", 4.0)
    (5, 4)
    """
    ascii_only = len(text.encode("ascii", errors="ignore"))
    return max(1, round(ascii_only / characters_per_token) + len(text) - ascii_only)


def _cut(text: str, tokens: int, characters_per_token: float) -> str:
    """As much of the text as is taken to be so many tokens."""
    if text.isascii():
        return text  # its length was chosen so
    costs = np.fromiter((1 / characters_per_token if sign.isascii() else 1.0 for sign in text), float, len(text))
    return text[: max(1, int(np.searchsorted(costs.cumsum(), tokens, side="right")))]


def _line_start(text: str, at: int) -> int:
    """The first character that is not blank of the line around `at`, or of its word where the line began far before.

    >>> text = "To be, or not to be,\\nthat is the question"
    >>> _line_start(text, 30), text[_line_start(text, 30) :]
    (21, 'that is the question')
    """
    near = max(0, at - LOOK_BACK)
    start = text.rfind("\n", near, at) + 1
    if start == 0 and near > 0:
        start = text.rfind(" ", near, at) + 1 or at
    while text[start].isspace():  # the text does not end in blanks
        start += 1
    return start


@lru_cache(maxsize=1)
def _numbers(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _check_ratio(characters_per_token: float) -> None:
    if not 0.1 <= characters_per_token <= 100:
        raise ValueError(f"characters a token is {characters_per_token:g}; it must lie in 0.1 .. 100")
