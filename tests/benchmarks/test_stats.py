"""Scoring, intervals and pairing of the accuracy benchmark, on made-up verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.stats import Bootstrap, compare, is_right


def bools(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def test_exact_match_but_for_blanks_at_the_ends() -> None:
    assert is_right(" red\n", "red")
    for wrong in ("Red", "red.", "a red", ""):
        assert not is_right(wrong, "red")


def test_share_difference_won_and_lost() -> None:
    ours, stock, half = bools("11010110"), bools("10110100"), bools("11110000")
    boot = Bootstrap([0, 0, 1, 1, 2, 2, 3, 3])
    table = compare(boot, ours, stock, {"all": bools("1" * 8), "half": half, "none": bools("0" * 8)})
    assert list(table) == ["all", "half"]
    assert (table["all"]["n"], table["all"]["accuracy"]) == (8, 5 / 8)
    assert (table["half"]["n"], table["half"]["accuracy"]) == (4, 3 / 4)
    paired = table["all"]["to_stock"]
    assert paired["difference"] == pytest.approx(1 / 8)
    assert (paired["won"], paired["lost"]) == (2, 1)
    assert (table["half"]["to_stock"]["won"], table["half"]["to_stock"]["lost"]) == (1, 1)
    assert table["half"]["to_stock"]["difference"] == 0
    assert "to_stock" not in compare(boot, stock, None, {"all": half})["all"]


def test_questions_of_one_video_are_not_counted_as_independent() -> None:
    """20 videos with 10 questions each that all go the same way: as uncertain as 20 questions, not as 200."""
    right = np.repeat(bools("10" * 10), 10)
    whole = np.ones(200, dtype=bool)
    clustered = Bootstrap(np.repeat(np.arange(20), 10).tolist()).share(right, whole)
    single = Bootstrap(np.arange(200).tolist()).share(right, whole)
    assert clustered.accuracy == single.accuracy == 0.5
    assert clustered.low is not None
    assert single.low is not None
    # Standard errors of 20 and of 200 coin flips: 0.112 and 0.035.
    assert clustered.low == pytest.approx(0.5 - 1.96 * 0.112, abs=0.05)
    assert single.low == pytest.approx(0.5 - 1.96 * 0.035, abs=0.02)


def test_pairing_sees_what_the_shares_hide() -> None:
    """Verdicts vary from video to video, but one method is always worse by one question:
    the difference is certain.
    """
    rng = np.random.default_rng(0)
    stock = rng.random(400) < 0.5
    stock[::4] = True
    worse = stock.copy()
    worse[::4] = False
    boot = Bootstrap(np.repeat(np.arange(100), 4).tolist())
    whole = np.ones(400, dtype=bool)
    paired = boot.difference(worse, stock, whole)
    assert (paired.difference, paired.won, paired.lost) == (-0.25, 0, 100)
    share = boot.share(worse, whole)
    assert share.low is not None
    assert paired.low is not None
    assert paired.high is not None
    assert share.accuracy - share.low > 0.03
    assert paired.low > -0.3
    assert paired.high < -0.2


def test_the_interval_covers_the_truth() -> None:
    """Of 95 % intervals over simulated sets, about 95 % hold the true share."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        level = rng.beta(4, 2, size=60)  # videos differ in how hard they are; mean 2/3
        right = (rng.random((60, 8)) < level[:, None]).flatten()
        found = Bootstrap(np.repeat(np.arange(60), 8).tolist(), draws=500).share(right, np.ones(480, dtype=bool))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 2 / 3 <= found.high
    assert 180 <= inside <= 200


def test_all_alike_is_not_certain_and_one_video_has_no_interval() -> None:
    boot = Bootstrap([0, 1, 2, 3])
    every = bools("1111")
    share = boot.share(every, every)
    assert (share.accuracy, share.high) == (1.0, 1.0)
    assert share.low == pytest.approx(1 - 1.96**2 / (4 + 1.96**2))
    paired = boot.difference(every, every, every)
    assert paired.low == -paired.high == pytest.approx(-(1.96**2) / (4 + 1.96**2))  # type: ignore[operator]
    alone = Bootstrap([0, 0, 0]).share(bools("110"), bools("111"))
    assert (alone.low, alone.high) == (None, None)
    assert alone.accuracy == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no question"):
        boot.share(every, bools("0000"))
