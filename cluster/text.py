"""Ids into text, as they come: characters are never split, stop strings never sent.

The text sent so far is a pure function of the ids so far, the stop strings and `min_tokens`, however the ids were cut
into messages. A completion is always the continuation of something, so its leading space stays, and it begins with a
fresh character even if a prompt of ids ends inside one.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from tramontane.cluster.steps import Steps, finish
from tramontane.cluster.vocabulary import Vocabulary

STEP_IDS = 4096
"""Joined in a step of some milliseconds."""

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Joins ids into text. The last characters may lag until their last byte has come.

    The ids of `<0xE2> <0x82> <0xAC> _` give "", "", "\N{EURO SIGN}", " ".
    """

    def __init__(self, vocabulary: Vocabulary, *, continuation: bool) -> None:
        self._surfaces = vocabulary.surfaces
        self._spaced = vocabulary.spaced
        self._decoder = _UTF8("replace")
        self._drop_first = not continuation and vocabulary.drops_first_space
        self._drop_all = not continuation and vocabulary.drops_leading_spaces

    def push(self, token_id: int) -> str:
        """The characters that this id completes. An id that no file names (a spare row) prints nothing."""
        if token_id >= len(self._surfaces):
            return ""
        return self._decoder.decode(self._begin(token_id, self._surfaces[token_id]))

    def finish(self) -> str:
        """What an unfinished character becomes: U+FFFD, or nothing where there is none."""
        return self._decoder.decode(b"", final=True)

    def _begin(self, token_id: int, surface: bytes) -> bytes:
        """Take the space that encoding put before a text from its beginning, as SentencePiece does."""
        if self._drop_first and surface:
            surface = surface[token_id in self._spaced :]
            self._drop_first = not surface and self._drop_all
        return surface


def detokenize(vocabulary: Vocabulary, ids: Sequence[int], *, continuation: bool) -> str:
    """Join all ids at once."""
    return finish(detokenize_in_steps(vocabulary, ids, continuation=continuation))


def detokenize_in_steps(vocabulary: Vocabulary, ids: Sequence[int], *, continuation: bool) -> Steps[str]:
    """Join ids, some in each step."""
    detokenizer, texts = Detokenizer(vocabulary, continuation=continuation), list[str]()
    for start in range(0, len(ids), STEP_IDS):
        yield
        texts.extend(map(detokenizer.push, ids[start : start + STEP_IDS]))
    return "".join(texts) + detokenizer.finish()


class StopStrings:
    """Looks for the first of some strings to be completed, and keeps back what may be the beginning of one.

    With "END" and "\n\n": "a\n" gives "a", then "b" gives "\nb", then "EN" gives "", then "D" is found.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), f"an empty stop string among {len(strings)}"
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str, *, match: bool = True) -> str:
        """Text that may be sent now.

        Where several strings are completed by `text`, the first to be complete counts, and among those that end
        together the longest; it and what follows is never sent. With `match` off, a string that `text` completes is
        ordinary text (it may still be the beginning of another one).
        """
        assert not self.found, "pushed text after a stop string"
        before, seen = len(self._held), self._held + text
        if match and text:
            ends = [
                (place + len(string), place)
                for string in self._strings
                if (place := seen.find(string, max(0, before - len(string) + 1))) >= 0
            ]
            if ends:
                self.found, self._held = True, ""
                return seen[: min(ends)[1]]
        kept = max((_overlap(seen, string) for string in self._strings), default=0)
        self._held = seen[len(seen) - kept :]
        return seen[: len(seen) - kept]

    def finish(self) -> str:
        """What was kept back, once it is clear that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of `text` that `string`, longer than them, begins with.

    >>> _overlap("a\\n", "\\n\\n")
    1
    """
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if string.startswith(text[-n:])), 0)


class CompletionText:
    """The text of one completion, token by token.

    - A stop id (EOS or the request's own) ends the completion, and its text is left out.
    - A stop string counts if a token at offset `min_tokens` or later completes it; it may begin before.
    - Without a tokenizer ids print nothing, and the text stays empty.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, stop_strings: Sequence[str], stop_ids: Collection[int], min_tokens: int
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, continuation=True)
        self._stops = StopStrings(stop_strings)
        self._stop_ids = frozenset(stop_ids)
        self._min_tokens = min_tokens
        self.tokens = 0
        """Tokens pushed so far."""

    @property
    def stopped(self) -> bool:
        """A stop string was completed by the last token pushed; no token may follow."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Text that can be sent now that this token has come."""
        offset = self.tokens
        self.tokens += 1
        if token_id in self._stop_ids:
            return ""
        return self._stops.push(self._detokenizer.push(token_id), match=offset >= self._min_tokens)

    def finish(self) -> str:
        """The rest of the text: nothing after a stop string, else what was kept back and U+FFFD for a cut character."""
        if self.stopped:
            return ""
        return self._stops.finish() + self._detokenizer.finish()
