"""`event_similarity` against its float32 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.event_similarity import event_similarity, reference

from tests.support.kernels.common import DTYPES, cumulative, few_examples


def check(features: torch.Tensor, cu_frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, similarity = event_similarity(features, cu_frames)
    expected_mean, expected_similarity = reference(features, cu_frames)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(similarity, expected_similarity, rtol=1e-5, atol=2e-6)
    return mean, similarity


@pytest.mark.parametrize("width", [1, 60, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_widths(dtype: torch.dtype, width: int, device: torch.device) -> None:
    features = (torch.randn(7, 63, width) + 0.5).to(device, dtype)
    check(features, cumulative((3, 1, 3), device))


@few_examples
@given(videos=st.lists(st.integers(0, 5), min_size=1, max_size=4), tokens=st.integers(1, 70))
def test_any_videos(videos: list[int], tokens: int, device: torch.device) -> None:
    features = torch.randn(sum(videos), tokens, 16).to(device)
    _, similarity = check(features, cumulative(videos, device))
    ends = {sum(videos[: index + 1]) - 1 for index in range(len(videos)) if videos[index]}
    assert {index for index, value in enumerate(similarity.tolist()) if value == float("inf")} == ends


def test_a_grid_of_27_by_27(device: torch.device) -> None:
    check(torch.randn(3, 27 * 27, 33).to(device), cumulative((3,), device))


def test_a_video_is_the_same_alone_and_packed(device: torch.device) -> None:
    features = torch.randn(6, 40, 60).to(device)
    packed_mean, packed = event_similarity(features, cumulative((2, 4), device))
    mean, alone = event_similarity(features[2:], cumulative((4,), device))
    assert torch.equal(packed[2:], alone)
    assert torch.equal(packed_mean[2:], mean)


def test_frames_of_a_strided_buffer(device: torch.device) -> None:
    features = torch.randn(4, 30, 2, 60).to(device)[:, 1:, 1]
    check(features, cumulative((4,), device))


def test_zero_and_equal_and_opposite_frames(device: torch.device) -> None:
    ones = torch.ones(5, 60)
    features = torch.stack([ones, ones * 3, -ones, ones * 0, ones]).to(device)
    _, similarity = check(features, cumulative((5,), device))
    torch.testing.assert_close(similarity[:4].cpu(), torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_large_half_precision_values_do_not_overflow(device: torch.device) -> None:
    features = torch.full((2, 64, 60), 60000.0, dtype=torch.float16, device=device)
    mean, similarity = check(features, cumulative((2,), device))
    assert mean.isfinite().all()
    assert similarity[0].item() == pytest.approx(1.0)


def test_many_videos_of_one_frame(device: torch.device) -> None:
    """More videos than one block of cumulative lengths holds."""
    _, similarity = check(torch.randn(135, 1, 4).to(device), cumulative([1] * 130 + [5], device))
    assert int((similarity == float("inf")).sum()) == 131


def test_refusals(device: torch.device) -> None:
    cu = cumulative((2,), device)
    with pytest.raises(ValueError, match="its frames are empty"):
        event_similarity(torch.zeros(2, 0, 4, device=device), cu)
    with pytest.raises(TypeError, match="cu_frames is float32"):
        event_similarity(torch.zeros(2, 3, 4, device=device), cu.float())
    with pytest.raises(ValueError, match="last axis of features must be contiguous"):
        event_similarity(torch.zeros(2, 4, 3, device=device).transpose(1, 2), cu)
