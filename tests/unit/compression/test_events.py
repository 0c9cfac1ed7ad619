from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.events import adjacent_similarity, event_lengths, frame_vectors, segment
from tests.support.compression import naive
from tests.support.compression.generators import property_test, scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_frame_vectors_are_float32_means(dtype: torch.dtype) -> None:
    features = torch.randn(3, 49, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    vectors = frame_vectors(features)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, features.to(torch.float32).mean(1), rtol=1e-6, atol=1e-7)


def test_frame_vectors_accumulate_in_float32() -> None:
    # In float16, 4096 + 1 is 4096: a sum kept in the input's type would lose the tail.
    features = torch.ones(1, 8192, 1, dtype=torch.float16)
    assert frame_vectors(features).item() == 1.0


def test_adjacent_similarity_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, -1.0], [0.0, 0.0]])
    assert adjacent_similarity(vectors).tolist() == [1.0, 0.0, -1.0, 0.0]
    assert adjacent_similarity(vectors[:1]).shape == (0,)


def test_adjacent_similarity_survives_float16_extremes() -> None:
    # The squared norm of these overflows float16.
    vectors = torch.full((2, 4096), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(adjacent_similarity(vectors), torch.ones(1))


def test_cuts_after_the_lowest_similarities() -> None:
    similarity = torch.tensor([0.9, 0.1, 0.8, 0.8, 0.2, 0.9])
    assert segment(similarity, 3).tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_tied_cuts_take_the_lowest_index() -> None:
    assert segment(torch.tensor([0.5, 0.0, -0.0, 0.0]), 2).tolist() == [0, 0, 1, 1, 1]
    assert segment(torch.full((99,), 0.5), 4).tolist() == [0, 1, 2, *[3] * 97]


def test_nan_similarity_is_cut_last() -> None:
    assert segment(torch.tensor([float("nan"), 0.9, 0.95]), 2).tolist() == [0, 0, 1, 1]


def test_no_events_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 event, not 0"):
        segment(torch.zeros(3), 0)


@pytest.mark.parametrize("events", [1, 2, 5, 1024])
def test_events_partition_videos_of_every_length(events: int) -> None:
    generator = torch.Generator().manual_seed(events)
    for frames in range(1, 1025):
        ids = segment(torch.rand(frames - 1, generator=generator), events)
        steps = ids.diff()
        present = min(events, frames)
        assert ids.shape == (frames,)
        assert int(ids[0]) == 0
        assert bool(((steps == 0) | (steps == 1)).all())  # contiguous, and none skipped
        assert int(ids[-1]) == present - 1
        lengths = event_lengths(ids, present)
        assert int(lengths.min()) >= 1
        assert int(lengths.sum()) == frames


@property_test
@given(st.integers(0, 30).flatmap(scores), st.integers(1, 12))
def test_segment_equals_plain_loops(similarity: list[float], events: int) -> None:
    assert segment(torch.tensor(similarity), events).tolist() == naive.segment(similarity, events)


def test_event_lengths_counts_absent_events_as_zero() -> None:
    assert event_lengths(torch.tensor([0, 2, 2, 2]), 4).tolist() == [1, 0, 3, 0]
