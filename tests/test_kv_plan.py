"""The context and KV memory that a pipeline gets: what fits is served, and options that ask for more are refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.cluster.kv_plan import KVOptions, KVPlan, KVPlanner
from tramontane.cluster.memory_sums import Room, sum_at, worst_sum
from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.kv_layout import kv_bytes
from tramontane.stages.split import split_as
from tramontane.stages.stage_memory import StageMemory

MIB = 2**20
FULL = dataclasses.replace(EXAMPLE, windows=(None,) * 4, context=1_024_000)
TOKEN = 2 * 2 * 8 * 4  # bytes of a token in one layer of EXAMPLE, float32: K and V, 2 KV heads, head_dim 8
STAGE = StageMemory(weights=30 * MIB, loading=20 * MIB, buffers=10 * MIB)


def room(free: int, *, stages: int = 1, place: str = "this machine") -> Room:
    return Room(place=place, free=free, stages=stages, each=MIB)


def planned(*rooms: Room, config: ModelConfig = FULL, counts: tuple[int, ...] = (4,), **options: int) -> KVPlan:
    spans = split_as(config, counts)
    return KVPlanner(config, spans, "float32", KVOptions(**options), [STAGE] * len(spans), rooms).plan()


def refused(*rooms: Room, **options: object) -> str:
    with pytest.raises(ValueError, match=r"fit|needs") as refusal:
        planned(*rooms, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_where_memory_is_not_known_everything_fits() -> None:
    plan = planned()
    assert (plan.context, plan.lowered, plan.sum) == (1_024_000, "", None)
    assert kv_bytes(FULL, split_as(FULL, [4]), plan.layout, "float32") == [512 * MIB]
    longer = planned(config=dataclasses.replace(FULL, context=2_048_000))
    assert kv_bytes(FULL, split_as(FULL, [4]), longer.layout, "float32") == [2_048_000 * 4 * TOKEN]


def test_where_there_is_room_it_is_512_mib_a_stage() -> None:
    small = dataclasses.replace(FULL, context=4096)
    assert planned(room(10**10), config=small).layout.pool_blocks == (512 * MIB // (32 * 4 * TOKEN),)


def test_the_default_memory_is_what_fits_if_that_is_less() -> None:
    small = dataclasses.replace(FULL, context=4096)
    free = STAGE.weights + STAGE.buffers + MIB + 40 * MIB
    plan = planned(room(free), config=small)
    assert (plan.context, plan.lowered) == (4096, "")
    assert plan.layout.pool_blocks == (40 * MIB // (32 * 4 * TOKEN),)
    assert plan.sum is not None
    assert plan.sum.total == free


def test_the_context_is_lowered_to_what_fits_and_says_why() -> None:
    plan = planned(room(STAGE.weights + STAGE.buffers + MIB + 100 * MIB))
    assert plan.context == 100 * MIB // (4 * TOKEN)
    assert plan.layout.fits(plan.context)
    assert plan.lowered.startswith("1,024,000 do not fit: 1 stage needs 541 MiB of 141 MiB on this machine: ")
    assert plan.sum is not None
    assert 0 >= plan.sum.over > -32 * 4 * TOKEN


def test_a_context_below_a_window_is_lowered_no_further_than_it_helps() -> None:
    windowed = dataclasses.replace(EXAMPLE, context=1_024_000)
    assert planned(room(STAGE.weights + STAGE.loading + MIB), config=windowed).context == 1_024_000


@pytest.mark.parametrize("options", [{}, {"max_context": 4096}, {"kv_memory": 64 * MIB, "max_context": 4096}])
def test_weights_that_do_not_fit_are_refused_whatever_is_asked(options: dict[str, int]) -> None:
    said = refused(room(30 * MIB), **options)
    assert "weights 30 MiB" in said
    assert "of 30 MiB on this machine" in said
    assert "--quantize int8" in said


def test_what_loading_takes_must_fit_as_well() -> None:
    assert "buffers 20 MiB" in refused(room(STAGE.weights + STAGE.loading), chunk=32)
    assert planned(room(STAGE.weights + STAGE.loading + MIB), chunk=32).context > 0


def test_a_max_context_of_the_users_is_refused_with_the_largest_that_fits() -> None:
    rooms = [room(STAGE.weights + STAGE.buffers + MIB + 100 * MIB)]
    said = refused(*rooms, max_context=300_000)
    assert said.startswith("--max-context is 300000, and one sequence of so many tokens does not fit: 1 stage needs ")
    fitting = int(re.search(r"--max-context (\d+) fits", said)[1])
    assert planned(*rooms, max_context=fitting).context == fitting
    assert "does not fit" in refused(*rooms, max_context=fitting + 1)


def test_a_kv_memory_of_the_users_is_refused_with_the_most_that_fits() -> None:
    rooms = [room(STAGE.weights + STAGE.buffers + MIB + 100 * MIB)]
    said = refused(*rooms, kv_memory=10**12, max_context=4096)
    assert said.startswith("--kv-memory is 1000000000000 bytes a stage, and that does not fit: 1 stage needs ")
    fitting = int(re.search(r"(\d+) bytes fit", said)[1])
    assert planned(*rooms, kv_memory=fitting, max_context=4096).layout.fits(4096)
    assert "does not fit" in refused(*rooms, kv_memory=fitting + 32 * 4 * TOKEN, max_context=4096)


def test_a_kv_memory_that_neither_fits_nor_holds_the_context_says_both() -> None:
    rooms = [room(STAGE.weights + STAGE.buffers + MIB + 100 * MIB)]
    said = refused(*rooms, kv_memory=200 * MIB)
    assert "and that does not fit: 1 stage needs 241 MiB of 141 MiB" in said
    fitting, context = map(int, re.search(r"(\d+) bytes fit with --max-context (\d+)", said).groups())
    assert planned(*rooms, kv_memory=fitting, max_context=context).context == context


def test_a_kv_memory_below_one_full_context_is_refused_with_the_context_that_it_holds() -> None:
    said = refused(kv_memory=100 * MIB)
    assert said.startswith(f"--kv-memory is {100 * MIB} bytes a stage; one sequence of 1024000 tokens needs ")
    holds = int(re.search(r"--max-context (\d+), which it holds", said)[1])
    assert planned(kv_memory=100 * MIB, max_context=holds).context == holds == 100 * MIB // (4 * TOKEN)
    assert refused(kv_memory=1000, max_context=64).endswith("raise it")


def test_a_chunk_of_the_users_bounds_how_far_the_context_is_lowered() -> None:
    rooms = [room(STAGE.weights + STAGE.buffers + MIB + 100 * MIB)]
    assert planned(*rooms, chunk=1024).layout.chunk == 1024
    wide = {"chunk": 400_000, "max_batch_tokens": 400_000}
    assert "the model does not fit, even with a context of 400000 tokens: " in refused(*rooms, **wide)


def test_stages_on_one_node_add_up() -> None:
    two = room(10**9, stages=2)
    both = sum_at(two, [STAGE, STAGE], kv=[MIB, 2 * MIB])
    # Loading takes 20 MiB a stage, more than a step's 10 beside that little KV.
    assert (both.weights, both.kv, both.buffers, both.processes) == (60 * MIB, 3 * MIB, 37 * MIB, 2 * MIB)
    lowered = planned(room(2 * (STAGE.weights + STAGE.buffers + MIB) + 100 * MIB, stages=2), counts=(2, 2))
    assert lowered.context == 100 * MIB // (4 * TOKEN)
    uneven = planned(room(2 * (STAGE.weights + STAGE.buffers + MIB) + 100 * MIB, stages=2), counts=(3, 1))
    assert uneven.context == lowered.context


def test_a_node_that_may_get_one_stage_must_hold_the_most_demanding() -> None:
    rooms = [room(10**10, place="one"), room(STAGE.weights + STAGE.buffers + MIB + 60 * MIB, place="another")]
    plan = planned(*rooms, counts=(3, 1))
    assert plan.context == 60 * MIB // (3 * TOKEN) // 32 * 32
    assert "on another" in plan.lowered


def test_a_place_that_gets_no_stage_is_not_asked() -> None:
    assert worst_sum([room(0, stages=0)], [STAGE], [0]) is None


@given(
    windows=st.lists(st.none() | st.integers(1, 5000), min_size=1, max_size=5),
    context=st.integers(1, 200_000),
    kv_mib=st.integers(0, 300),
    cut=st.integers(0, 4),
)
def test_what_is_served_fits_and_a_block_more_would_not(
    windows: list[int | None], context: int, kv_mib: int, cut: int
) -> None:
    config = dataclasses.replace(EXAMPLE, windows=tuple(windows), context=context)
    spans = [span for span in (range(min(cut, len(windows))), range(min(cut, len(windows)), len(windows))) if span]
    node = room(len(spans) * (STAGE.weights + STAGE.loading + MIB) + kv_mib * MIB, stages=len(spans))
    counts = tuple(len(span) for span in spans)
    plan = planned(node, config=config, counts=counts)
    assert plan.sum is not None
    assert plan.sum.over <= 0
    assert plan.layout.fits(plan.context)
    assert bool(plan.lowered) == (plan.context < context)
    if plan.lowered:
        with pytest.raises(ValueError, match="does not fit"):
            planned(node, config=config, counts=counts, max_context=min(plan.context + 32, context))
