"""Wrong answers under load are found: planted faults, each by the check that is there for it, and no false alarms."""

from __future__ import annotations

from dataclasses import replace

import fake_server
import pytest

from tramontane.client.loadtest.finding import Severity
from tramontane.client.loadtest.generator.asking_again import Server, ask_again
from tramontane.client.loadtest.generator.grpc_target import GrpcTarget
from tramontane.client.loadtest.generator.target import Answer, TargetOptions
from tramontane.client.loadtest.judging.agreement import across_levels, first_difference, identity, pair
from tramontane.client.loadtest.judging.checks import check, disagreement, findings_of_checks
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import CUT, LEFT, OK, PROTOCOL, STREAM_ERROR, UNREADABLE, Record
from tramontane.client.loadtest.result import Checks
from tramontane.protos import serving_pb2

EOS = 2


class CountingServer:
    """Goes on counting from a prompt's last id, up to a stop string or its tokens' number. Ids are code points."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.detokenized: list[tuple[int, ...]] = []
        self.alive = True

    async def send(self, ask, on_tokens):
        self.asked.append(ask)
        if not self.alive:
            return Answer(status="UNAVAILABLE", error="nobody is there")
        await on_tokens(ask.max_tokens)
        return Answer(status=OK, token_ids=honest(ask).token_ids)

    async def detokenize(self, token_ids):
        self.detokenized.append(token_ids)
        return "".join(map(chr, token_ids)) if self.alive else None


def honest(ask: Ask, **changes: object) -> Record:
    """What a client hears of the counting server."""
    ids: list[int] = []
    text, reason = "", "length"
    while len(ids) < ask.max_tokens and reason == "length":
        ids.append(ord(ask.prompt[-1]) + 1 + len(ids))
        text += chr(ids[-1])
        for string in ask.stop:
            if text.endswith(string):
                text, reason = text.removesuffix(string), "stop_string"
    return replace(answered(ask.number, tuple(ids), text, reason), **changes)


def answered(number: int, ids: tuple[int, ...], text: str, reason: str = "length", status: str = OK) -> Record:
    return Record(
        number=number,
        intended_s=0.0,
        sent_s=0.0,
        message_times_s=tuple(0.1 * (n + 1) for n in range(len(ids))),
        message_tokens=(1,) * len(ids),
        ended_s=1.0,
        status=status,
        completion_tokens=len(ids),
        finish_reason=reason,
        token_ids=ids,
        text=text,
    )


def asks_for(*prompts: str, **options: object) -> list[Ask]:
    return [Ask(number=n, prompt=prompt, **{"max_tokens": 4, **options}) for n, prompt in enumerate(prompts)]


async def checked(
    asks: list[Ask], records: list[Record], server: Server | None = None, *, must_match: bool = True, **options
) -> Checks:
    asked = pair(asks, records)
    return check(asked, await ask_again(asked, server or CountingServer(), **options), must_match=must_match)


async def test_an_honest_run_is_found_right():
    asks = asks_for("a", "k", "a", stop=("no",))
    server = CountingServer()
    found = await checked(asks, [honest(ask) for ask in asks], server)
    assert found == Checks(
        offsets_wrong=0,
        texts_checked=3,
        texts_wrong=0,
        alone_checked=2,  # "a" was asked twice, and is asked again once
        alone_wrong=0,
        repeats_checked=1,
        repeats_wrong=0,
        bad_accepted=0,
        must_match=True,
    )
    assert findings_of_checks(found) == ()
    assert sorted(ask.prompt for ask in server.asked) == ["a", "k"]


# Tokens


async def test_another_requests_tokens_are_found_alone():
    """As if keys of "k" had been left in the blocks that "a" got."""
    asks = asks_for("a", "k")
    leaked = answered(0, (98, 99, 110, 111), "bcno")
    found = await checked(asks, [leaked, honest(asks[1])])
    assert (found.alone_checked, found.alone_wrong, found.texts_wrong) == (2, 1, 0)
    assert found.examples == ("request 0 under load and alone differ from token 2",)
    (finding,) = findings_of_checks(found)
    assert finding.severity is Severity.WRONG
    assert "1 of 2 requests (50.0%) got other tokens under load than alone" in finding.text


async def test_without_row_invariance_the_share_is_a_note():
    asks = asks_for("a", "k")
    found = await checked(asks, [answered(0, (98, 7), "b\x07"), honest(asks[1])], must_match=False)
    (finding,) = findings_of_checks(found)
    assert finding.severity is Severity.NOTE
    assert "50.0%" in finding.text


async def test_requests_that_are_the_same_get_the_same():
    asks = [
        *asks_for("a", "a", "a", "a"),
        Ask(number=4, prompt="a", max_tokens=4, seed=9, top_k=3),  # greedy all the same
        Ask(number=5, prompt="a", max_tokens=4, seed=9, temperature=1.0),  # another request
    ]
    records = [honest(ask) for ask in asks]
    records[0] = honest(asks[0], status=LEFT, token_ids=(98, 99), text="bc")
    records[2] = answered(2, (98, 99, 7, 101), "bc\x07e")
    records[5] = answered(5, (4, 4, 4, 4), "\x04" * 4)
    found = await checked(asks, records, alone=0)
    assert (found.repeats_checked, found.repeats_wrong) == (4, 1)
    assert found.examples == ("requests 1 and 2, which are the same, differ from token 2",)


async def test_a_request_that_was_left_is_compared_as_far_as_it_came():
    (ask,) = asks_for("a", conduct=Conduct.CANCEL, cancel_after=2, max_tokens=1000)
    server = CountingServer()
    left = honest(ask, status=LEFT, token_ids=(98, 99), text="b")
    found = await checked([ask], [left], server)
    assert (found.texts_checked, found.alone_checked, found.alone_wrong) == (0, 1, 0)
    assert [(again.max_tokens, again.conduct, again.cancel_after) for again in server.asked] == [(2, Conduct.NORMAL, 0)]
    assert (await checked([ask], [replace(left, token_ids=(98, 7))])).alone_wrong == 1


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        (((5, 6), OK), ((5, 6), OK), None),
        (((5, 6), OK), ((5, 7), OK), 1),
        (((5, 6), OK), ((5, 6, 7), OK), 2),
        (((5, 6), LEFT), ((5, 6, 7), OK), None),
        (((5, 6), OK), ((5, 6, 7), LEFT), 2),
        (((5, 6), CUT), ((5, 6, 7), LEFT), None),
    ],
)
def test_only_what_broke_off_may_be_shorter(one, other, place):
    records = [answered(0, ids, "", status=status) for ids, status in (one, other)]
    assert first_difference(*records) == first_difference(*reversed(records)) == place


def test_what_decides_tokens_is_the_identity():
    ask = Ask(number=3, prompt="a", max_tokens=4, temperature=0.5, seed=1, conduct=Conduct.SLOW, pause_s=1.0)
    assert identity(ask) == identity(replace(ask, number=8, conduct=Conduct.CHURN, pause_s=0.0))
    for change in ({"seed": 2}, {"max_tokens": 5}, {"prompt": "b"}, {"top_p": 0.5}, {"stop": ("x",)}):
        assert identity(ask) != identity(replace(ask, **change))


def test_a_request_gets_the_same_at_every_level():
    low, high = asks_for("a", "k"), asks_for("a", "k", "p")
    right = {"1/s": (low, [honest(ask) for ask in low]), "9/s": (high, [honest(ask) for ask in high])}
    assert (across_levels(right).checked, across_levels(right).wrong) == (2, 0)

    crowded = [*right["9/s"][1][:1], answered(1, (108, 98, 99, 100), "lbcd")]
    found = across_levels({**right, "9/s": (high, crowded)})
    assert (found.checked, found.wrong) == (2, 1)
    assert found.examples == ("request 1 at 1/s and at 9/s differ from token 1",)
    (finding,) = disagreement("got other tokens at another level", found, must_match=True)
    assert finding.severity is Severity.WRONG


async def test_the_choice_of_who_is_asked_again_hangs_on_the_seed():
    asks = asks_for(*map(chr, range(100, 200)))
    records = [honest(ask) for ask in asks]
    chosen = []
    for seed in (1, 1, 2):
        server = CountingServer()
        await checked(asks, records, server, alone=5, texts=7, seed=seed)
        chosen.append(([ask.number for ask in server.asked], set(server.detokenized)))
        assert [len(each) for each in chosen[-1]] == [5, 7]
    assert chosen[0] == chosen[1] != chosen[2]


# Texts


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        (answered(0, (98, 99), "bc"), False),
        (answered(0, (98, 99), "b"), True),
        (answered(0, (98, 99), "bd"), True),
        (answered(0, (98, 99, EOS), "bc", "stop_token"), False),
        (answered(0, (98, 99, EOS), "bc\x02", "stop_token"), True),
        (answered(0, (EOS,), "", "stop_token"), False),
        (answered(0, (98, 120, 121), "b", "stop_string"), False),
        (answered(0, (98, 120, 121), "bx", "stop_string"), True),
        (answered(0, (98, 120, 121, 99), "bxyc"), True),  # went on after its stop string
        (answered(0, (98, 99), "b", "stop_string"), True),  # and one that ended without
    ],
)
async def test_text_is_what_the_ids_print_up_to_the_stop_string(record, wrong):
    found = await checked(asks_for("a", stop=("xy", "z")), [record], alone=0)
    assert (found.texts_checked, found.texts_wrong) == (1, wrong)


async def test_a_wrong_text_is_shown_where_it_goes_wrong():
    found = await checked(asks_for("a"), [answered(0, tuple(b"the king is"), "the ring is")], alone=0)
    assert found.examples == ("request 0 said 'ring is' at character 4, and its ids print 'king is'",)
    assert findings_of_checks(found)[0].severity is Severity.WRONG


# Refusals


@pytest.mark.parametrize(
    ("status", "accepted"),
    [
        *(("INVALID_ARGUMENT", 0), ("HTTP_422", 0), (STREAM_ERROR, 0), ("UNAVAILABLE", 0), ("HTTP_429", 0)),
        *(("RESOURCE_EXHAUSTED", 0), (UNREADABLE, 0), (OK, 1), ("INTERNAL", 1), (PROTOCOL, 1)),
    ],
)
async def test_what_cannot_be_served_must_be_refused(status, accepted):
    found = await checked(asks_for("", conduct=Conduct.BAD), [answered(0, (), "", status=status)])
    assert found.bad_accepted == accepted


async def test_a_dead_server_is_not_asked_on():
    asks = asks_for(*map(chr, range(100, 200)))
    server = CountingServer()
    server.alive = False
    found = await checked(asks, [honest(ask) for ask in asks], server, at_once=3)
    assert (found.texts_checked, found.alone_checked, found.alone_unanswered) == (0, 0, 1)
    assert len(server.detokenized) <= 3
    assert len(server.asked) == 1
    assert [finding.severity for finding in findings_of_checks(found)] == [Severity.NOTE]


# Over gRPC


def off_by_one(request, context):
    """A server that counts offsets from 1 after its first token."""
    yield serving_pb2.GenerateEvent(started=fake_server.started(request), delta=fake_server.delta(0, 98))
    yield serving_pb2.GenerateEvent(delta=fake_server.delta(2, 99))


async def through(target: GrpcTarget, ask: Ask) -> Record:
    async def read_on(tokens: int) -> None: ...

    answer = await target.send(ask, read_on)
    record = answered(ask.number, answer.token_ids, answer.text, answer.finish_reason, answer.status)
    return replace(record, error=answer.error)


async def test_offsets_off_by_one_are_found(server):
    asks = asks_for("a", "k")
    target = GrpcTarget(TargetOptions(address=server.target))
    server.plans.append(off_by_one)
    found = await checked(asks, [await through(target, ask) for ask in asks], target)
    await target.close()
    assert (found.offsets_wrong, found.texts_checked, found.texts_wrong, found.alone_checked) == (1, 1, 0, 1)
    assert found.examples == ("request 0: tokens came with offset 2 after 1 tokens",)
    assert findings_of_checks(found)[0].severity is Severity.WRONG


async def test_a_server_that_contradicts_itself_only_later_is_found_too(server):
    asks = asks_for("a")
    target = GrpcTarget(TargetOptions(address=server.target))
    records = [await through(target, ask) for ask in asks]
    server.plans.append(off_by_one)
    found = await checked(asks, records, target)
    await target.close()
    assert (found.offsets_wrong, found.alone_checked, found.alone_unanswered) == (1, 0, 0)
