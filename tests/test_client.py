"""The clients against a server that can be computed by hand: both flavours, errors, cancellation, contradictions."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable

import fake_server
import grpc
import pytest
from fake_server import events, finished, hold, started

from tramontane.client import (
    AsyncClient,
    Client,
    Completion,
    FinishReason,
    GenerateArguments,
    HealthStatus,
    ProtocolError,
    errors,
)
from tramontane.protos import serving_pb2

Event = serving_pb2.GenerateEvent


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_gives_deltas_and_then_the_facts(client):
    with client.stream("ab", max_tokens=3, seed=7, request_id="r-1") as stream:
        deltas = list(stream)
    assert [(d.text, d.token_ids, d.offset, d.log_probabilities) for d in deltas] == [
        ("c", (99,), 0, (0.0,)),
        ("d", (100,), 1, (-1.0,)),
        ("e", (101,), 2, (-2.0,)),
    ]
    assert (stream.request_id, stream.seed, stream.version) == ("r-1", 7, fake_server.VERSION)
    assert stream.finish_reason is FinishReason.LENGTH
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens, stream.usage.total_tokens) == (3, 3, 6)
    assert (stream.timings.queue_ms, stream.timings.prefill_ms, stream.timings.decode_ms) == (1.5, 20.0, 300.0)
    assert stream.completion.text == "cde"


async def test_generate_is_the_stream_collected_in_both_clients(server, client):
    arguments = {"max_tokens": 4, "seed": 7, "request_id": "r-1"}
    with client.stream([97], **arguments) as stream:
        assert [d.text for d in stream] == list("bcde")
    assert client.generate([97], **arguments) == stream.completion
    async with AsyncClient(server.target) as other:
        async with other.stream([97], **arguments) as async_stream:
            assert [d.text async for d in async_stream] == list("bcde")
        assert await other.generate([97], **arguments) == async_stream.completion == stream.completion
        assert await other.models() == client.models()
        assert await other.stats() == client.stats()
        assert await other.health() is client.health() is HealthStatus.SERVING
        assert await other.tokenize("ab", add_bos=False) == (97, 98)
        assert await other.detokenize([32, 97], continuation=True) == " a"


def test_small_calls(server, client):
    assert client.tokenize("ab") == (1, 97, 98)
    assert client.tokenize("ab", add_bos=False) == (97, 98)
    assert client.detokenize([32, 97]) == "a"
    assert client.detokenize([32, 97], continuation=True) == " a"
    counting, full = client.models()
    assert (counting.name, counting.window_tokens, full.window_tokens) == ("counting", 128, None)
    stats = client.stats()
    assert (stats.processes[0].pid, stats.stages[0].busy_ns, stats.routers[0].kv_blocks_total) == (7, 5, (9,))
    assert (stats.gateways[0].open_calls, stats.gateways[0].recent_own_stall_ms) == (2, 1.5)
    server.set_serving(False)
    assert client.health() is HealthStatus.NOT_SERVING
    assert client.health("tramontane.v1.Serving/counting") is HealthStatus.NOT_SERVING
    with pytest.raises(errors.NotFound):
        client.health("tramontane.v1.Serving/other")
    assert client.models()  # what there is can be asked while nothing serves


def test_every_argument_reaches_the_server_and_unset_ones_stay_unset(server, client):
    client.generate(
        "a",
        max_tokens=2,
        min_tokens=1,
        temperature=0.0,
        top_k=0,
        top_p=0.5,
        min_p=0.25,
        seed=0,
        stop="END",
        stop_ids=[5, 6],
        ignore_eos=True,
        model="counting",
        request_id="r-1",
    )
    assert server.seen[0].request == serving_pb2.GenerateRequest(
        model="counting",
        request_id="r-1",
        text="a",
        sampling=serving_pb2.Sampling(temperature=0.0, top_k=0, top_p=0.5, min_p=0.25, seed=0),
        stopping=serving_pb2.Stopping(max_tokens=2, min_tokens=1, strings=["END"], token_ids=[5, 6], ignore_eos=True),
    )
    client.generate("a", stop=["x", "y"], max_tokens=1)
    plain = server.seen[1].request
    assert list(plain.stopping.strings) == ["x", "y"]
    assert not any(plain.sampling.HasField(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    assert not plain.HasField("model")
    assert not plain.stopping.HasField("min_tokens")


def test_the_client_chooses_id_and_seed_and_another_one_each_time(server, client):
    first, second = client.generate("a", max_tokens=1), client.generate("a", max_tokens=1)
    assert first.request_id != second.request_id
    assert first.seed != second.seed
    assert [(seen.request.request_id, seen.request.sampling.seed) for seen in server.seen] == [
        (first.request_id, first.seed),
        (second.request_id, second.seed),
    ]


def test_every_call_has_a_deadline(server, client):
    client.generate("a", max_tokens=1)
    client.generate("a", max_tokens=1, timeout_s=50)
    client.tokenize("a")
    client.models()
    generate, shorter, tokenize, models = (seen.remaining_s for seen in server.seen)
    assert 250 < generate <= 303
    assert 0 < shorter <= 51  # gRPC rounds up on the wire
    assert 0 < tokenize <= 11
    assert 0 < models <= 11


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"prompt": "a", "top_k": -1}, ValueError, r"top_k is -1; it must lie in 0 .. 2\^32 - 1"),
        ({"prompt": "a", "seed": 2**64}, ValueError, r"seed is 18446744073709551616"),
        ({"prompt": [1, -2]}, ValueError, "prompt holds -2"),
        ({"prompt": "a\ud800"}, ValueError, r"prompt holds the lone surrogate U\+D800 at character 1"),
        ({"prompt": b"abc"}, TypeError, r"Client\.generate\(\): prompt must be text or token ids, not bytes"),
        ({"prompt": None}, TypeError, r"prompt must be text or token ids, not NoneType"),
        ({"prompt": "a", "stop_ids": [2**32]}, ValueError, "stop_ids holds 4294967296"),
        (
            {"prompt": "a", "stopp": "x"},
            TypeError,
            r"^Client\.generate\(\) got an unexpected keyword argument 'stopp'; did you mean 'stop'\?",
        ),
        ({"prompt": "a", "mode": "x"}, TypeError, "unexpected keyword argument 'mode'; did you mean 'model'"),
        ({"prompt": [1.5]}, TypeError, r"prompt\[0\] must be a whole number, not float"),
        ({"prompt": "a", "temperature": "hot"}, TypeError, "temperature must be a number, not str"),
        ({"prompt": "a", "top_k": "3"}, TypeError, "top_k must be a whole number, not str"),
        ({"prompt": "a", "ignore_eos": "no"}, TypeError, "ignore_eos must be True or False, not 'no'"),
        ({"prompt": "a", "stop": 5}, TypeError, "stop must be text, or several, not int"),
        ({"prompt": "a", "stop": ["x", 5]}, TypeError, r"stop\[1\] must be text, not int"),
        ({"prompt": "a", "stop_ids": 5}, TypeError, "stop_ids must be token ids, not int"),
        ({"prompt": "a", "model": 5}, TypeError, "model must be text, not int"),
        ({"prompt": "a", "request_id": 5}, TypeError, "request_id must be text, not int"),
        ({"prompt": "a", "timeout_s": None}, TypeError, r"Client\.generate\(\): timeout_s must be a number, not None"),
        ({"prompt": "a", "timeout_s": -1}, ValueError, "timeout_s is -1; it must be above 0"),
        ({"prompt": "a", "timeout_s": float("nan")}, ValueError, "timeout_s is nan"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_any_call(server, client, arguments, error, says):
    with pytest.raises(error, match=says):
        client.generate(**arguments)
    assert not server.seen


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        ("stream", ("a", {"seed": "x"}), r"stream\(\): seed must be a whole number, not str"),
        ("tokenize", (5, {}), r"tokenize\(\): text must be text, not int"),
        ("detokenize", ("abc", {}), r"detokenize\(\): ids must be token ids, not str"),
        ("health", (5, {}), r"health\(\): service must be text, not int"),
        ("stats", (None, {"timeout_s": "x"}), r"stats\(\): timeout_s must be a number, not str"),
    ],
)
async def test_type_errors_name_the_method_that_was_called(server, method, arguments, says):
    first, keywords = arguments
    positional = () if first is None else (first,)
    with Client(server.target) as client, pytest.raises(TypeError, match=rf"^Client\.{says}"):
        getattr(client, method)(*positional, **keywords)
    async with AsyncClient(server.target) as client:
        with pytest.raises(TypeError, match=rf"^AsyncClient\.{says}"):
            await getattr(client, method)(*positional, **keywords)
    assert not server.seen


def test_none_is_the_servers_default(server, client):
    client.generate(
        "a", **dict.fromkeys(GenerateArguments.__annotations__.keys() - {"max_tokens", "ignore_eos"}), max_tokens=1
    )
    request = server.seen[0].request
    assert not request.stopping.strings
    assert not request.stopping.token_ids
    assert not request.HasField("model")
    assert request.sampling.HasField("seed")


def test_an_empty_prompt_is_the_servers_to_refuse(server, client):
    server.plans += [events(), events()]
    for prompt in ("", []):
        with pytest.raises(ProtocolError):
            client.generate(prompt)
    assert [seen.request.WhichOneof("prompt") for seen in server.seen] == ["text", "tokens"]


def test_text_may_lag_behind_ids_and_come_alone(server, client):
    server.plans.append(
        events(
            lambda r: Event(started=started(r), delta=serving_pb2.Delta(token_ids=[8, 9], log_probabilities=[-1, -2])),
            lambda _: Event(delta=serving_pb2.Delta(text="é"), finished=finished(2, 2, serving_pb2.STOP_STRING)),
        )
    )
    with client.stream("a") as stream:
        assert [(d.text, d.token_ids, d.offset) for d in stream] == [("", (8, 9), 0), ("é", (), 2)]
    assert (stream.completion.text, stream.completion.token_ids) == ("é", (8, 9))
    assert stream.finish_reason is FinishReason.STOP_STRING


def test_leaving_the_block_cancels_on_the_server(server, client):
    server.plans.append(hold(after=2))
    with client.stream("a") as stream:
        assert [next(stream).text, next(stream).text] == ["a", "b"]
        assert not server.seen[0].ended.is_set()
        with pytest.raises(RuntimeError, match="end of the stream"):
            _ = stream.finish_reason
    assert server.seen[0].ended.wait(30)
    with pytest.raises(errors.Cancelled):
        next(stream)


async def test_leaving_the_async_block_cancels_on_the_server(server):
    async with AsyncClient(server.target) as client:
        server.plans.append(hold(after=2))
        async with client.stream("a") as stream:
            assert [(await anext(stream)).text, (await anext(stream)).text] == ["a", "b"]
        assert await asyncio.to_thread(server.seen[0].ended.wait, 30)
        with pytest.raises(errors.Cancelled):
            await anext(stream)


async def test_a_cancelled_task_cancels_on_the_server_and_stays_cancelled(server):
    async with AsyncClient(server.target) as client:
        server.plans.append(hold(after=1))
        task = asyncio.create_task(client.generate("a"))
        await asyncio.to_thread(wait_until, lambda: bool(server.seen))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.seen[0].ended.wait, 30)


def test_close_from_another_thread_ends_the_wait(server, client):
    server.plans.append(hold(after=0))
    stream = client.stream("a")
    closer = threading.Thread(target=lambda: (wait_until(lambda: bool(server.seen)), stream.close()))
    closer.start()
    with pytest.raises(errors.Cancelled):
        next(stream)
    closer.join()


def test_an_error_in_the_callers_block_cancels_and_passes(server, client):
    server.plans.append(hold(after=1))
    with pytest.raises(ZeroDivisionError), client.stream("a") as stream:
        _ = 1 / len(next(stream).text[1:])
    assert server.seen[0].ended.wait(30)


def test_the_deadline_ends_a_call_and_the_server_hears_it(server, client):
    server.plans.append(hold(after=1))
    with pytest.raises(errors.DeadlineExceeded), client.stream("a", timeout_s=0.5) as stream:
        for _ in stream:
            pass
    assert server.seen[0].ended.wait(30)


async def test_what_a_stream_waited_for_before_it_began_is_not_why_it_ends(server, client):
    """A server that was loading, say, and came up before anybody looked again."""

    def late(request, context):
        first = fake_server.delta(0, ord("b"))
        yield Event(started=started(request), delta=first)
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")  # gRPC's own words

    server.plans += [late, late]
    with client.stream("a") as stream:
        assert next(stream).text == "b"
        stream.waited_for = "the server does not serve (loading, 99 %)"
        with pytest.raises(errors.DeadlineExceeded) as blocking:
            await asyncio.to_thread(next, stream)
    async with AsyncClient(server.target) as other, other.stream("a") as stream:
        assert (await anext(stream)).text == "b"
        stream.waited_for = "the server does not serve (loading, 99 %)"
        with pytest.raises(errors.DeadlineExceeded) as awaited:
            await anext(stream)
    for caught in (blocking, awaited):
        assert caught.value.message == "300 s are over: the answer has not come whole"


def test_the_facts_are_not_readable_before_they_are_known(server, client):
    server.plans.append(hold(after=1))
    with client.stream("a", seed=3) as stream:
        assert stream.seed == 3
        with pytest.raises(RuntimeError, match="first delta"):
            _ = stream.version
        next(stream)
        assert stream.version == fake_server.VERSION
        for name in ("finish_reason", "usage", "timings", "completion"):
            with pytest.raises(RuntimeError, match="end of the stream"):
                getattr(stream, name)


def test_threads_share_a_client(client):
    results: list[Completion] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(client.generate([n], max_tokens=3))) for n in range(97, 113)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.token_ids for result in results) == [(n + 1, n + 2, n + 3) for n in range(97, 113)]


def test_results_are_frozen(client):
    completion = client.generate("a", max_tokens=1)
    with pytest.raises(AttributeError):
        completion.text = "b"
    assert not hasattr(completion, "__dict__")


def test_the_two_clients_have_the_same_methods():
    def methods(kind: type) -> dict[str, list[str]]:
        public = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
        return {name: list(inspect.signature(member).parameters) for name, member in public.items()}

    assert methods(Client) == methods(AsyncClient)
