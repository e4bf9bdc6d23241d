"""Faults planted in the real service are found by the harness: router, stages, gateway and gRPC in this process.

An honest run comes first, with the same requests, so that what is found is the fault and nothing else. The model is
said to be row-invariant: in float32 on one thread its tokens are the same in any company.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from fake_pipeline import serving
from local_pipeline import LocalPipeline

from tramontane.client.loadtest.finding import Severity
from tramontane.client.loadtest.generator.asking_again import ask_again
from tramontane.client.loadtest.generator.grpc_target import GrpcTarget
from tramontane.client.loadtest.generator.target import TargetOptions
from tramontane.client.loadtest.judging.agreement import pair
from tramontane.client.loadtest.judging.checks import check, findings_of_checks
from tramontane.client.loadtest.plan import Ask
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import Checks
from tramontane.cluster.completion import Completion
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.text import StopStrings
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.stages.config import ModelConfig
from tramontane.stages.folder import SmallFiles
from tramontane.stages.microbatch import BlockTable, Microbatch
from tramontane.stages.stage import Stage

BLOCK = 16
LINES = (
    "KING RICHARD: Now is the winter of our discontent, made glorious summer by this sun of York",
    "ROMEO: But, soft! what light through yonder window breaks? It is the east, and Juliet is the sun",
    "HAMLET: To be, or not to be: that is the question: whether 'tis nobler in the mind to suffer",
    "MARK ANTONY: Friends, Romans, countrymen, lend me your ears; I come to bury Caesar, not to praise him",
)
ASKS = [
    Ask(
        number=number,
        prompt=LINES[number % 4],
        max_tokens=24,
        temperature=1.0 if number >= 4 else 0.0,
        seed=7,
        stop=(" the", "e"),
    )
    for number in range(8)
]


@asynccontextmanager
async def embedded_service(folder) -> AsyncIterator[GrpcTarget]:
    config = ModelConfig.load(folder)
    tokenizer = Tokenizer.load(folder, config)
    model = ServedModel(
        name="embedded",
        config=config,
        context=config.context,
        dtype="float32",
        stages=2,
        version="v-embedded",
        row_invariant=True,
        vocabulary=Vocabulary.read(SmallFiles.read(folder), config.vocab, tokenizer),
        tokenizer=tokenizer,
    )
    async with (
        LocalPipeline(folder, [4, 4], block=BLOCK) as local,
        serving(local.pipeline, model=model) as (_, address),
    ):
        target = GrpcTarget(TargetOptions(address=address))
        yield target
        await target.close()


async def loaded(target: GrpcTarget, asks: list[Ask]) -> list[Record]:
    """All at once."""

    async def one(ask: Ask) -> Record:
        async def read_on(tokens: int) -> None: ...

        answer = await target.send(ask, read_on)
        return Record(
            number=ask.number,
            intended_s=0.0,
            sent_s=0.0,
            message_times_s=(),
            message_tokens=(),
            ended_s=1.0,
            status=answer.status,
            error=answer.error,
            finish_reason=answer.finish_reason,
            token_ids=answer.token_ids,
            text=answer.text,
        )

    return await asyncio.gather(*map(one, asks))


async def found(folder, asks: list[Ask], heal: Callable[[], None] = lambda: None) -> Checks:
    """What the checks say of one run; `heal` comes between the load and them."""
    async with embedded_service(folder) as target:
        records = await loaded(target, asks)
        heal()
        asked = pair(asks, records)
        again = await ask_again(asked, target)
        return check(asked, again, must_match=(await target.describe()).row_invariant)


def without_stops(asks: list[Ask]) -> list[Ask]:
    return [replace(ask, stop=(), ignore_eos=True) for ask in asks]


@pytest.mark.parametrize("asks", [ASKS, without_stops(ASKS)], ids=["with stops", "without"])
async def test_an_honest_service_is_found_right(embedded_dir, asks):
    checks = await found(embedded_dir, asks)
    assert findings_of_checks(checks) == ()
    assert (checks.texts_checked, checks.alone_checked, checks.alone_unanswered) == (8, 8, 0)


async def test_a_leak_of_another_requests_keys_is_found(embedded_dir, monkeypatch):
    """The stages read the first block of a decoding request in another one's table."""
    honest = Stage.forward
    leaks = []

    def leaking(table: BlockTable) -> BlockTable:
        blocks, last = table.blocks.copy(), int(table.held[:-1].sum())
        blocks[last] = blocks[0]
        return replace(table, blocks=blocks)

    def forward(stage: Stage, microbatch: Microbatch):
        if len(microbatch.first) > 1 and np.all(microbatch.first >= BLOCK):
            leaks.append(microbatch.step)
            microbatch = replace(microbatch, tables=tuple(map(leaking, microbatch.tables)))
        return honest(stage, microbatch)

    monkeypatch.setattr(Stage, "forward", forward)
    checks = await found(embedded_dir, without_stops(ASKS))
    assert leaks, "nobody decoded together"
    assert checks.alone_wrong > 0
    assert checks.texts_wrong == checks.offsets_wrong == 0
    assert findings_of_checks(checks)[0].severity is Severity.WRONG
    assert "got other tokens under load than alone" in findings_of_checks(checks)[0].text


async def test_offsets_off_by_one_are_found(embedded_dir, monkeypatch):
    honest = Completion.take

    def take(completion: Completion):
        event = honest(completion)
        event.delta.offset += event.delta.offset > 0
        return event

    monkeypatch.setattr(Completion, "take", take)
    checks = await found(embedded_dir, without_stops(ASKS), heal=monkeypatch.undo)
    assert checks.offsets_wrong == 8
    assert findings_of_checks(checks)[0].severity is Severity.WRONG


async def test_a_stop_string_that_is_said_is_found(embedded_dir, monkeypatch):
    """The completion ends where it should, and the client hears what ended it."""
    honest = StopStrings.push

    def push(strings: StopStrings, text: str, *, match: bool = True) -> str:
        said = honest(strings, text, match=match)
        return said + "e" if strings.found else said

    monkeypatch.setattr(StopStrings, "push", push)
    checks = await found(embedded_dir, ASKS)
    assert checks.texts_wrong > 0
    assert checks.alone_wrong == 0
