"""Random inputs for the property tests: few distinct values, so that ties are the rule."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

property_test = settings(
    deadline=None,  # cores are shared; slowness is the suite's timeout's business
    max_examples=200,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

score = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1.0, 1.0, width=32)
score_or_nan = score | st.just(float("nan"))


def scores(length: int, nan: bool = False) -> st.SearchStrategy[list[float]]:
    return st.lists(score_or_nan if nan else score, min_size=length, max_size=length)


@st.composite
def event_ids(draw: st.DrawFn, max_frames: int = 30) -> list[int]:
    """Non-decreasing event ids from 0 without gaps."""
    steps = draw(st.lists(st.integers(0, 1), max_size=max_frames - 1))
    return list(accumulate([0, *steps]))
