"""The search against models that are made up, so that what it should find is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metok_vllm.calibrate.search import (
    CLOSE,
    MOST_FORWARDS,
    Search,
    Seen,
    _strides,
    cut_at,
    even_layout,
    find_horizon,
    search,
)
from metok_vllm.calibrate.settings import Setting, unseen_from
from metok_vllm.contract.forced import KL_LIMIT
from metok_vllm.contract.kv_layout import divides_evenly

STRIDES = (2, 4, 8)
BEFORE = 4  # forwards that are spent before the search begins


@dataclass
class MadeUp:
    """A model that reads its video up to a layer, and to which a cut does no harm from another on."""

    layers: int
    reads: int  # from this layer on it needs nothing visual
    ready: dict[float, int] = field(default_factory=lambda: {0.5: 2, 0.25: 3, 0.12: 5})
    needs_smoothing: bool = False
    hurt_by_smoothing: bool = False
    coarsest: int = 8  # stride that still shows enough
    needs_retention: bool = False
    decodes: tuple[int, int] = (0, 99)  # decoding reads what is visual in these layers alone
    noise: float = 0.0
    engines: list[tuple[int, int, int]] = field(default_factory=list)
    asked: int = 0
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    def left_at(self, setting: Setting, layer: int) -> float:
        """Share of stage 1's tokens that is alive in a layer."""
        cuts = sum(layer >= cut for cut in setting.layers[:2])
        return 0.0 if layer >= setting.layers[2] else setting.keep_ratio**cuts

    def harm(self, setting: Setting) -> float:
        harm = 0.0
        if setting.layers[2] < self.reads:
            harm += 1.0
        for cut, share in zip(setting.layers[:2], (setting.keep_ratio, setting.keep_ratio**2), strict=True):
            if share == 1 or cut >= self.reads:
                continue
            needed = max((layer for least, layer in self.ready.items() if share < least * 1.08 + 1e-9), default=0)
            harm += 0.9 * (cut < needed or share < 0.11)
        if setting.keep_ratio < 1 and self.needs_smoothing != (setting.frame_smoothing > 0):
            harm += 0.5 * (self.needs_smoothing or self.hurt_by_smoothing)
        harm += 0.7 * (min(setting.strides) > self.coarsest)
        if setting.window:
            start, end = self.decodes
            return harm + 0.6 * (setting.window[0] > start or setting.window[1] < min(end, setting.layers[2]))
        return harm + 0.6 * (self.needs_retention and setting.decode_retention < 0.2)

    def evaluate(self, tried: Sequence[Setting]) -> list[Seen]:
        assert tried, "an engine was started for nothing"
        self.engines.append(tried[0].layers)
        self.asked += len(tried)
        found = []
        for setting in tried:
            l1, l2, l3 = setting.layers
            assert 1 <= l1 < l2 < l3 <= self.layers
            stage1 = 256.0 / (sum(setting.strides) / 3)
            tokens = stage1 * sum(self.left_at(setting, layer) for layer in range(self.layers)) / self.layers
            kv = stage1 * (l1 + setting.decode_retention * setting.keep_ratio**2 * (l3 - l1)) / self.layers
            if setting.window:
                kv = stage1 * sum(self.left_at(setting, layer) for layer in range(*setting.window)) / self.layers
            kl = [self.harm(setting) * self.dice.uniform(0.8, 1.2) + self.noise * self.dice.random() for _ in range(8)]
            found.append(Seen(tuple(kl), tuple(kl), tuple(one <= KL_LIMIT for one in kl), tokens, kv))
        return found


def calibrated(model: MadeUp, questions: int = 32, target: float = 0.99) -> tuple[Search, int]:
    run = Search(model.evaluate, target, most=MOST_FORWARDS - BEFORE)

    def look(layer: int) -> Seen:
        run.try_all([unseen_from(layer, STRIDES[0])])
        return run.seen[unseen_from(layer, STRIDES[0])]

    horizon = find_horizon(look, model.layers, 1, questions, target)
    run.least_last = horizon.chosen
    search(run, horizon.chosen, model.layers, 1, STRIDES)
    return run, horizon.layer


def far(kl: float, agrees: bool = True) -> Seen:
    return Seen((0.0, kl), (0.0, 0.0), (True, agrees), 1, 1)


@given(st.integers(3, 80), st.data())
def test_the_horizon_is_the_smallest_layer_that_is_good(layers: int, data: st.DataObject) -> None:
    reads = data.draw(st.integers(1, layers))
    asked = []

    def look(layer: int) -> Seen:
        asked.append(layer)
        return far(0.1 if layer >= reads else 1.5)

    found = find_horizon(look, layers, 1, 32, 0.99)
    assert found.layer == found.chosen == max(reads, min(3, layers))
    assert len(asked) == len(set(asked)) <= 7
    assert all(3 <= layer < layers for layer in asked)
    assert found.found == (found.layer < layers)
    assert {layer: max(seen.kl) for layer, seen in found.curve.items()} == {
        k: 0.1 if k >= reads else 1.5 for k in asked
    }


def test_few_questions_make_the_horizon_a_layer_later_but_not_later_than_the_last() -> None:
    assert find_horizon(lambda k: far(k < 6), 12, 1, 31, 0.99).chosen == 7
    assert find_horizon(lambda k: far(k < 6), 12, 1, 32, 0.99).chosen == 6
    last = find_horizon(lambda k: far(1.0), 12, 1, 8, 0.99)
    assert (last.layer, last.chosen, last.found) == (12, 12, False)


def test_a_first_layer_that_the_family_needs_is_kept() -> None:
    asked = []
    found = find_horizon(lambda k: far(asked.append(k) is None and k < 2), 28, 4, 32, 0.99)
    assert min(asked) >= 6
    assert found.layer == 6


def test_one_question_that_is_far_off_decides() -> None:
    """A mean would say that all is well at layer 5."""
    worst = {5: 0.21, 6: 0.2}
    assert find_horizon(lambda k: far(worst.get(k, 0.0 if k > 6 else 1.0)), 12, 1, 32, 0.99).layer == 6


def test_an_answer_that_changes_moves_l3_and_not_the_horizon() -> None:
    """A long answer's KL is small where one word of it is another."""
    asked: list[int] = []
    found = find_horizon(
        lambda k: far(0.01 if k >= 6 else 1.0, agrees=asked.append(k) is None and k >= 8), 12, 1, 32, 0.99
    )
    assert (found.layer, found.chosen) == (6, 8)
    assert len(asked) == len(set(asked)) <= 6
    never = find_horizon(lambda k: far(0.01, agrees=False), 12, 1, 32, 0.99)
    assert (never.layer, never.chosen, never.found) == (3, 12, True)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(6, 60),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
)
def test_what_is_ranked_first_does_no_harm_and_saves(
    layers: int, data: st.DataObject, needs: bool, hurt: bool, coarsest: int, retention: bool
) -> None:
    reads = data.draw(st.integers(3, layers))
    first = data.draw(st.integers(1, max(1, reads - 2)))
    ready = {0.5: first, 0.25: min(reads, first + 1), 0.12: min(reads, first + 3)}
    model = MadeUp(layers, reads, ready, needs, hurt and not needs, coarsest, retention)
    run, horizon = calibrated(model)
    assert horizon == max(3, reads)
    assert run.spent == model.asked <= MOST_FORWARDS - BEFORE
    assert len(model.engines) <= 20
    order = run.ranked()
    assert order, "nothing visual from the horizon on is always a setting"
    best = order[0]
    assert model.harm(best) == 0
    stock = 256.0 / STRIDES[0]
    assert run.seen[best].tokens <= stock
    assert all(run.seen[best].tokens <= CLOSE * run.seen[other].tokens for other in order)
    assert best.layers[2] >= horizon


def test_a_model_that_needs_smoothing_gets_it_and_one_that_is_hurt_does_not() -> None:
    needs, _ = calibrated(MadeUp(30, 24, {0.5: 8, 0.25: 12, 0.12: 16}, needs_smoothing=True))
    best = needs.ranked()[0]
    assert best.keep_ratio < 1
    assert best.frame_smoothing > 0
    assert best.layers[0] <= 9, "what scores best is used for the later cuts too"
    hurt, _ = calibrated(MadeUp(30, 24, {0.5: 8, 0.25: 12, 0.12: 16}, hurt_by_smoothing=True))
    best = hurt.ranked()[0]
    assert best.keep_ratio < 1
    assert best.frame_smoothing == 0


def test_two_cuts_save_more_than_one_where_the_model_allows_it() -> None:
    run, _ = calibrated(MadeUp(30, 24, {0.5: 3, 0.25: 14, 0.12: 22}))
    best = run.ranked()[0]
    assert best.layers[0] < 10 < best.layers[1]
    assert (best.keep_ratio, best.frame_smoothing, best.score_rows) == (0.5, 0, "text"), "no scoring was clearly better"
    for share, layer in ((0.5, best.layers[0]), (0.25, best.layers[1])):
        assert run.good(cut_at(replace(best, decode_retention=1.0), layer - 1, share)), (
            "what is left there is what a single cut left there"
        )


def test_retention_goes_where_answers_do_not_need_it() -> None:
    assert calibrated(MadeUp(12, 6, needs_retention=True))[0].ranked()[0].decode_retention == 0.25


@pytest.mark.parametrize("seed", range(20))
def test_noise_makes_it_cautious_not_wrong(seed: int) -> None:
    """What is ranked passed when it was tried, whatever the noise made of the bisections."""
    model = MadeUp(24, 12, noise=0.25, dice=random.Random(seed))
    run, _ = calibrated(model)
    assert all(run.seen[one].passes(0.99) for one in run.ranked())
    assert run.spent <= MOST_FORWARDS - BEFORE
    assert all(model.harm(one) < 0.25 for one in run.ranked())


def test_a_setting_passes_by_agreement_and_by_its_worst_answer() -> None:
    good = Seen((0.9,) * 10, (0.1,) * 10, (True,) * 10, 10, 10)
    assert good.passes(0.99)
    assert not replace(good, agrees=(False, *good.agrees[1:])).passes(0.99)
    assert replace(good, agrees=(False, *good.agrees[1:])).passes(0.9)
    far = replace(good, harm=(0.3, *good.harm[1:]))
    assert not far.passes(0.99)
    assert far.passes(0.9)
    assert not replace(far, agrees=(True, False, *good.agrees[2:])).passes(0.9), "two answers, not one of each"
    assert not replace(good, agrees=(), harm=()).passes(0.0), "nothing was asked"


@pytest.mark.parametrize(("layers", "reads", "decodes"), [(12, 6, (2, 5)), (12, 6, (3, 6)), (30, 24, (5, 23))])
def test_the_layers_that_decoding_reads_are_found(layers: int, reads: int, decodes: tuple[int, int]) -> None:
    """Those and no others, unless the allowance ends before, which it may in a deep model."""
    run, _ = calibrated(MadeUp(layers, reads, decodes=decodes))
    best = run.ranked()[0]
    assert best.window is not None
    start, end = best.window
    assert start <= decodes[0]
    assert end >= min(decodes[1], best.layers[2])
    if layers == 12:
        assert best.window == (decodes[0], min(decodes[1], best.layers[2]))
    whole = best.with_all_kv()
    assert run.seen[best].kv < run.seen[whole].kv
    assert run.seen[best].tokens == run.seen[whole].tokens
    assert run.spent <= MOST_FORWARDS - BEFORE


def test_where_decoding_reads_all_layers_there_is_no_window() -> None:
    run, _ = calibrated(MadeUp(12, 6, needs_retention=True))
    assert run.ranked()[0].window is None
    assert any(one.window for one in run.seen)


def test_among_settings_of_about_the_same_kv_the_one_with_fewer_groups() -> None:
    plain = Setting((4, 5, 6), STRIDES)
    few, many, lean = (replace(plain, window=(start, 6), decode_retention=0.0) for start in (1, 2, 3))
    run = Search(lambda tried: [], 0.99)
    told = Seen((0.0,), (0.0,), (True,), 100, 40)
    run.seen = {
        many: replace(told, kv=40, groups=5),
        few: replace(told, kv=41, groups=3),
        lean: replace(told, kv=20, groups=5),
    }
    assert run.ranked() == [lean, few, many]


def test_nothing_is_tried_twice_and_the_allowance_holds() -> None:
    model = MadeUp(12, 6)
    run = Search(model.evaluate, 0.99, most=3)
    some = [Setting((4, 5, 6), STRIDES, keep_ratio=share) for share in (0.2, 0.3, 0.4, 0.5, 0.6)]
    run.try_all(some[:2])
    run.try_all(some)
    assert (run.spent, model.asked, list(run.seen)) == (3, 3, some[:3])
    run.try_all(some)
    assert model.engines == [(4, 5, 6)] * 2


def test_close_settings_are_told_apart_by_their_kv() -> None:
    run = Search(lambda tried: [], 0.99)
    good = Seen((0.0,), (0.0,), (True,), 100, 90)
    a, b, c = (Setting((1, 2, 6), STRIDES, keep_ratio=share) for share in (0.1, 0.2, 0.3))
    run.seen = {a: good, b: replace(good, tokens=104, kv=20), c: replace(good, tokens=106, kv=1)}
    assert run.ranked() == [b, a, c]
    run.least_last = 7
    assert run.ranked() == []


@given(st.integers(4, 80), st.data())
def test_an_even_layout_cuts_later_and_has_no_padding(layers: int, data: st.DataObject) -> None:
    third = data.draw(st.integers(3, layers))
    first = data.draw(st.integers(1, third - 2))
    second = data.draw(st.integers(first + 1, third - 1))
    found = even_layout((first, second, third), layers)
    if found is not None:
        l1, l2, l3 = found
        assert (l1, l2, l3) >= (first, second, third) or l1 > first
        assert first <= l1 <= first + 2
        assert third <= l3 <= min(layers, third + 2)
        assert second <= l2 < l3
        assert l1 < l2
        assert divides_evenly([n for n in (l1, l3 - l1, layers - l3) if n])
        assert not divides_evenly([n for n in (first, third - first, layers - third) if n])


def test_coarser_frames_leave_the_cuts_half_of_what_may_change() -> None:
    """Of 100 answers 4 may change: frames pooled by 4 change 3 of them, the finest of key events alone 2."""
    changed = {(2, 4, 8): 2, (4, 4, 4): 3}

    def evaluate(tried: Sequence[Setting]) -> list[Seen]:
        found = []
        for one in tried:
            agrees = tuple(i >= changed[one.strides] for i in range(100))
            found.append(Seen((0.0,) * 100, (0.0,) * 100, agrees, sum(one.strides[:1]) ** -1 + one.key_events / 100, 1))
        return found

    for target, strides, key_events in ((0.96, (2, 4, 8), 3), (0.97, (4, 4, 4), 1), (0.94, (4, 4, 4), 1)):
        run = Search(evaluate, target, most=3)
        search(run, 6, 12, 1, STRIDES)
        base = _strides(run, 6, STRIDES)
        assert (base.strides, base.key_events) == (strides, key_events), target
