"""The budget: never more than there is, in the order of asking, and all of it back at the end."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.media.children.budget import Budget, BudgetFull, Grant

TOTAL = 10
STEPS = st.lists(st.tuples(st.sampled_from(["ask", "back", "less", "more"]), st.integers(0, TOTAL)), max_size=60)


@given(STEPS, st.one_of(st.none(), st.integers(0, 5)))
def test_shares_are_handed_out_in_order_and_never_exceed_the_total(
    steps: list[tuple[str, int]], most_waiting: int | None
) -> None:
    budget = Budget(TOTAL, most_waiting)
    asked: list[Grant] = []

    def held() -> list[Grant]:
        return [grant for grant in asked if grant.held]

    for what, amount in steps:
        waiting = [grant for grant in asked if not grant.held]
        if what == "ask":
            try:
                asked.append(budget.ask(amount))
            except BudgetFull:
                assert most_waiting is not None
                assert len(waiting) == most_waiting
                assert waiting or amount > TOTAL - budget.used
        elif asked and what == "back":
            grant = asked.pop(amount % len(asked))
            budget.give_back(grant)
            budget.give_back(grant)  # a second time changes nothing
        elif held() and what == "less":
            grant = held()[amount % len(held())]
            budget.reduce(grant, min(amount, grant.amount))
        elif held() and what == "more":
            grant, before, free = held()[0], held()[0].amount, TOTAL - budget.used
            assert budget.enlarge(grant, amount) == (amount <= free)
            assert grant.amount == before + (amount if amount <= free else 0)
        assert 0 <= budget.used == sum(grant.amount for grant in held()) <= TOTAL
        still = [grant for grant in asked if not grant.held]
        assert budget.waiting == len(still)
        # The first that waits does not fit.
        assert not still or still[0].amount > TOTAL - budget.used
        assert all(grant.ready.done() == grant.held for grant in asked)
    for grant in asked:
        budget.give_back(grant)
    assert (budget.used, budget.waiting) == (0, 0)


def test_nobody_overtakes() -> None:
    budget = Budget(4)
    first = budget.ask(3)
    large, small = budget.ask(4), budget.ask(1)
    assert (large.held, small.held) == (False, False)  # there is room for the small one, but it came later
    budget.give_back(first)
    assert (large.held, small.held) == (True, False)
    budget.give_back(large)
    assert small.held


def test_more_than_there_ever_is_is_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4"):
        Budget(4).ask(5)


def test_who_stops_waiting_is_passed_over() -> None:
    budget = Budget(1)
    first, second, third = budget.ask(1), budget.ask(1), budget.ask(1)
    assert second.ready.cancel()  # as asyncio does it where the task that waits is cancelled
    budget.give_back(first)
    budget.give_back(second)
    assert third.held
    budget.give_back(third)
    assert budget.used == 0


def test_a_finalizer_that_runs_while_the_lock_is_held_gives_back_too() -> None:
    """A share is often given back by the garbage collector, which may start inside `ask` itself."""
    budget = Budget(2)

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    def dropped() -> None:
        cycle = Cycle()
        weakref.finalize(cycle, budget.give_back, budget.ask(1))

    real = budget._hand_out

    def collecting() -> None:
        gc.collect()
        real()

    budget._hand_out = collecting  # type: ignore[method-assign]
    gc.disable()
    try:
        dropped()
        dropped()
        third = budget.ask(1)
        assert third.held
    finally:
        gc.enable()
    budget.give_back(third)
    assert budget.used == 0


def test_many_threads_share_it() -> None:
    budget, most, errors = Budget(3), [0], list[Any]()
    lock = threading.Lock()
    at_work = [0]

    def work() -> None:
        for _ in range(200):
            grant = budget.ask(1)
            grant.ready.result(10)
            with lock:
                at_work[0] += 1
                most[0] = max(most[0], at_work[0])
                if at_work[0] > 3:
                    errors.append(at_work[0])
            with lock:
                at_work[0] -= 1
            budget.give_back(grant)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (budget.used, budget.waiting) == (0, 0)
