"""A gateway's links to its routers: what stands is kept, what is lost is dialled again, a dead one costs itself only.

Time is a number here (`virtual_time.py`), so the pauses are known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps

from fake_pipeline import FakePipeline
from virtual_time import run

from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.routes import LinkNews, Routes


def in_virtual_time(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    @wraps(test)
    def timed() -> None:
        run(test())

    del timed.__wrapped__  # pytest would see a coroutine
    return timed


class Dialler:
    """Makes a pipeline for each dial, and fails where it is told to."""

    def __init__(self) -> None:
        self.dialled: list[tuple[float, str]] = []
        self.dead: set[str] = set()
        self.hung: set[str] = set()
        self.made: dict[str, list[FakePipeline]] = {}

    async def __call__(self, name: str, address: object) -> FakePipeline:
        self.dialled.append((round(asyncio.get_running_loop().time(), 3), name))
        if name in self.hung:
            await asyncio.sleep(10.0)
            raise LinkClosed("timed out")
        if name in self.dead:
            raise LinkClosed("nobody listens")
        pipeline = FakePipeline(name=name)
        self.made.setdefault(name, []).append(pipeline)
        return pipeline


def table(*names: str) -> list[tuple[str, str]]:
    return [(name, f"address of {name}") for name in names]


@in_virtual_time
async def test_each_router_is_linked_once_and_a_newer_table_keeps_what_stands() -> None:
    dial, changes = Dialler(), []
    routes = Routes(dial, lambda: changes.append([pipeline.name for pipeline in routes.usable]))
    assert routes.generation < 0
    await routes.set(1, table("a", "b"))
    assert [pipeline.name for pipeline in routes.usable] == ["a", "b"]
    await routes.set(2, table("b", "c"))
    assert [name for _, name in dial.dialled] == ["a", "b", "c"]
    assert (dial.made["a"][0].retired, dial.made["b"][0].retired) == (True, False)
    assert routes.usable == [dial.made["b"][0], dial.made["c"][0]]
    await routes.set(2, table("a"))
    await routes.set(1, ())
    assert (routes.generation, len(dial.dialled)) == (2, 3)
    assert changes[-1] == ["b", "c"]
    await routes.close()
    assert dial.made["b"][0].broken.done()
    assert routes.usable == []


@in_virtual_time
async def test_a_router_at_another_address_is_another_one() -> None:
    dial = Dialler()
    routes = Routes(dial, lambda: None)
    await routes.set(1, [("a", "here")])
    await routes.set(2, [("a", "there")])
    first, second = dial.made["a"]
    assert first.retired
    assert routes.usable == [second]
    await routes.close()


@in_virtual_time
async def test_a_lost_link_is_dialled_again_with_growing_pauses_until_it_stands() -> None:
    dial, health = Dialler(), []
    routes = Routes(dial, lambda: health.append(bool(routes.usable)))
    await routes.set(1, table("a"))
    dial.dead.add("a")
    dial.made["a"][0].break_down("silent for 45 s")
    assert routes.usable == [], "at once, not when somebody has looked"
    await asyncio.sleep(30)
    assert [at_s for at_s, _ in dial.dialled] == [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 11.3, 16.3, 21.3, 26.3]
    assert routes.trouble == "a: nobody listens"
    dial.dead.clear()
    await asyncio.sleep(5)
    assert routes.usable == [dial.made["a"][1]]
    assert routes.trouble == ""
    assert health == [False, True, False, False, True]
    dial.made["a"][1].break_down("again")
    await asyncio.sleep(0.001)
    assert len(dial.dialled) == 12, "a link that stood for less than the longest pause does not make it short"
    await asyncio.sleep(5)
    await asyncio.sleep(30)
    dial.made["a"][2].break_down("later")
    await asyncio.sleep(0.11)
    assert len(dial.made["a"]) == 4, "one that has stood does"
    await routes.close()


@in_virtual_time
async def test_a_dead_or_hung_router_costs_only_itself() -> None:
    dial = Dialler()
    dial.dead.add("dead")
    dial.hung.add("hung")
    routes = Routes(dial, lambda: None)
    setting = asyncio.create_task(routes.set(1, table("dead", "a", "hung", "b")))
    await asyncio.sleep(1)
    assert [pipeline.name for pipeline in routes.usable] == ["a", "b"]
    assert routes.trouble == "dead: nobody listens; hung: not linked yet"
    assert not setting.done(), "not every router was dialled"
    await setting
    assert asyncio.get_running_loop().time() == 10.0
    assert routes.trouble == "dead: nobody listens; hung: timed out"
    await routes.close()


@in_virtual_time
async def test_a_mistake_in_dialling_is_not_the_end_of_a_route() -> None:
    pipelines = [ZeroDivisionError("of all things"), FakePipeline(name="a")]

    async def dial(name: str, address: object) -> FakePipeline:
        made = pipelines.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    routes = Routes(dial, lambda: None)
    await routes.set(1, table("a"))
    assert routes.trouble == "a: ZeroDivisionError: of all things"
    await asyncio.sleep(1)
    assert len(routes.usable) == 1
    await routes.close()


@in_virtual_time
async def test_a_table_that_is_taken_back_is_dialled_no_more() -> None:
    dial = Dialler()
    dial.hung.add("hung")
    routes = Routes(dial, lambda: None)
    setting = asyncio.create_task(routes.set(1, table("a", "hung")))
    await asyncio.sleep(1)
    routes.clear()
    await setting
    assert dial.made["a"][0].retired
    dial.made["a"][0].break_down("no longer in use")
    await asyncio.sleep(60)
    assert len(dial.dialled) == 2
    assert (routes.usable, routes.trouble) == ([], "")
    assert len(asyncio.all_tasks()) == 1


@in_virtual_time
async def test_news_are_told_once_and_none_is_missed() -> None:
    dial = Dialler()
    routes = Routes(dial, lambda: None)
    await routes.set(1, table("a"))
    first = await routes.news(-1)
    assert (first.lost, first.trouble) == (0, "")
    waiting = asyncio.create_task(routes.news(first.number))
    await asyncio.sleep(1)
    assert not waiting.done()
    dial.made["a"][0].break_down("silent for 45 s")
    news = await waiting
    assert news == LinkNews(number=first.number + 1, lost=1, trouble="a: silent for 45 s")
    await asyncio.sleep(1)  # it is linked again before anybody asks
    assert await routes.news(news.number) == LinkNews(number=news.number + 1, lost=1, trouble="")
    await routes.close()
