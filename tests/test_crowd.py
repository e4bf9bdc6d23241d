"""A crowd at a real gateway, router and stages, in one process: all are served in the end, with their own tokens."""

from __future__ import annotations

import asyncio

import pytest
import torch
from fake_pipeline import serving, tiny_model
from local_pipeline import LocalPipeline
from models import cached_checkpoint
from test_router import SHAPE

from tramontane.client import AsyncClient, ClientOptions, DeadlineExceeded, ResourceExhausted

PROMPTS = [[(7 * index + place * place) % 90 + 3 for place in range(4 + 9 * index % 70)] for index in range(20)]


@pytest.fixture(scope="module")
def folder():
    torch.set_num_threads(1)
    return cached_checkpoint("MixtralForCausalLM", seed=3, **SHAPE)


def crowded(folder, **options):
    """Few seats and hardly any waiting, so that most of a crowd is refused at first."""
    limits = {"max_running": 8, "max_queue_wait_s": 0.02}
    return LocalPipeline(folder, [4, 4], context=256, **(limits | options))


async def alone(pipeline) -> list[list[int]]:
    return [(await pipeline.generate(prompt, max_tokens=12)).tokens for prompt in PROMPTS]


async def test_500_prompts_at_once_end_with_500_answers(folder):
    async with (
        crowded(folder) as pipeline,
        serving(pipeline.pipeline, model=tiny_model(context=256)) as (gateway, target),
    ):
        expected = await alone(pipeline)
        async with AsyncClient(target) as client:
            answers = await asyncio.gather(
                *(
                    client.generate(PROMPTS[number % 20], max_tokens=12, temperature=0, ignore_eos=True)
                    for number in range(500)
                )
            )
        refused = pipeline.router.stats().admission.refused_queue_wait
        assert refused > 100, "this crowd would show little"
        assert sum(gateway.stats().refusal_counts) == refused
    for number, answer in enumerate(answers):
        assert list(answer.token_ids) == expected[number % 20]


async def test_refusals_come_with_a_hint_and_change_nothing_for_the_others(folder):
    async with crowded(folder) as pipeline, serving(pipeline.pipeline, model=tiny_model(context=256)) as (_, target):
        expected = await alone(pipeline)
        async with AsyncClient(target, ClientOptions(retry_refused=False)) as client:
            answers = await asyncio.gather(
                *(
                    client.generate(PROMPTS[number % 20], max_tokens=12, temperature=0, ignore_eos=True)
                    for number in range(300)
                ),
                return_exceptions=True,
            )
        await pipeline.until_idle()
    served = [(n, answer) for n, answer in enumerate(answers) if not isinstance(answer, BaseException)]
    refusals = [answer for answer in answers if isinstance(answer, BaseException)]
    assert served
    assert refusals
    assert all(list(answer.token_ids) == expected[number % 20] for number, answer in served)
    for refusal in refusals:
        assert isinstance(refusal, ResourceExhausted)
        assert 0.05 <= refusal.retry_after_s <= 40
        assert "would wait" in refusal.message


async def test_a_burst_into_hardly_any_kv_is_served_whole(folder):
    """Preempted again and again, beside deadlines that some of them miss."""
    block = 16 * 2 * 2 * 16 * 4 * 4  # positions, K and V, kv heads, head_dim, float32, layers
    options = {"kv_memory_bytes": 24 * block, "max_queue_wait_s": 0.0, "max_waiting": 1000, "max_running": None}
    async with (
        crowded(folder, **options) as pipeline,
        serving(pipeline.pipeline, model=tiny_model(context=256)) as (_, target),
    ):
        expected = await alone(pipeline)
        async with AsyncClient(target) as client:

            async def ask(number: int) -> list[int]:
                hurried = number % 5 == 4
                try:
                    answer = await client.generate(
                        PROMPTS[number % 20],
                        max_tokens=12,
                        temperature=0,
                        ignore_eos=True,
                        timeout_s=0.1 if hurried else 60,
                    )
                except (DeadlineExceeded, ResourceExhausted):
                    assert hurried
                    return expected[number % 20]
                return list(answer.token_ids)

            answers = await asyncio.gather(*(ask(number) for number in range(300)))
        await pipeline.until_idle()
    assert answers == [expected[number % 20] for number in range(300)]
