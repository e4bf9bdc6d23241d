"""Were the answers right? Speed is worth nothing where the load changes what is said.

After a run its records are held against each other, and some against the server, which is asked again: what the ids
print, and what a request gets when it is alone. Our own service promises the same tokens in any company where it
declares `row_invariant`; elsewhere rounding may tip a close choice, so there a mismatch is reported, not condemned.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from tramontane.client.loadtest.generator.target import Answer, OnTokens
from tramontane.client.loadtest.judging.agreement import (
    EXAMPLES,
    Agreement,
    Asked,
    agreement,
    identity,
    pair,
    repeats,
    told,
    wrong_text,
)
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import CUT, OK, PROTOCOL, Record
from tramontane.client.loadtest.result import Checks, Finding, Severity
from tramontane.client.types import FinishReason

T = TypeVar("T")

REFUSALS = frozenset({"INVALID_ARGUMENT", "HTTP_400", "HTTP_422"})
"""How a request that cannot be served must end."""
UNREAD = frozenset({"UNAVAILABLE", "HTTP_503", CUT})
"""Ends of requests that no server has looked at: they say nothing about what it would have refused."""


class Server(Protocol):
    """What checking needs of a `Target`."""

    async def send(self, ask: Ask, on_tokens: OnTokens) -> Answer:
        """See `Target`."""

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | None:
        """See `Target`."""


async def check(
    asks: Sequence[Ask],
    records: Sequence[Record],
    server: Server,
    *,
    must_match: bool,
    alone: int = 16,
    texts: int = 1000,
    at_once: int = 4,
    seed: int = 0,
) -> Checks:
    """Check a run that is over, by a server that is idle again.

    At most `alone` requests are asked once more, one at a time, and of at most `texts` completions, `at_once` together,
    the server says what their ids print. `seed` alone decides who is chosen. A server that gives no answer is not asked
    on, so that checking a dead one takes a deadline or two, not hundreds.
    """
    chance = random.Random(seed)  # noqa: S311  (a sample, not a secret)
    asked = pair(asks, records)
    heard = told(asked)
    printed = await _print(_sample([each for each in heard if each[1].ok], texts, chance), server, at_once)
    different = list({identity(ask): (ask, record) for ask, record in heard}.values())
    again = await _ask_alone(_sample(different, alone, chance), server)

    offsets = [f"request {record.number}: {record.error}" for _, record in asked if record.status == PROTOCOL]
    offsets += [f"request {ask.number}, alone: {answer.error}" for ask, _, answer in again if answer.status == PROTOCOL]
    wrong_texts = [sentence for ask, record, text in printed if (sentence := wrong_text(ask, record, text))]
    lonely = agreement(
        (f"request {ask.number} under load and alone", record, answer)
        for ask, record, answer in again
        if answer.status == OK
    )
    same = repeats(asked)
    accepted = [
        f"request {ask.number} had to be refused and ended with {record.status}"
        for ask, record in asked
        if ask.conduct is Conduct.BAD and record.status not in REFUSALS | UNREAD
    ]
    kinds = (offsets, wrong_texts, lonely.examples, same.examples, accepted)
    return Checks(
        offsets_wrong=len(offsets),
        texts_checked=len(printed),
        texts_wrong=len(wrong_texts),
        alone_checked=lonely.checked,
        alone_wrong=lonely.wrong,
        alone_unanswered=sum(answer.status not in (OK, PROTOCOL) for _, _, answer in again),
        repeats_checked=same.checked,
        repeats_wrong=same.wrong,
        bad_accepted=len(accepted),
        must_match=must_match,
        examples=tuple(sentence for kind in kinds for sentence in kind[:EXAMPLES]),
    )


def findings_of_checks(checks: Checks) -> tuple[Finding, ...]:
    """What the reader must know of them."""
    faults = (
        (checks.offsets_wrong, f"{checks.offsets_wrong} streams contradicted themselves"),
        (checks.texts_wrong, f"{checks.texts_wrong} of {checks.texts_checked} texts are not what their ids print"),
        (
            checks.bad_accepted,
            f"{checks.bad_accepted} requests that had to be refused were not, or not in the right way",
        ),
    )
    lonely = Agreement(checked=checks.alone_checked, wrong=checks.alone_wrong)
    same = Agreement(checked=checks.repeats_checked, wrong=checks.repeats_wrong)
    found = [Finding(severity=Severity.WRONG, text=text) for count, text in faults if count]
    found += disagreement("got other tokens under load than alone", lonely, must_match=checks.must_match)
    found += disagreement("got other tokens than the same request before", same, must_match=checks.must_match)
    if checks.alone_unanswered:
        text = f"after the run the server left a request unanswered; {checks.alone_checked} were compared with it alone"
        found.append(Finding(severity=Severity.NOTE, text=text))
    return tuple(found)


def disagreement(what: str, found: Agreement, *, must_match: bool) -> tuple[Finding, ...]:
    """A fault where the model's rows are independent of their company, else a share that is reported."""
    if not found.wrong:
        return ()
    share = f"{found.wrong} of {found.checked} requests ({found.wrong / found.checked:.1%}) {what}"
    if must_match:
        return (Finding(severity=Severity.WRONG, text=f"{share}, and the model is row-invariant"),)
    return (Finding(severity=Severity.NOTE, text=f"{share}; the model does not promise row invariance"),)


async def _print(asked: Sequence[Asked], server: Server, at_once: int) -> list[tuple[Ask, Record, str]]:
    """What the server says that each completion's ids print."""
    waiting, printed = iter(asked), list[tuple[Ask, Record, str]]()

    async def ask_on() -> None:
        for ask, record in waiting:
            # The id that ends a completion prints nothing, whatever its text is elsewhere.
            ids = record.token_ids[:-1] if record.finish_reason == FinishReason.STOP_TOKEN else record.token_ids
            text = await server.detokenize(ids) if ids else ""
            if text is None:
                return
            printed.append((ask, record, text))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(ask_on())
    return printed


async def _ask_alone(asked: Sequence[Asked], server: Server) -> list[tuple[Ask, Record, Answer]]:
    """Each again, with nobody beside it, as far as its client listened; until one is not answered."""

    async def read_on(tokens: int) -> None: ...

    again = []
    for ask, record in asked:
        tokens = ask.max_tokens if record.ok else len(record.token_ids)
        alone = replace(ask, conduct=Conduct.NORMAL, cancel_after=0, pause_s=0.0, max_tokens=tokens)
        answer = await server.send(alone, read_on)
        again.append((ask, record, answer))
        if answer.status not in (OK, PROTOCOL):
            break
    return again


def _sample(all_of_them: Sequence[T], most: int, chance: random.Random) -> Sequence[T]:
    return chance.sample(all_of_them, min(most, len(all_of_them)))
