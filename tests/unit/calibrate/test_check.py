"""Which setting is taken, from what the search saw and what it does to other questions; both made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from metok_vllm.calibrate.check import CANDIDATES, first_that_passes
from metok_vllm.calibrate.search import Search, Seen
from metok_vllm.calibrate.settings import Setting

PLAIN = Setting((4, 5, 6), (2, 4, 8))


def seen(tokens: float, harm: float = 0.0, agree: float = 1.0, kv: float | None = None) -> Seen:
    agrees = tuple(i < round(100 * agree) for i in range(100))
    return Seen(kl=(harm,), harm=(harm,) * 100, agrees=agrees, tokens=tokens, kv=tokens if kv is None else kv)


def searched(costs: Sequence[float]) -> tuple[Search, list[Setting]]:
    """A search in which settings of these costs have passed."""
    settings = [replace(PLAIN, keep_ratio=round(0.1 + i / 100, 2)) for i in range(len(costs))]
    tried = Search(lambda asked: [], 0.99)
    tried.seen.update((one, seen(cost)) for one, cost in zip(settings, costs, strict=True))
    return tried, settings


@pytest.mark.parametrize(
    ("costs", "passes", "checked"),
    [
        ([70, 80, 90], {70, 80, 90}, [70]),
        ([70, 71, 88, 90, 110], {110}, [70, 88, 110]),  # neighbours in cost are passed over
        ([70, 75, 87], {75, 87}, [70, 87]),  # nothing clearly gentler is left: the gentlest
        ([70, 70], {71}, [70]),
        ([70, 88, 90, 100], {100}, [70, 88, 100]),
        ([10, 20, 40, 80, 160, 320], {320}, [10, 20, 40, 80, 160]),  # five at most
        ([200, 70, 120], {200}, [70, 120, 200]),
    ],
)
def test_the_next_one_is_clearly_gentler(costs: list[float], passes: set[float], checked: list[float]) -> None:
    tried, settings = searched(costs)
    asked: list[float] = []

    def on_held_out(some: Sequence[Setting]) -> list[Seen]:
        found = [tried.seen[one].tokens for one in some]
        asked.extend(found)
        return [seen(cost, 0.0 if cost in passes else 0.3) for cost in found]

    chosen, told, passed = first_that_passes(tried, on_held_out, 0.99, {})
    assert asked == checked
    assert len(asked) <= CANDIDATES
    assert told.passes(0.99) == passed == (checked[-1] in passes)
    if passed:
        assert chosen == settings[costs.index(checked[-1])]


def test_of_those_that_fail_the_one_that_comes_nearest() -> None:
    tried, settings = searched([70, 120, 190])
    harm = {70.0: (0.9, 0.3), 120.0: (0.97, 0.6), 190.0: (0.97, 0.4)}

    def on_held_out(some: Sequence[Setting]) -> list[Seen]:
        return [seen(t, harm[t][1], harm[t][0]) for t in (tried.seen[one].tokens for one in some)]

    chosen, told, passed = first_that_passes(tried, on_held_out, 0.99, {})
    assert not passed
    assert chosen == settings[2]
    assert told.worst == 0.4


def test_less_kv_and_all_of_it_are_one_engines_work() -> None:
    less = replace(PLAIN, decode_retention=0.25)
    tried = Search(lambda asked: [], 0.99)
    tried.seen.update({less: seen(70, kv=20), PLAIN: seen(70, kv=70)})
    asked: list[list[Setting]] = []

    def on_held_out(some: Sequence[Setting]) -> list[Seen]:
        asked.append(list(some))
        return [seen(70, 0.3 if one == less else 0.0) for one in some]

    assert first_that_passes(tried, on_held_out, 0.99, {})[0] == PLAIN
    assert asked == [[less, PLAIN]]


def test_a_window_and_all_of_the_kv_are_two_engines() -> None:
    window = replace(PLAIN, decode_retention=0.0, window=(2, 5))
    tried = Search(lambda asked: [], 0.99)
    tried.seen.update({window: seen(70, kv=20), PLAIN: seen(70, kv=70)})
    asked: list[list[Setting]] = []

    def on_held_out(some: Sequence[Setting]) -> list[Seen]:
        asked.append(list(some))
        return [seen(70, 0.3 if one.window else 0.0) for one in some]

    assert first_that_passes(tried, on_held_out, 0.99, {})[0] == PLAIN
    assert asked == [[window], [PLAIN]]


@pytest.mark.parametrize("agree", [0.8, 1.0])
def test_where_nothing_passed_the_search_its_best_is_checked_and_does_not_pass(agree: float) -> None:
    """A setting that fails on one half of the questions and passes on the other has not passed."""
    tried = Search(lambda asked: [], 0.99)
    other = replace(PLAIN, keep_ratio=0.5)
    tried.seen.update({PLAIN: seen(70, 0.5, 0.8), other: seen(50, 0.5, 0.7)})
    assert first_that_passes(tried, lambda some: [seen(70, 0.0, agree)], 0.99, {}) == (
        PLAIN, seen(70, 0.0, agree), False,
    )  # fmt: skip


def test_a_preset_that_passes_twice_is_better_than_none() -> None:
    tried, settings = searched([70, 120])
    paper, balanced = replace(PLAIN, layers=(1, 4, 5), decode_retention=0.0), replace(PLAIN, layers=(1, 4, 5))
    tried.seen.update({paper: seen(150, kv=30), balanced: seen(150, kv=90)})
    tried.least_last = 6  # the search takes no such L3 by itself

    def on_held_out(some: Sequence[Setting]) -> list[Seen]:
        return [seen(tried.seen[one].tokens, 0.3) for one in some]

    presets = {paper: seen(150, kv=30), balanced: seen(150, kv=90)}
    assert first_that_passes(tried, on_held_out, 0.99, presets) == (paper, presets[paper], True)
    tried.seen[paper] = seen(150, 0.5, 0.8)
    assert first_that_passes(tried, on_held_out, 0.99, presets) == (balanced, presets[balanced], True)
    presets[balanced] = seen(150, 0.6, 0.5)
    presets[paper] = seen(150, 0.6, 0.5)
    chosen, _, passed = first_that_passes(tried, on_held_out, 0.99, presets)
    assert chosen in settings
    assert not passed
