"""Places that calls take one after the other, in turn by user."""

from __future__ import annotations

import asyncio

from tramontane.cluster.places import Places


async def taken_by(places: Places, *users: str) -> dict[str, list[asyncio.Task]]:
    """All these ask for a place, in this order."""
    tasks: dict[str, list[asyncio.Task]] = {}
    for user in users:
        tasks.setdefault(user, []).append(asyncio.create_task(places.take(user)))
    await turn()
    return tasks


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def given(tasks: list[asyncio.Task]) -> int:
    return sum(task.done() for task in tasks)


async def test_a_user_leaves_places_for_others():
    places = Places(8)
    tasks = await taken_by(places, *["a"] * 10, "b", "b")
    assert (given(tasks["a"]), given(tasks["b"]), places.taken) == (4, 2, 6)
    assert not places.take_at_once("a")
    assert places.take_at_once("c")
    for task in tasks["a"]:
        task.cancel()
    await turn()


async def test_places_are_given_on_in_turn_by_user():
    places, order = Places(2), []
    places.take_at_once("x")

    async def visit(user: str) -> None:
        await places.take(user)
        order.append(user)
        places.leave(user)

    visits = [asyncio.create_task(visit(user)) for user in ("a", "a", "a", "b", "c")]
    await turn()
    assert not order
    places.leave("x")
    await asyncio.gather(*visits)
    assert "".join(order) == "abcaa"
    assert places.taken == 0


async def test_who_leaves_while_waiting_or_just_given_a_place_keeps_none():
    places = Places(2)
    tasks = await taken_by(places, "a", "a", "a")
    assert given(tasks["a"]) == 1
    tasks["a"][1].cancel()
    places.leave("a")  # in the same turn
    await turn()
    assert given(tasks["a"]) == 3
    tasks = await taken_by(places, "a")
    places.leave("a")
    tasks["a"][0].cancel()  # has been given it, and does not know yet
    await turn()
    assert tasks["a"][0].cancelled()
    assert places.taken == 0
