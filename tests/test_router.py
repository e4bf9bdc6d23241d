"""The router with real stages, workers and links in one process: the same tokens whatever goes on around them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import virtual_time
from fake_stages import layout_of
from local_pipeline import LocalPipeline
from models import cached_checkpoint, load_tensors
from reference_model import greedy
from wires import socket_folder

from tramontane.cluster.link_pipeline import LinkPipeline
from tramontane.cluster.messages import EndReason
from tramontane.cluster.router import BIND_TIMEOUT_S, Router
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.site import Site
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.warm_up import WarmUp
from tramontane.deploy.demo import VERSE
from tramontane.stages.config import ModelConfig

SHAPE = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 97,
    "sliding_window": 20,
    "max_position_embeddings": 256,
}
PROMPTS = [
    [(7 * index + place * place) % 90 + 3 for place in range(length)]
    for index, length in enumerate([1, 5, 33, 90, 150])
]


@pytest.fixture(scope="module")
def folder():
    torch.set_num_threads(1)
    return cached_checkpoint("MixtralForCausalLM", seed=3, **SHAPE)


@pytest.fixture(scope="module")
def expected(folder):
    """What each prompt gives, by the dumb reference."""
    config, tensors = ModelConfig.load(folder), load_tensors(folder)
    return [greedy(tensors, config, prompt, 8) for prompt in PROMPTS]


@dataclass(frozen=True)
class Model:
    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    """How each of them goes on, by the dumb reference."""
    scarce_blocks: int
    """Of 4 positions: too few for all prompts with 60 tokens each, twice."""


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request, folder, expected, embedded_dir):
    """Random weights, and the embedded model with text, some of it longer than its window."""
    if request.param == "random":
        return Model(folder, PROMPTS, expected, scarce_blocks=12)
    config, tensors = ModelConfig.load(embedded_dir), load_tensors(embedded_dir)
    text = Tokenizer.load(embedded_dir, config).encode(VERSE * 2, add_bos=True)
    prompts = [text[:length] for length in (40, 150, 5)]
    assert max(map(len, prompts)) > config.smallest_window
    return Model(embedded_dir, prompts, [greedy(tensors, config, prompt, 6) for prompt in prompts], scarce_blocks=56)


@pytest.mark.parametrize(
    "split", [[8], [4, 4], [5, 3], [2, 2, 2, 2], [1] * 8], ids=lambda split: ",".join(map(str, split))
)
async def test_any_number_of_stages_gives_the_references_tokens(model, split) -> None:
    count = len(model.expected[0])
    async with LocalPipeline(model.folder, split) as pipeline:
        together = await asyncio.gather(*(pipeline.generate(prompt, max_tokens=count) for prompt in model.prompts))
        assert [heard.tokens for heard in together] == model.expected
        assert {heard.reason for heard in together} == {EndReason.LENGTH}
        assert pipeline.idle


async def test_sampled_tokens_do_not_depend_on_company(folder) -> None:
    options = {"temperature": 1.0, "max_tokens": 20}
    async with LocalPipeline(folder, [4, 4]) as pipeline:
        alone = [await pipeline.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(PROMPTS)]
        together = await asyncio.gather(
            *(pipeline.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(PROMPTS))
        )
    assert [heard.tokens for heard in together] == [heard.tokens for heard in alone]
    assert len({tuple(heard.tokens) for heard in alone}) == len(PROMPTS)


async def test_preempted_sequences_go_on_unbroken(model) -> None:
    config, prompts = ModelConfig.load(model.folder), model.prompts[:4]
    block_bytes = 4 * 2 * config.kv_heads * config.head_dim * 4 * 4  # layers, K and V, ..., positions, float32
    scarce = model.scarce_blocks * block_bytes
    async with LocalPipeline(model.folder, [4, 4], kv_memory_bytes=scarce, block=4, chunk=8) as pipeline:
        both = await asyncio.gather(*(pipeline.generate(prompt, max_tokens=60) for prompt in prompts * 2))
        counters = pipeline.router.stats()
    async with LocalPipeline(model.folder, [8]) as pipeline:
        alone = [await pipeline.generate(prompt, max_tokens=60) for prompt in prompts]
    assert [heard.tokens for heard in both] == [heard.tokens for heard in alone] * 2
    assert [heard.tokens[: len(model.expected[0])] for heard in alone] == model.expected[: len(prompts)]
    assert counters.preemptions > 0


async def test_cancel_deadline_and_a_gateways_leaving_free_everything(folder, monkeypatch) -> None:
    async def nothing(_) -> list:
        return []

    monkeypatch.setattr(WarmUp, "measure", nothing)  # where costs are known, a deadline like this one is refused
    async with LocalPipeline(folder, [4, 4], context=256) as pipeline:
        number, cancelled = pipeline.submit(PROMPTS[4], max_tokens=100)
        await cancelled.first.wait()
        pipeline.pipeline.cancel(number)
        await pipeline.until_idle()
        late = await pipeline.generate(PROMPTS[4], max_tokens=100, remaining_ms=30.0)
        assert late.reason is EndReason.DEADLINE
        await pipeline.until_idle()
        _, left = pipeline.submit(PROMPTS[4], max_tokens=100)
        await left.first.wait()
        await pipeline.pipeline.close()
        assert left.reason is EndReason.BROKEN
        await pipeline.until_idle()


async def test_a_full_queue_refuses_at_once(folder) -> None:
    block = 8 * 2 * 2 * 16 * 16 * 4  # bytes: layers, K and V, KV heads, head_dim, positions, float32
    async with LocalPipeline(folder, [8], max_waiting=2, kv_memory_bytes=16 * block) as pipeline:
        few = [pipeline.submit(PROMPTS[1], max_tokens=2)[1] for _ in range(4)]
        await asyncio.gather(*(heard.finished for heard in few))
        assert {heard.reason for heard in few} == {EndReason.LENGTH}  # more than may wait, but there is room for all
        crowd = [pipeline.submit(PROMPTS[4], max_tokens=100)[1] for _ in range(60)]
        await asyncio.gather(*(heard.finished for heard in crowd))
        reasons = [heard.reason for heard in crowd]
    assert EndReason.REFUSED in reasons
    assert EndReason.LENGTH in reasons
    refused = [heard for heard in crowd if heard.reason is EndReason.REFUSED]
    assert all(not heard.tokens and "max-waiting" in heard.finished.result().detail for heard in refused)


async def test_a_dead_stage_ends_every_request(folder) -> None:
    async with LocalPipeline(folder, [4, 4]) as pipeline:
        crowd = [pipeline.submit(prompt, max_tokens=100)[1] for prompt in PROMPTS[:3]]
        await asyncio.gather(*(heard.first.wait() for heard in crowd))
        pipeline.workers[1].close()
        await asyncio.gather(*(heard.finished for heard in crowd))
        assert {heard.reason for heard in crowd} == {EndReason.BROKEN}
        assert "stage" in await pipeline.router.broken()
        await asyncio.wait_for(asyncio.shield(pipeline.pipeline.broken), 10)  # its link is closed, with nobody's help
        assert pipeline.idle


async def test_a_stage_that_fails_while_binding_is_named_at_once(folder) -> None:
    async with LocalPipeline(folder, [4, 4]) as pipeline:
        second = pipeline.make_router("router-1")
        pipeline.workers[1].close()  # it binds no more links
        with pytest.raises(RuntimeError, match="stage"):
            await asyncio.wait_for(second.bind(), 20)
        assert second.is_broken
        await second.close()


class SilentStage:
    """A stage's process that lives, and answers nothing."""

    async def epoch(self) -> int:
        return await asyncio.get_running_loop().create_future()


def test_stages_that_do_not_answer_break_the_binding_in_time() -> None:
    async def bind(sockets: Path) -> float:
        site = Site(node="here", sockets=sockets, secret=b"of the tests")
        options = SchedulerOptions(layout=layout_of((None,)), context=64, max_batch_tokens=64, max_waiting=4)
        router = Router("router-0", site, [SilentStage()], options, hang_limit_s=45.0)
        with pytest.raises(RuntimeError, match=f"did not bind within {BIND_TIMEOUT_S:.0f} s"):
            await router.bind()
        assert router.is_broken
        await router.close()
        return asyncio.get_running_loop().time()

    with socket_folder() as sockets:
        assert virtual_time.run(bind(sockets)) >= BIND_TIMEOUT_S


async def test_a_new_router_binds_higher_and_fences_the_old_one(folder, expected) -> None:
    async with LocalPipeline(folder, [4, 4]) as pipeline:
        _, running = pipeline.submit(PROMPTS[4], max_tokens=100)
        await running.first.wait()
        second = pipeline.make_router("router-1")
        address = await second.bind()
        await running.finished
        assert running.reason is EndReason.BROKEN
        await pipeline.router.broken()
        assert {worker.epoch() for worker in pipeline.workers} == {2}
        first, pipeline.router = pipeline.router, second
        pipeline.pipeline = await LinkPipeline.dial("router-1", address, pipeline.site, gateway="g")
        assert (await pipeline.generate(PROMPTS[2])).tokens == expected[2]
        await first.close()
