"""Prompts counted by the server's own tokenizer: what is asked, what is not, and the bound that decides it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st

from tramontane.client.loadtest.generator.counting import AT_ONCE, count_tokens
from tramontane.client.loadtest.generator.grpc_target import GrpcTarget
from tramontane.client.loadtest.generator.target import TargetOptions
from tramontane.client.loadtest.load.corpus import estimated_tokens
from tramontane.client.loadtest.load.counting import check_fit, counted, most_tokens, uncertain
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.cluster.tokenizer import Tokenizer

CHINESE = "天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往" * 105  # 2,100 characters


@pytest.fixture(scope="module")
def tokenizer(embedded_dir):
    return Tokenizer((embedded_dir / "tokenizer.model").read_bytes(), bos_id=1)


@given(text=st.text(max_size=60))
def test_a_text_has_at_most_a_token_a_byte_a_bos_and_a_blank(tokenizer, text):
    assert len(tokenizer.encode(text, add_bos=True)) <= most_tokens(text)


def test_characters_outside_ascii_are_a_token_each_where_nobody_counts(tokenizer):
    assert len(tokenizer.encode(CHINESE, add_bos=True)) == 6301
    assert estimated_tokens(CHINESE, 4.0) == 2100
    assert estimated_tokens("four words of ASCII, 天地", 4.0) == 5 + 2
    assert estimated_tokens("", 4.0) == 1


def test_only_what_a_count_decides_is_asked():
    prompts = [("short", 50), (CHINESE, 50), ((5, 6, 7), 4096), (CHINESE, 60), ("x" * 5000, 1)]
    assert uncertain(prompts, 4096) == [CHINESE, "x" * 5000]
    assert uncertain(prompts, 6352) == [CHINESE]
    assert uncertain(prompts, 6362) == uncertain(prompts, None) == []
    assert [counted(prompt, {CHINESE: 6301}, 9) for prompt in (CHINESE, "other", (1, 2))] == [6301, 9, 2]


def test_a_made_text_that_is_too_long_is_named_with_its_ratio():
    asks = [
        Ask(number=0, prompt="fits", max_tokens=8),
        Ask(number=1, prompt=(1,) * 99, max_tokens=8),
        Ask(number=2, prompt="bad", max_tokens=99, conduct=Conduct.BAD),
        Ask(number=3, prompt="x" * 150, max_tokens=8),
    ]
    check_fit(asks, {"x" * 150: 92, "bad": 99}, 100)
    check_fit(asks, {"x" * 150: 93}, None)
    with pytest.raises(ValueError, match=r"request 3 is 93 tokens .* max_tokens 8; .* is 100: .* 1.6 characters"):
        check_fit(asks, {"x" * 150: 93}, 100)


async def test_texts_are_counted_some_at_once():
    class Slow:
        open, most = 0, 0

        async def count_tokens(self, text):
            self.open += 1
            self.most = max(self.most, self.open)
            await asyncio.sleep(0)
            self.open -= 1
            return None if text == "none" else len(text)

    server = Slow()
    texts = ["x" * length for length in range(100)]
    assert await count_tokens([*texts, "none"], server) == {text: len(text) for text in texts}
    assert server.most == AT_ONCE


async def test_a_server_that_does_not_answer_is_not_asked_on():
    class Dead:
        asked = 0

        async def count_tokens(self, text):
            self.asked += 1
            raise ConnectionError("gone")

    server = Dead()
    with pytest.raises(ConnectionError, match="gone"):
        await count_tokens(["x"] * 1000, server)
    assert server.asked <= AT_ONCE


async def test_over_grpc(server):
    target = GrpcTarget(TargetOptions(address=server.target, model="counting"))
    assert await target.count_tokens("天地") == 3
    (seen,) = server.seen
    assert (seen.method, seen.request.text, seen.request.model) == ("Tokenize", "天地", "counting")
    await target.close()


@pytest.mark.parametrize(
    ("code", "outcome"), [("INVALID_ARGUMENT", None), ("RESOURCE_EXHAUSTED", None), ("UNAVAILABLE", ConnectionError)]
)
async def test_a_text_longer_than_the_server_reads_is_left_uncounted(code, outcome):
    class Refusing(FakeServer):
        def Tokenize(self, request, context):  # noqa: N802
            context.abort(grpc.StatusCode[code], "no")

    with Refusing() as server:
        target = GrpcTarget(TargetOptions(address=server.target, model="counting"))
        if outcome is None:
            assert await target.count_tokens("x") is None
        else:
            with pytest.raises(outcome):
                await target.count_tokens("x")
        await target.close()
