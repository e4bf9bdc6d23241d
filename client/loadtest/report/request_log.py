"""A run's requests, one JSON line each: for questions that no report answers, and to be sent again as a trace.

A trace needs `at_s`, `max_tokens` and `prompt_tokens` or `prompt`. The prompt itself is written only on demand: it may
be private, and is long.
"""

from __future__ import annotations

import hashlib
import itertools

import msgspec

from tramontane.client.loadtest.load.corpus import CHARACTERS_PER_TOKEN, estimated_tokens
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import Record, ServerTimings


class RequestLine(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line; what was not known is left out. Times ending in `_s` are seconds from the run's start."""

    number: int
    at_s: float
    """The intended arrival."""
    sent_s: float
    first_token_s: float | None = None
    ended_s: float
    status: str
    error: str = ""
    finish_reason: str = ""
    conduct: Conduct = Conduct.NORMAL
    prompt_tokens: int
    """As the server counts, else as many ids as were sent, else what the text's length suggests."""
    max_tokens: int
    completion_tokens: int
    seed: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    ttft_ms: float | None = None
    e2el_ms: float | None = None
    itls_ms: list[float] = []
    """Gaps between messages that bring tokens."""
    message_tokens: tuple[int, ...] = ()
    """Tokens in each of these messages; left out where each brings one."""
    server: ServerTimings | None = None
    ids_sha256: str | None = None
    prompt: str | tuple[int, ...] | None = None
    text: str | None = None


def request_line(record: Record, ask: Ask, *, texts: bool = False) -> bytes:
    """One request as a line, ended by a newline. With `texts` it holds what was asked and answered."""
    assert record.number == ask.number, f"the record of request {record.number} beside ask {ask.number}"
    times = record.message_times_s
    line = RequestLine(
        number=record.number,
        at_s=_micro(record.intended_s),
        sent_s=_micro(record.sent_s),
        first_token_s=_micro(times[0]) if times else None,
        ended_s=_micro(record.ended_s),
        status=record.status,
        error=record.error,
        finish_reason=record.finish_reason,
        conduct=record.conduct,
        prompt_tokens=record.prompt_tokens or _sent_tokens(ask.prompt),
        max_tokens=ask.max_tokens,
        completion_tokens=record.completion_tokens,
        seed=ask.seed,
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        stop=ask.stop,
        ignore_eos=ask.ignore_eos,
        ttft_ms=_gap_ms(record.intended_s, times[0]) if times else None,
        e2el_ms=_gap_ms(record.intended_s, record.ended_s) if record.ok else None,
        itls_ms=[_gap_ms(before, after) for before, after in itertools.pairwise(times)],
        message_tokens=record.message_tokens if any(tokens != 1 for tokens in record.message_tokens) else (),
        server=record.server,
        ids_sha256=ids_digest(record.token_ids) if record.token_ids else None,
        prompt=ask.prompt if texts else None,
        text=record.text if texts else None,
    )
    return msgspec.json.encode(line) + b"\n"


def ids_digest(token_ids: tuple[int, ...]) -> str:
    """SHA-256 of the ids in decimal with commas between: equal digests mean equal completions, at 64 letters each.

    >>> ids_digest((1, 52, 77)) == hashlib.sha256(b"1,52,77").hexdigest()
    True
    """
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def _sent_tokens(prompt: str | tuple[int, ...]) -> int:
    return estimated_tokens(prompt, CHARACTERS_PER_TOKEN) if isinstance(prompt, str) else len(prompt)


def _micro(seconds: float) -> float:
    """To the microsecond; clocks are not better, and lines stay short."""
    return round(seconds, 6)


def _gap_ms(before_s: float, after_s: float) -> float:
    return round((after_s - before_s) * 1000, 3)
