"""The latencies of one request in milliseconds, by the definitions in `result.MEASURES`.

The record of `record.py`'s head, three tokens in two messages:

>>> record = Record(number=0, intended_s=2.0, sent_s=2.001, message_times_s=(2.101, 2.151), message_tokens=(1, 2),
...                 ended_s=2.152, status="OK", completion_tokens=3)
>>> for measure in MEASURES:
...     print(measure, [round(value, 1) for value in values_ms(record, measure)])
ttft [101.0]
itl [50.0]
itl_per_token [25.0, 25.0]
tpot [25.5]
e2el [152.0]
e2el_per_token [50.7]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import MEASURES


def values_ms(record: Record, measure: str) -> tuple[float, ...]:
    """The request's samples of a measure: many of an ITL, at most one of the others, none where it is undefined."""
    return _VALUES[measure](record)


def tokens(record: Record) -> int:
    """Tokens of the completion. A server that does not count them is taken to send one per message."""
    return record.completion_tokens or sum(record.message_tokens)


def tokens_by_message(record: Record) -> tuple[int, ...]:
    """Tokens in each message.

    HTTP tells only their sum at the end, so it is spread evenly: 8 tokens in 3 messages count as 3, 2 and 3. A server
    that counts fewer tokens than it sent messages is not followed: no message brings less than one.

    >>> tokens_by_message(Record(number=0, intended_s=0, sent_s=0, message_times_s=(1, 2, 3), message_tokens=(1, 1, 1),
    ...                          ended_s=3, status="OK", completion_tokens=8))
    (3, 2, 3)
    """
    messages = len(record.message_tokens)
    if not messages or tokens(record) < messages or tokens(record) == sum(record.message_tokens):
        return record.message_tokens
    upto = [round(tokens(record) * done / messages) for done in range(messages + 1)]
    return tuple(after - before for before, after in pairwise(upto))


def _ttft(record: Record) -> tuple[float, ...]:
    return tuple((first - record.intended_s) * 1000 for first in record.message_times_s[:1])


def _itl(record: Record) -> tuple[float, ...]:
    return tuple((after - before) * 1000 for before, after in pairwise(record.message_times_s))


def _itl_per_token(record: Record) -> tuple[float, ...]:
    """One gap for each token but the first, whose wait is the TTFT.

    Tokens that come along with the first one waited no longer than it: they count as gaps of 0. So a request of n
    tokens always has n - 1 gaps, which add up to the time from its first message to its last.
    """
    if not record.message_times_s:
        return ()
    first, *others = tokens_by_message(record)
    shares = [(gap / count,) * count for gap, count in zip(_itl(record), others, strict=True)]
    return (0.0,) * (first - 1) + tuple(gap for share in shares for gap in share)


def _tpot(record: Record) -> tuple[float, ...]:
    if tokens(record) < 2 or not record.message_times_s:
        return ()
    return ((record.ended_s - record.message_times_s[0]) * 1000 / (tokens(record) - 1),)


def _e2el(record: Record) -> tuple[float, ...]:
    return ((record.ended_s - record.intended_s) * 1000,)


def _e2el_per_token(record: Record) -> tuple[float, ...]:
    return tuple(value / tokens(record) for value in _e2el(record)) if tokens(record) else ()


_VALUES: dict[str, Callable[[Record], tuple[float, ...]]] = {
    "ttft": _ttft,
    "itl": _itl,
    "itl_per_token": _itl_per_token,
    "tpot": _tpot,
    "e2el": _e2el,
    "e2el_per_token": _e2el_per_token,
}
assert _VALUES.keys() == MEASURES.keys()
