from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.ratios import MICRO, to_micro
from metok_vllm.compression.retention import retain, retained_count
from tests.support.compression import naive
from tests.support.compression.generators import property_test, scores


@pytest.mark.parametrize(
    ("survivors", "delta", "count"),
    [(0, 1.0, 0), (10, 0.0, 0), (10, 1.0, 10), (10, 0.5, 5), (11, 0.5, 6), (100, 0.07, 7), (1, 0.000001, 1)],
)
def test_retained_count_by_hand(survivors: int, delta: float, count: int) -> None:
    assert retained_count(survivors, to_micro(delta)) == count


@property_test
@given(st.integers(0, 30).flatmap(lambda n: scores(n, nan=True)), st.integers(0, MICRO))
def test_the_top_scores_are_retained(values: list[float], delta_micro: int) -> None:
    mask = retain(torch.tensor(values), delta_micro)
    count = retained_count(len(values), delta_micro)
    kept = [i for i, retained in enumerate(mask.tolist()) if retained]
    assert kept == sorted(naive.best_first(values, range(len(values)))[:count])
