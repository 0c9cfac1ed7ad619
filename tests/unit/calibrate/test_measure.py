"""The distance between two models along one answer: what it must be where the truth is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.calibrate.measure import interval, sample
from metok_vllm.contract.forced import NEAR_TIE, divergence, is_choice


def logs(*probabilities: float) -> dict[int, float]:
    return {token: math.log(p) for token, p in enumerate(probabilities)}


def exact(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


distributions = st.lists(st.floats(0.01, 1), min_size=6, max_size=6).map(lambda v: [x / sum(v) for x in v])


@given(distributions, distributions)
def test_with_all_tokens_it_is_the_divergence(p: list[float], q: list[float]) -> None:
    assert divergence(logs(*p), logs(*q)) == pytest.approx(exact(p, q), abs=1e-5)


@given(distributions, distributions, st.integers(1, 5))
def test_a_bucket_only_lowers_it(p: list[float], q: list[float], known: int) -> None:
    merged = divergence(logs(*p[:known]), logs(*q))
    assert -1e-9 <= merged <= exact(p, q) + 1e-6
    rest_p, rest_q = sum(p[known:]), sum(q[known:])
    assert merged == pytest.approx(exact([*p[:known], rest_p], [*q[:known], rest_q]), abs=1e-5)


@given(distributions)
def test_the_same_is_no_distance(p: list[float]) -> None:
    assert divergence(logs(*p[:4]), logs(*p)) == pytest.approx(0, abs=1e-9)


def test_a_token_that_the_variant_thinks_impossible_is_far_and_finite() -> None:
    far = divergence({0: math.log(0.9), 1: math.log(0.1)}, {0: -math.inf, 1: 0.0})
    assert 20 < far < 100


def test_a_token_that_only_the_variant_wants_counts_through_the_bucket() -> None:
    assert divergence({0: math.log(0.999)}, {0: math.log(0.01)}) > 3


def test_an_answer_is_as_far_as_its_tokens_are_on_the_mean() -> None:
    steps = [logs(0.9, 0.1), logs(0.9, 0.1)]
    seen = sample([0, 0], steps, [logs(0.9, 0.1), logs(0.1, 0.9)], [1, 2])
    assert seen.kl == seen.harm == pytest.approx(exact([0.9, 0.1], [0.1, 0.9]) / 2)
    assert not seen.agrees


def test_who_is_surer_of_the_same_token_does_no_harm() -> None:
    surer = sample([0], [logs(0.6, 0.4)], [logs(0.99, 0.01)], [1])
    assert surer.kl > 1
    assert surer.harm == 0
    unsure = sample([0], [logs(0.99, 0.01)], [logs(0.6, 0.4)], [1])
    assert unsure.harm == unsure.kl > 0.2


def test_a_near_tie_is_as_good() -> None:
    stock = {0: -0.7, 1: -0.7 - 0.9 * NEAR_TIE, 2: -0.7 - 1.1 * NEAR_TIE}
    assert [is_choice(stock, token) for token in (0, 1, 2, 3, None)] == [True, True, False, False, False]


def test_what_the_variant_would_have_said_must_be_as_good_at_every_token() -> None:
    sure, torn = logs(0.9, 0.1), logs(0.48, 0.46, 0.06)
    assert sample([0, 0], [sure, torn], [sure, logs(0.4, 0.55, 0.05)], [1, 2]).agrees
    assert not sample([0, 0], [sure, torn], [sure, logs(0.4, 0.05, 0.55)], [1, 2]).agrees, "another than these two"
    assert not sample([0, 0], [sure, torn], [logs(0.1, 0.9), torn], [2, 1]).agrees, "where the model is sure"


def test_what_was_not_asked_about_is_not_as_good() -> None:
    torn = logs(0.48, 0.46)
    assert sample([0], [torn], [logs(0.2, 0.3)], [2]).agrees
    assert not sample([0], [torn], [logs(0.2, 0.3)], [3]).agrees, "a token of the other half is ahead of both"
    assert not sample([0], [torn], [logs(0.3, 0.2)], [2]).agrees
    assert sample([0], [torn], [logs(0.2, 0.45)], [3]).agrees, "the other 35 % cannot be ahead of 45 %"


@pytest.mark.parametrize("impossible", [math.nan, -math.inf])
def test_no_number_is_no_agreement(impossible: float) -> None:
    """A number type that overflows must not pass as the best setting."""
    sure, nothing = logs(0.95, 0.02), {0: impossible, 1: impossible}
    seen = sample([0], [sure], [nothing], [0])
    assert not seen.agrees
    assert 20 < seen.harm == seen.kl <= 50
    if math.isnan(impossible):
        assert sample([0], [nothing], [sure], [1]).kl == 50
        assert not sample([0], [nothing], [sure], [1]).agrees


def test_what_the_model_itself_holds_impossible_is_no_distance() -> None:
    assert divergence({0: 0.0, 1: -math.inf}, {0: 0.0, 1: -9.0}) == pytest.approx(0, abs=1e-3)


def test_as_likely_as_the_best_is_the_choice() -> None:
    """vLLM ranks a token behind its equals."""
    assert sample([0], [logs(0.9, 0.1)], [logs(0.45, 0.05, 0.45)], [2]).agrees


@pytest.mark.parametrize(
    ("agreeing", "count", "low", "high"),
    [(32, 32, 0.893, 1.0), (0, 32, 0.0, 0.107), (30, 32, 0.799, 0.983), (0, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(agreeing: int, count: int, low: float, high: float) -> None:
    assert interval(agreeing, count) == pytest.approx((low, high), abs=1e-3)
