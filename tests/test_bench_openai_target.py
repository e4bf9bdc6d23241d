"""The harness against OpenAI-compatible servers: what it sends, and what it makes of every way in which they answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from fake_openai import FakeOpenAI, content, end

from tramontane.client.loadtest.generator.openai_target import OpenAITarget
from tramontane.client.loadtest.generator.server_sent_events import EVENT_LIMIT_BYTES
from tramontane.client.loadtest.generator.target import Answer, Leave, TargetOptions
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import INCOMPLETE, LEFT, OK, STREAM_ERROR, UNREADABLE

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
    assert fake.bodies == [{"model": "tiny", "prompt": "To be", "max_tokens": 8, "temperature": 0.5, "stream": True}]


async def test_what_is_optional_is_sent_when_it_is_set():
    _, fake = await send(ask=replace(ASK, prompt=(5, 6), top_k=4, top_p=0.5, stop=("x",)), model="other")
    assert (
        fake.bodies[0].items() >= {"model": "other", "prompt": [5, 6], "top_k": 4, "top_p": 0.5, "stop": ["x"]}.items()
    )


@pytest.mark.parametrize(
    ("owner", "asked", "sent"),
    [
        (None, (), set()),  # Mistral's own API answers 422 to fields that it does not know
        ("mistralai", (), set()),
        ("mistralai", ("seed", "ignore_eos"), {"seed", "ignore_eos"}),
        ("openai", (), {"seed", "stream_options"}),
        ("vllm", (), {"seed", "stream_options", "ignore_eos"}),
        ("llamacpp", ("seed",), {"seed", "stream_options", "ignore_eos"}),
    ],
)
async def test_what_servers_may_refuse_is_sent_where_it_is_asked_or_known_to_be_taken(owner, asked, sent):
    fake = FakeOpenAI(owner)
    async with fake.serve() as address:
        target = OpenAITarget(TargetOptions(address=address, send=asked))
        info = await target.describe()
        await target.send(replace(ASK, ignore_eos=True), _ignore)
        await target.send(ASK, _ignore)
        await target.close()
    optional = {"seed": 3, "stream_options": {"include_usage": True}, "ignore_eos": True}
    with_eos, without = fake.bodies
    assert {name: value for name, value in with_eos.items() if name in optional} == {
        name: value for name, value in optional.items() if name in sent
    }
    assert without.keys() & optional.keys() == sent - {"ignore_eos"}
    assert set(info.unsent) == optional.keys() - sent


async def test_chat():
    delta = {"choices": [{"delta": {"role": "assistant"}}]}
    answer, fake = await send([delta, {"choices": [{"delta": {"content": "hi"}}]}, end()], chat=True)
    assert (answer.text, answer.status) == ("hi", OK)
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "To be"}]
    assert fake.seen == [1]


async def test_a_server_that_does_not_count_is_not_counted_for():
    answer, fake = await send([content("a"), content("b"), content("c"), end()])
    assert answer.completion_tokens == 0
    assert fake.seen == [1, 1, 1]


@pytest.mark.parametrize(
    ("script", "status", "says"),
    [
        (400, "HTTP_400", "no"),
        (503, "HTTP_503", "no"),
        (429, "HTTP_429", "no"),
        ([content("a")], INCOMPLETE, "neither a finish_reason nor [DONE]"),
        ([content("a"), "data: {cut"], INCOMPLETE, "neither"),
        ([content("a"), "data: {broken\n\n"], UNREADABLE, "Expecting"),
        ([content("a"), "data: 7\n\n"], UNREADABLE, "no JSON object"),
        (["data: " + "[" * 100_000 + "\n\n"], UNREADABLE, "recursion"),
        (["data: " + "x" * 2 * EVENT_LIMIT_BYTES + "\n\n"], UNREADABLE, "longer than 1,048,576 bytes"),
        ([content("a"), {"error": {"message": "out of memory"}}], STREAM_ERROR, "in the stream: out of memory"),
        ([content("a"), {"error": "overloaded", "error_type": "overloaded"}], STREAM_ERROR, "overloaded"),
        ([{"error": {"code": 400, "message": "too long"}}], "HTTP_400", "in the stream: too long"),
        ([{"error": {"code": "429", "message": "later"}}], "HTTP_429", "later"),
        ([{"error": {"code": "rate_limit_exceeded", "message": "later"}}], STREAM_ERROR, "later"),
        ([{"object": "error", "message": "too long", "code": 400}], "HTTP_400", "too long"),
        (["event: error\n", "data: gone\n\n"], STREAM_ERROR, "gone"),
        (["event: error\n", {"detail": "gone"}], STREAM_ERROR, "gone"),
        ([{"error": {"param": 7}}], STREAM_ERROR, '{"param": 7}'),
        ([content("a"), 5.0], "DEADLINE_EXCEEDED", "0.5 s"),
    ],
)
async def test_every_bad_end_is_an_answer(script, status, says):
    answer, _ = await send(script, timeout_s=0.5)
    assert answer.status == status
    assert says in answer.error


async def test_a_long_error_is_read_whole_and_told_in_part():
    answer, _ = await send((500, json.dumps({"error": {"message": "m" * 400, "trace": "t" * 70_000}})))
    assert (answer.status, answer.error) == ("HTTP_500", "m" * 300)
    answer, _ = await send((500, "<html>" + "x" * 1000))
    assert answer.error == "<html>" + "x" * 294


@pytest.mark.parametrize(
    "script",
    [
        ["data: \n\n", content("Or not"), "data:\n\n", end()],
        [": keep-alive\n\n", "event: x\n", content("Or not"), end()],
        ['data: {"choices":\ndata: [{"text": "Or not"}]}\n\n', end()],
        ['data:{"choices":[{"text":"Or not"}]}\r\n\r\n', end()],
        ['data: {"choices": [{"text": "Or not", "logprob": -Infinity}]}\n\n', end()],
        ["data: null\n\n", content("Or not"), end(), "data: [DONE]"],
        [{"choices": None, "error": None, "usage": None}, content("Or not"), end()],
        [{"choices": [None]}, {"choices": [{"text": None, "delta": None}]}, content("Or not"), end()],
        [{"choices": [{"delta": {"content": [{"type": "text", "text": "Or "}, {"text": "not"}]}}]}, end()],
        [{"choices": [{"message": {"content": "Or not"}}], "x_extra": {"deep": [1]}}, end()],
        [{"choices": [{"delta": {"content": None, "reasoning_content": "Or not"}}]}, end()],
        [content("Or not"), "data: [DONE]\n\n"],
        [content("Or not"), end(prompt_tokens=None, completion_tokens=2.5)],
        ['data: {"choices": [{"text": "Or not", "finish_reason": "length"}]}'],
    ],
)
async def test_what_servers_really_send_is_a_completion(script):
    answer, _ = await send(script)
    assert (answer.status, answer.text, answer.error) == (OK, "Or not", "")


async def test_a_server_that_does_not_stream_sends_one_message():
    whole = {
        "choices": [{"message": {"content": "Or not"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 2},
    }
    answer, fake = await send((200, json.dumps(whole)))
    assert (answer.status, answer.text, answer.completion_tokens, fake.seen) == (OK, "Or not", 2, [1])
    answer, _ = await send((200, '{"error": {"code": 400, "message": "no"}}'))
    assert answer.status == "HTTP_400"


async def test_half_a_character_does_not_spoil_a_record():
    answer, _ = await send(['data: {"choices": [{"text": "\\ud83d"}]}\n\n', end()])
    assert (answer.status, answer.text) == (OK, "?")


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


@pytest.mark.parametrize(
    ("listing", "model", "says"),
    [
        ((404, "none"), "mine", None),
        ((404, "none"), None, "serves nothing"),
        ((401, "{}"), "mine", "401"),
        ((200, "[]"), "mine", "models: "),
        ((200, '{"data": null}'), "mine", "models: "),
        ((200, '{"data": [null]}'), "mine", "models: "),
    ],
)
async def test_a_server_without_a_list_of_models_serves_what_it_is_asked_for(listing, model, says):
    fake = FakeOpenAI()
    fake.listing = listing
    async with fake.serve() as address:
        target = OpenAITarget(TargetOptions(address=address, model=model))
        if says is None:
            assert (await target.describe()).model == model
            assert (await target.send(ASK, _ignore)).status == OK
        else:
            with pytest.raises(ConnectionError, match=says):
                await target.describe()
        await target.close()


async def _ignore(count: int) -> None:
    await asyncio.sleep(0)
