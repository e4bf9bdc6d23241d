"""How users share: what each may hold, and whose turn it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.cluster.fairness import FairQueue, Shares

USERS = [f"user {number}" for number in range(5)]


@pytest.mark.parametrize("users", [1, 2, 5])
def test_users_who_take_all_they_can_get_equal_parts_and_leave_one(users):
    shares = Shares(60)
    while [user for user in USERS[:users] if shares.take(user)]:
        pass
    assert [shares.held_by(user) for user in USERS[:users]] == [60 // (users + 1)] * users
    assert shares.left == 60 // (users + 1)
    assert shares.take("a newcomer")


@given(st.lists(st.tuples(st.sampled_from(USERS), st.integers(1, 20)), max_size=60), st.integers(2, 100))
def test_what_is_taken_and_given_back_adds_up(wishes, total):
    shares, taken = Shares(total), []
    for user, amount in wishes:
        if shares.take(user, amount):
            taken.append((user, amount))
            assert shares.held_by(user) <= shares.left
        elif taken:
            shares.give_back(*taken.pop())
        assert shares.left + sum(amount for _, amount in taken) == total
    for user, amount in taken:
        shares.give_back(user, amount)
    assert shares.left == total
    assert not shares._held, "users are remembered for ever"


def served(queue: FairQueue[int], cost=lambda user: 1.0) -> str:
    """Serve all who wait, and say in what order."""
    order = []
    while (taken := queue.take()) is not None:
        order.append(taken[0])
        queue.charge(taken[0], cost(taken[0]))
    return "".join(order)


def test_users_take_turns_however_many_items_they_have():
    queue = FairQueue[int]()
    for user, count in (("a", 6), ("b", 2), ("c", 1)):
        for item in range(count):
            queue.put(user, item)
    assert served(queue) == "abcabaaaa"


def test_turns_are_of_cost_not_of_items():
    queue = FairQueue[int]()
    for item in range(8):
        queue.put("a", item)
        queue.put("b", item)
    assert served(queue, {"a": 3.0, "b": 1.0}.__getitem__) == "abbbabbbabbaaaaa"


def test_a_newcomer_is_next_and_one_who_was_idle_has_saved_nothing():
    queue = FairQueue[int]()
    for item in range(20):
        queue.put("a", item)
    for _ in range(10):
        queue.take()
        queue.charge("a", 1.0)
    for item in range(10):
        queue.put("b", item)
    assert served(queue).startswith("bababab")


def test_who_comes_back_at_once_pays_for_what_it_has_had():
    """One request at a time, each sent when the one before is done."""
    queue, order = FairQueue[int](), []
    for item in range(9):
        queue.put("b", item)
    queue.put("a", 0)
    for _ in range(12):
        user, _ = queue.take()
        order.append(user)
        queue.charge(user, 3.0 if user == "a" else 1.0)
        if user == "a":
            queue.put("a", 0)
    assert "".join(order) == "babbbabbbabb"


def test_what_is_put_back_comes_before_the_user_s_other_items():
    queue = FairQueue[int]()
    queue.put("a", 1)
    queue.put("a", 2)
    user, item = queue.take()
    queue.put_back(user, item)
    assert [queue.take() for _ in range(3)] == [("a", 1), ("a", 2), None]


def test_users_who_may_not_have_an_item_are_passed_over():
    queue = FairQueue[int]()
    queue.put("a", 1)
    queue.put("b", 2)
    assert queue.take(lambda user: user != "a") == ("b", 2)
    assert queue.take(lambda user: user != "a") is None
    assert queue.take() == ("a", 1)


def test_an_item_that_was_taken_out_never_comes():
    queue = FairQueue[int]()
    queue.put("a", 1)
    queue.put("a", 2)
    assert queue.discard("a", 1)
    assert not queue.discard("a", 1)
    assert not queue.discard("b", 1)
    assert served(queue) == "a"


def test_an_item_is_taken_out_without_a_search():
    """Thousands of calls of one user may leave at once."""

    class Item:
        compared = 0

        def __eq__(self, other: object) -> bool:
            Item.compared += 1
            return self is other

        __hash__ = object.__hash__

    queue, items = FairQueue[Item](), [Item() for _ in range(1000)]
    for item in items:
        queue.put("a", item)
    assert all(queue.discard("a", item) for item in reversed(items))
    assert Item.compared < 100


def test_users_are_forgotten():
    queue = FairQueue[int]()
    queue.put("steady", 0)
    for number in range(1000):
        queue.put(f"passing {number}", number)
        for _ in range(2):
            user, item = queue.take()
            queue.charge(user, 1.0)
            if user == "steady":
                queue.put(user, item)
    assert len(queue._served) < 100


@given(st.lists(st.tuples(st.sampled_from(USERS), st.integers(1, 5)), min_size=1, max_size=80))
def test_nobody_who_waits_is_ahead_of_another_by_more_than_a_turn(wishes):
    """All wait from the beginning, so at each moment what two of them have had differs by one item's cost at most."""
    queue, had = FairQueue[int](), dict.fromkeys((user for user, _ in wishes), 0.0)
    for item, (user, _) in enumerate(wishes):
        queue.put(user, item)
    waiting = [user for user, _ in wishes]
    while (taken := queue.take()) is not None:
        user, cost = taken[0], wishes[taken[1]][1]
        assert had[user] == min(had[each] for each in waiting)
        waiting.remove(user)
        had[user] += cost
        queue.charge(user, cost)
    assert not waiting
