"""The server that answers at once keeps the contract, needs the client's packages only, and ends when it should."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from test_structure import CLIENT_PACKAGES, imported_by

from tramontane.client import AsyncClient, ClientOptions, FinishReason, HealthStatus, InvalidArgument
from tramontane.client.loadtest.generator.grpc_target import GrpcTarget
from tramontane.client.loadtest.generator.null_server import VERSION
from tramontane.client.loadtest.generator.target import TargetOptions
from tramontane.client.loadtest.plan import Ask

COMMAND = [sys.executable, "-m", "tramontane.client.loadtest.generator.null_server"]


@contextmanager
def null_server(stdin: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(COMMAND, stdin=stdin, **piped) as process:
        try:
            word, address = process.stdout.readline().split()
            assert word == "ready"
            yield process, address
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with null_server() as (_, address):
        yield address


async def test_a_stream_says_the_alphabet_one_letter_a_message(address):
    async with AsyncClient(address) as client, client.stream("abc", max_tokens=28, seed=7) as stream:
        deltas = [delta async for delta in stream]
        completion = stream.completion
    assert [delta.offset for delta in deltas] == list(range(28))
    assert {len(delta.token_ids) for delta in deltas} == {1}
    assert completion.text == "abcdefghijklmnopqrstuvwxyzab"
    assert completion.token_ids == tuple(map(ord, completion.text))
    assert (completion.seed, completion.version) == (7, VERSION)
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 28)


async def test_one_token_is_one_message(address):
    async with AsyncClient(address) as client:
        for _ in range(2):  # the second time from what was made before
            assert (await client.generate([5, 6], max_tokens=1)).text == "a"
        assert (await client.generate([5, 6], max_tokens=300)).usage.total_tokens == 302
        assert (await client.generate([5, 6])).usage.completion_tokens == 256


async def test_no_tokens_are_refused(address):
    async with AsyncClient(address) as client:
        with pytest.raises(InvalidArgument, match="max_tokens must lie in 1"):
            await client.generate("abc", max_tokens=0)


async def test_the_rest_of_the_service_answers_too(address):
    async with AsyncClient(address) as client:
        assert await client.tokenize("ab") == (1, 97, 98)
        assert await client.tokenize("ab", add_bos=False) == (97, 98)
        assert await client.detokenize([32, 98], continuation=True) == " b"
        assert await client.health() is HealthStatus.SERVING
        assert (await client.stats()).processes == ()


async def test_it_is_a_target_of_the_harness(address):
    target = GrpcTarget(TargetOptions(address=address))
    read: list[int] = []

    async def on_tokens(tokens: int) -> None:
        read.append(tokens)

    info = await target.describe()
    answer = await target.send(Ask(number=0, prompt=(1, 2, 3), max_tokens=5), on_tokens)
    assert (info.model, info.row_invariant) == ("null", True)
    assert (answer.status, answer.text, read) == ("OK", "abcde", [1] * 5)
    assert await target.detokenize(answer.token_ids) == answer.text
    await target.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "stdin"])
async def test_it_ends_at_once_and_in_silence(how):
    """Also while its health is watched, as every client does."""
    with null_server() as (process, address):
        async with AsyncClient(address, ClientOptions(attempts=1)) as client:
            assert (await client.generate("abc", max_tokens=3)).text == "abc"
            if how == "stdin":
                process.stdin.close()
            else:
                process.send_signal(how)
            assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_a_stdin_that_is_no_pipe_does_not_end_it():
    with null_server(stdin=subprocess.DEVNULL) as (process, _):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.terminate()
        assert process.wait(30) == 0


def test_it_needs_the_clients_packages_only():
    assert imported_by("tramontane.client.loadtest.generator.null_server") <= CLIENT_PACKAGES | {
        "cython_runtime",
        "_cython_3_2_4",
    }
