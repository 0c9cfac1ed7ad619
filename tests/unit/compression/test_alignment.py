from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.alignment import dual_tower, embedding, event_scores, key_events, none
from tests.support.compression import naive
from tests.support.compression.generators import event_ids, property_test, scores


def test_dual_tower_takes_the_elementwise_max_over_windows() -> None:
    frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 0.0]])
    windows = torch.tensor([[3.0, -9.0], [-7.0, 4.0]])  # together (3, 4), which neither window points along
    torch.testing.assert_close(dual_tower(frames, windows), torch.tensor([0.6, 0.8, 1.0, 0.0]))


def test_dual_tower_refuses_a_question_without_windows() -> None:
    with pytest.raises(ValueError, match="at least one text window"):
        dual_tower(torch.zeros(2, 3), torch.zeros(0, 3))


def test_embedding_compares_with_the_mean_question_token() -> None:
    frames = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.bfloat16)
    question = torch.tensor([[6.0, 0.0], [0.0, 8.0]], dtype=torch.bfloat16)
    r = embedding(frames, question)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r, torch.tensor([0.6, -0.8]))


def test_empty_question_scores_every_frame_zero() -> None:
    assert embedding(torch.randn(3, 4), torch.zeros(0, 4)).tolist() == [0.0, 0.0, 0.0]


@property_test
@given(event_ids(), st.integers(0, 2**31))
def test_none_equals_plain_loops(ids: list[int], seed: int) -> None:
    vectors = torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(seed))
    events = ids[-1] + 1
    r, lengths = none(vectors, torch.tensor(ids), events)
    for event, frames in naive.members(ids).items():
        mean = vectors[frames].mean(0)
        torch.testing.assert_close(r[frames], torch.cosine_similarity(vectors[frames], mean[None]), atol=1e-5, rtol=0)
        assert lengths[event].item() == len(frames)
    assert r.dtype == lengths.dtype == torch.float32


def test_a_bright_event_does_not_blur_the_mean_of_the_next() -> None:
    dim = torch.tensor([[1e-3, 0.0], [0.0, 1e-3]])
    vectors = torch.cat([torch.full((1000, 2), 12345.678), dim])
    ids = torch.tensor([0] * 1000 + [1, 1])
    r, _ = none(vectors, ids, 2)
    torch.testing.assert_close(r[-2:], torch.full((2,), 0.5**0.5))


@property_test
@given(event_ids().flatmap(lambda ids: st.tuples(st.just(ids), scores(len(ids), nan=True))))
def test_event_score_is_its_best_frame(case: tuple[list[int], list[float]]) -> None:
    ids, r = case
    events = ids[-1] + 1
    result = event_scores(torch.tensor(r), torch.tensor(ids), events).tolist()
    for event, frames in naive.members(ids).items():
        numbers = [r[i] for i in frames if not math.isnan(r[i])]
        assert result[event] == pytest.approx(max(numbers, default=-math.inf), abs=1e-7)


@property_test
@given(st.integers(1, 12).flatmap(lambda n: scores(n, nan=True)), st.integers(0, 14))
def test_key_events_are_the_best(values: list[float], count: int) -> None:
    mask = key_events(torch.tensor(values), count)
    assert mask.dtype == torch.bool
    assert [i for i, key in enumerate(mask.tolist()) if key] == sorted(
        naive.best_first(values, range(len(values)))[:count]
    )
