"""The search: which settings to try next, from what was seen of those before. No engine in here.

`docs/calibration.md` tells it in words. Every number of layers means: before that layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metok_vllm.calibrate.settings import Setting, Strides, with_strides
from metok_vllm.compression.selection import KVLayers
from metok_vllm.contract.forced import KL_LIMIT
from metok_vllm.contract.kv_layout import divides_evenly

FEW = 32
"""With fewer questions than this the horizon is taken one layer later: the worst may not be among them."""

MOST_FORWARDS = 30
"""Requests a question that the whole search may make."""

SHARES = (0.5, 0.25, 0.12)
"""Of the visual tokens, what a cut leaves."""

SCORINGS: tuple[dict[str, Any], ...] = ({"frame_smoothing": 1.0}, {"score_rows": "question"})
"""Other ways to score than the default, each by itself."""

CLEARLY = 0.8
"""A scoring must do so much less harm than the default to be taken."""

CLOSE = 1.05
"""Settings that take at most this many times the fewest tokens are as cheap, and KV decides."""


@dataclass(frozen=True)
class Seen:
    """What a setting did to the questions."""

    kl: tuple[float, ...]  # of each question (`Sample.kl`)
    harm: tuple[float, ...]  # the same (`Sample.harm`)
    agrees: tuple[bool, ...]
    tokens: float  # visual, mean of layers and questions
    kv: float  # visual tokens with KV while decoding, the same mean
    flops: float = 0.0  # of prefill, as a share of stock's
    kv_share: float = 0.0  # KV bytes, text included, as a share of stock's
    groups: int = 0  # KV cache groups of the engine

    @property
    def worst(self) -> float:
        """The largest harm of an answer."""
        return max(self.harm, default=0.0)

    @property
    def agreement(self) -> float:
        return statistics.fmean(self.agrees) if self.agrees else 0.0

    def passes(self, target: float) -> bool:
        """Whether so many of the answers stay what they are, each without more harm than `KL_LIMIT`."""
        fine = [agrees and harm <= KL_LIMIT for agrees, harm in zip(self.agrees, self.harm, strict=True)]
        return bool(fine) and statistics.fmean(fine) >= target


Evaluate = Callable[[Sequence[Setting]], list[Seen]]
"""Settings alike in `Setting.server`, in one engine start."""


@dataclass
class Horizon:
    """The layer from which on no visual token is needed."""

    layers: int  # of the model
    curve: dict[int, Seen] = field(default_factory=dict)  # with nothing visual from the layer on
    layer: int = 0  # the smallest at which no question is far from what it was; `layers`: there is none
    chosen: int = 0  # L3: the smallest from there on at which the answers pass, one later with few questions

    @property
    def found(self) -> bool:
        return self.layer < self.layers


def find_horizon(look: Callable[[int], Seen], layers: int, first: int, questions: int, target: float) -> Horizon:
    """Bisect for the smallest layer at which every KL is within `KL_LIMIT`; then, from there on, for the
    smallest at which the answers pass too: a long answer's KL is small where one word of it is another.

    Args:
        look: what the questions say with nothing visual from a layer on.
        layers: of the model. Nothing visual behind the last layer is the stock model itself.
        first: the smallest that L1 may be.
        questions: how many there are.
        target: share of the answers that must agree.
    """
    found = Horizon(layers)

    def smallest(behind: int, fine: Callable[[Seen], bool]) -> int:
        known = {layer: fine(seen) for layer, seen in found.curve.items() if layer > behind}
        good = min((layer for layer, is_fine in known.items() if is_fine), default=layers)
        bad = max((layer for layer, is_fine in known.items() if not is_fine and layer < good), default=behind)
        while good - bad > 1:
            middle = (bad + good) // 2
            found.curve[middle] = look(middle)
            if fine(found.curve[middle]):
                good = middle
            else:
                bad = middle
        return good

    # L3 is at least L1 + 2.
    found.layer = smallest(min(first + 1, layers - 1), lambda seen: max(seen.kl) <= KL_LIMIT)
    passing = smallest(found.layer - 1, lambda seen: seen.passes(target))
    found.chosen = min(layers, passing + (questions < FEW))
    return found


@dataclass
class Search:
    """All that was tried, in order, and how many requests a question it took."""

    evaluate: Evaluate
    target: float
    spent: int = 0
    seen: dict[Setting, Seen] = field(default_factory=dict)
    most: int = MOST_FORWARDS
    least_last: int = 0  # no setting with an earlier L3 is taken

    def try_all(self, settings: Sequence[Setting]) -> None:
        """Those of one engine that have not been tried, as far as the allowance goes."""
        fresh = [one for one in dict.fromkeys(settings) if one not in self.seen][: max(0, self.most - self.spent)]
        if not fresh:
            return
        assert len({(one.layers, one.window) for one in fresh}) == 1, "one engine has one choice of layers"
        self.seen.update(zip(fresh, self.evaluate(fresh), strict=True))
        self.spent += len(fresh)

    def good(self, setting: Setting) -> bool:
        """Whether it was tried and passes."""
        seen = self.seen.get(setting)
        return seen is not None and seen.passes(self.target)

    def ranked(self) -> list[Setting]:
        """Those that pass, best first: by fewest tokens, then by least KV, then by fewest KV cache groups."""
        left = [one for one in self.seen if self.good(one) and one.layers[2] >= self.least_last]
        order: list[Setting] = []
        while left:
            fewest = min(self.seen[one].tokens for one in left)
            close = [one for one in left if self.seen[one].tokens <= CLOSE * fewest]
            least = min(self.seen[one].kv for one in close)
            lean = [one for one in close if self.seen[one].kv <= CLOSE * least]
            best = min(lean, key=lambda one: (self.seen[one].groups, self.seen[one].kv, self.seen[one].tokens))
            order.append(best)
            left.remove(best)
        return order


def search(run: Search, last: int, layers: int, first: int, strides: Strides) -> None:
    """Try settings with L3 = `last`: strides, then single cuts, then pairs of cuts, then less KV.

    Args:
        run: collects what is seen; has what the probe of the horizon saw already.
        last: L3.
        layers: of the model.
        first: the smallest that L1 may be.
        strides: the family's own.
    """
    base = _strides(run, last, strides)
    if last - 2 >= first:
        scoring, earliest = _cuts(run, base, first, last, near_enough(layers))
        _pairs(run, base, scoring, earliest, strides)
    _less_kv(run, layers)


def near_enough(layers: int) -> int:
    """So many layers short of the best a bisection may stop, in a model of `layers`: what is left to gain is
    less than what the requests gain elsewhere.
    """
    return max(1, layers // 12)


def _strides(run: Search, last: int, strides: Strides) -> Setting:
    """The cheapest stage 1, with nothing cut before `last`, that uses up at most half of what may change: the
    cuts need the rest. If none is so sparing, the cheapest that passes.
    """
    fine, middle, _ = strides
    plain = Setting((last - 2, last - 1, last), strides)
    choices = [plain, replace(plain, key_events=3), with_strides(plain, (middle,) * 3)]
    run.try_all(choices)
    passing = [one for one in choices if run.good(one)]
    sparing = [one for one in passing if run.seen[one].passes((1 + run.target) / 2)]
    if passing:
        return min(sparing or passing, key=lambda one: run.seen[one].tokens)
    finest = with_strides(plain, (fine,) * 3)
    run.try_all([finest])
    return finest


def cut_at(base: Setting, layer: int, share: float) -> Setting:
    """One cut that leaves `share`: two, in neighbouring layers, which leave its square root each."""
    return replace(base, layers=(layer, layer + 1, base.layers[2]), keep_ratio=round(share**0.5, 3))


def _cuts(run: Search, base: Setting, first: int, last: int, near: int) -> tuple[Setting, dict[float, int]]:
    """Who scores best, and for every share the earliest layer at which a cut to it passes.

    A cut that passes is taken to pass at every later layer, and to a larger share.
    """
    scoring: Setting | None = None
    bad = dict.fromkeys(SHARES, first - 1)
    good = dict.fromkeys(SHARES, last - 1)  # no L2 is left before `last` there: never
    while True:
        open_shares = [share for share in (0.25, 0.5, 0.12) if good[share] - bad[share] > near]
        if not open_shares or run.spent >= run.most - _KEPT_BACK:
            break
        layer = (bad[open_shares[0]] + good[open_shares[0]]) // 2
        here = [share for share in open_shares if bad[share] < layer < good[share]]
        tried = [cut_at(scoring or base, layer, share) for share in here]
        if scoring is None:
            tried += [cut_at(replace(base, **dial), layer, here[0]) for dial in SCORINGS]
        run.try_all(tried)
        if scoring is None:
            scoring = _best_scoring(run, base, layer, here[0])
        for share in here:
            cut = cut_at(scoring, layer, share)
            if cut not in run.seen:  # the first engine had it under another scoring: not known yet
                continue
            for other in SHARES:
                if run.good(cut) and other >= share:
                    good[other] = min(good[other], layer)
                if not run.good(cut) and other <= share:
                    bad[other] = min(max(bad[other], layer), good[other] - 1)
    return scoring or base, {share: layer for share, layer in good.items() if layer < last - 1}


def _best_scoring(run: Search, base: Setting, layer: int, share: float) -> Setting:
    """`base` with every dial of `SCORINGS` that does clearly less harm by itself."""
    harm = _mean_harm(run, cut_at(base, layer, share))
    best = base
    for dial in SCORINGS:
        if _mean_harm(run, cut_at(replace(base, **dial), layer, share)) < CLEARLY * harm:
            best = replace(best, **dial)
    return best


_KEPT_BACK = 8  # forwards for pairs of cuts and for KV


def _mean_harm(run: Search, setting: Setting) -> float:
    seen = run.seen.get(setting)
    return statistics.fmean(seen.harm) if seen is not None else float("inf")


def _pairs(run: Search, base: Setting, scoring: Setting, earliest: dict[float, int], strides: Strides) -> None:
    """Two cuts: the first as early as its share allows, the second as early as what is left then does."""
    last = base.layers[2]
    for ratio, share, left in ((0.5, 0.5, 0.25), (0.35, 0.25, 0.12)):
        if share not in earliest:
            continue
        first = earliest[share] + 1  # a single cut's share is reached at the second of its two layers
        second = max(first + 1, earliest.get(left, last - 2) + 1)
        if second >= last:
            continue
        pair = replace(scoring, layers=(first, second, last), keep_ratio=ratio)
        milder = replace(pair, keep_ratio=round((1 + ratio) / 2, 3))
        coarser = [with_strides(pair, (strides[1],) * 3)] if base.strides[0] != strides[1] else []
        if pair.events > 1:
            coarser.append(replace(pair, key_events=3))
        room = max(0, run.most - run.spent - _FOR_KV)
        run.try_all([pair, milder, *coarser][: min(4, room)])


_FOR_KV = 6  # of `_KEPT_BACK`


def _less_kv(run: Search, layers: int) -> None:
    """Of the best less KV while decoding: a quarter of what is retained; a window of layers; without one a
    layout near it whose blocks come out even.
    """
    for best in run.ranked()[:1]:
        run.try_all([replace(best, decode_retention=0.25)])
        even = None if _window(run, best, near_enough(layers)) else even_layout(best.layers, layers)
        if even is not None:
            near = replace(best, layers=even)
            run.try_all([near, replace(near, decode_retention=0.25)])


def _window(run: Search, setting: Setting, near: int) -> bool:
    """Which layers decoding reads visual tokens in: the latest first one that passes, then the earliest end.

    Every try is a setting that may be taken. A window that passes is taken to pass when it is wider.

    Returns:
        Whether there is one that is narrower than all layers up to L3.
    """
    last = setting.layers[2]  # nothing visual is left from there on
    first = _bisect(run, setting, (0, last), near, lambda start: (start, last))
    end = _bisect(run, setting, (last, first), near, lambda end: (first, end))
    return (first, end) != (0, last)


def _bisect(
    run: Search, setting: Setting, between: tuple[int, int], near: int, window: Callable[[int], KVLayers]
) -> int:
    """Of two layers, at the first of which the window passes: the one nearest to the second at which it does,
    as far as the allowance goes.
    """
    good, bad = between
    while abs(good - bad) > near:
        middle = (good + bad) // 2
        tried = replace(setting, decode_retention=0.0, window=window(middle))
        run.try_all([tried])
        if tried not in run.seen:
            break
        if run.good(tried):
            good = middle
        else:
            bad = middle
    return good


def even_layout(chosen: tuple[int, int, int], layers: int) -> tuple[int, int, int] | None:
    """The nearest layout with later cuts whose KV blocks need no padding; None if `chosen` is it, or none is
    within two layers.
    """
    first, second, third = chosen
    if divides_evenly([n for n in (first, third - first, layers - third) if n]):
        return None
    choices = [
        (l1, max(second, l1 + 1), l3)
        for l1 in range(first, first + 3)
        for l3 in range(third, min(layers, third + 2) + 1)
        if max(second, l1 + 1) < l3 and divides_evenly([n for n in (l1, l3 - l1, layers - l3) if n])
    ]
    return min(choices, key=lambda c: (c[0] - first + c[2] - third, c), default=None)
