"""The harness against OpenAI-compatible servers: what it sends, and what it makes of every way in which they answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_openai import FakeOpenAI, content, end

from tramontane.client.loadtest.generator.openai_target import LINE_LIMIT_BYTES, OpenAITarget
from tramontane.client.loadtest.generator.target import Answer, Leave, TargetOptions
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import LEFT, OK, PROTOCOL

ASK = Ask(number=0, prompt="To be", max_tokens=8, temperature=0.5, seed=3)


async def send(script: object = None, ask: Ask = ASK, *, leave_after: int = 99, **options) -> tuple[Answer, FakeOpenAI]:
    fake = FakeOpenAI()
    if script is not None:
        fake.scripts.append(script)
    seen: list[int] = []

    async def on_tokens(count: int) -> None:
        seen.append(count)
        if len(seen) >= leave_after:
            raise Leave

    async with fake.serve() as address:
        target = OpenAITarget(TargetOptions(address=address, **options))
        try:
            await target.describe()
            answer = await target.send(ask, on_tokens)
        finally:
            await target.close()
        fake.seen = seen
    return answer, fake


async def test_a_completion():
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    answer, fake = await send(
        [content("Or "), content("not"), end("stop"), {"choices": [], "usage": usage}, "data: [DONE]\n\n"]
    )
    assert answer == Answer(status=OK, prompt_tokens=3, completion_tokens=4, finish_reason="stop", text="Or not")
    assert fake.seen == [1, 1]
    assert fake.bodies == [
        {
            "model": "tiny",
            "prompt": "To be",
            "max_tokens": 8,
            "temperature": 0.5,
            "seed": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_what_is_optional_is_sent_when_it_is_set():
    _, fake = await send(
        ask=replace(ASK, prompt=(5, 6), top_k=4, top_p=0.5, stop=("x",), ignore_eos=True), model="other"
    )
    assert (
        fake.bodies[0].items()
        >= {"model": "other", "prompt": [5, 6], "top_k": 4, "top_p": 0.5, "stop": ["x"], "ignore_eos": True}.items()
    )


async def test_chat():
    delta = {"choices": [{"delta": {"role": "assistant"}}]}
    answer, fake = await send([delta, {"choices": [{"delta": {"content": "hi"}}]}, end()], chat=True)
    assert (answer.text, answer.status) == ("hi", OK)
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "To be"}]
    assert fake.seen == [1]


async def test_a_server_that_does_not_count_is_counted_by_messages():
    answer, _ = await send([content("a"), content("b"), content("c"), end()])
    assert answer.completion_tokens == 3


@pytest.mark.parametrize(
    ("script", "status", "says"),
    [
        (400, "HTTP_400", "no"),
        (503, "HTTP_503", "no"),
        ([content("a")], PROTOCOL, "without a finish_reason"),
        ([content("a"), "data: {broken\n\n"], PROTOCOL, ""),
        ([content("a"), "data: 7\n\n"], PROTOCOL, "no JSON object"),
        ([content("a"), {"error": {"message": "out of memory"}}], PROTOCOL, "out of memory"),
        (["data: " + "x" * 2 * LINE_LIMIT_BYTES + "\n\n"], PROTOCOL, ""),
        ([content("a"), 5.0], "DEADLINE_EXCEEDED", "0.5 s"),
    ],
)
async def test_every_bad_end_is_an_answer(script, status, says):
    answer, _ = await send(script, timeout_s=0.5)
    assert answer.status == status
    assert says in answer.error


async def test_comments_and_other_fields_are_passed_over():
    answer, _ = await send([": keep-alive\n\n", "event: x\n", content("a"), end()])
    assert (answer.status, answer.text) == (OK, "a")


async def test_leaving_closes_the_connection():
    answer, fake = await send([content("a"), content("b"), *[0.05, content("c")] * 100, end()], leave_after=2)
    assert (answer.status, answer.text) == (LEFT, "ab")
    assert fake.left == 1


async def test_who_churns_has_a_connection_of_its_own():
    fake = FakeOpenAI()
    async with fake.serve() as address:
        target = OpenAITarget(TargetOptions(address=address))
        for conduct in (Conduct.NORMAL, Conduct.NORMAL, Conduct.CHURN, Conduct.CHURN):
            assert (await target.send(replace(ASK, conduct=conduct), _ignore)).status == OK
        await target.close()
    assert len(set(fake.peers)) == 3


async def test_the_key_goes_with_every_call(tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    _, fake = await send(token_file=str(tmp_path / "key"))
    assert [headers["Authorization"] for headers in fake.headers] == ["Bearer sesame"] * 2


def test_the_key_does_not_leave_the_machine_in_clear(tmp_path):
    (tmp_path / "key").write_text("sesame")
    key = {"token_file": str(tmp_path / "key")}
    with pytest.raises(ValueError, match="in clear"):
        OpenAITarget(TargetOptions(address="http://10.0.0.1:80/v1", **key))
    for address in ("https://10.0.0.1/v1", "http://127.0.0.1:80/v1", "http://localhost/v1"):
        OpenAITarget(TargetOptions(address=address, **key))
    OpenAITarget(TargetOptions(address="http://10.0.0.1:80/v1", clear_token=True, **key))


async def test_a_server_that_is_not_there_or_has_another_model_is_named():
    target = OpenAITarget(TargetOptions(address="http://127.0.0.1:9/v1"))
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        await target.describe()
    assert (await target.send(ASK, _ignore)).status == "UNAVAILABLE"
    await target.close()
    with pytest.raises(ConnectionError, match="serves tiny, other, and model is 'large'"):
        await send(model="large")


async def _ignore(count: int) -> None:
    await asyncio.sleep(0)
