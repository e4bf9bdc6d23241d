"""Were the answers right? Speed is worth nothing where the load changes what is said.

After a run its records are held against each other, and some against what the server says when it is asked again
(`asking_again.py`): what the ids print, and what a request gets when it is alone. Our own service promises the same
tokens in any company where it declares `row_invariant`; elsewhere rounding may tip a close choice, so there a mismatch
is reported, not condemned.
"""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.generator.asking_again import Again
from tramontane.client.loadtest.judging.agreement import (
    EXAMPLES,
    Agreement,
    Asked,
    agreement,
    repeats,
    wrong_text,
)
from tramontane.client.loadtest.plan import Conduct
from tramontane.client.loadtest.record import CUT, OK, PROTOCOL, REFUSED, STREAM_ERROR, UNREADABLE
from tramontane.client.loadtest.result import Checks

REFUSALS = frozenset({"INVALID_ARGUMENT", "HTTP_400", "HTTP_422", STREAM_ERROR})
"""How a request that cannot be served must end."""
UNREAD = frozenset({"UNAVAILABLE", "HTTP_503", CUT, UNREADABLE}) | REFUSED
"""Ends of requests that no server has looked at, or that nobody could read: they say nothing about what it would have
refused."""


def check(asked: Sequence[Asked], again: Again, *, must_match: bool) -> Checks:
    """Check a run that is over: its requests with their records, and what the server said when it was asked again."""
    offsets = [f"request {record.number}: {record.error}" for _, record in asked if record.status == PROTOCOL]
    offsets += [
        f"request {ask.number}, alone: {answer.error}" for ask, _, answer in again.alone if answer.status == PROTOCOL
    ]
    wrong_texts = [sentence for ask, record, text in again.printed if (sentence := wrong_text(ask, record, text))]
    lonely = agreement(
        (f"request {ask.number} under load and alone", record, answer)
        for ask, record, answer in again.alone
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
        texts_checked=len(again.printed),
        texts_wrong=len(wrong_texts),
        alone_checked=lonely.checked,
        alone_wrong=lonely.wrong,
        alone_unanswered=sum(answer.status not in (OK, PROTOCOL) for _, _, answer in again.alone),
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
