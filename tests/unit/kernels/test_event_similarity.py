"""`event_similarity` against its float32 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.event_similarity import event_similarity, reference

from tests.support.kernels.common import DTYPES, few_examples


def check(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, similarity = event_similarity(features)
    expected_mean, expected_similarity = reference(features)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(similarity, expected_similarity, rtol=1e-5, atol=2e-6)
    return mean, similarity


@pytest.mark.parametrize("width", [1, 60, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_widths(dtype: torch.dtype, width: int, device: torch.device) -> None:
    check((torch.randn(7, 63, width) + 0.5).to(device, dtype))


@few_examples
@given(frames=st.integers(0, 9), tokens=st.integers(1, 70))
def test_any_size(frames: int, tokens: int, device: torch.device) -> None:
    _, similarity = check(torch.randn(frames, tokens, 16).to(device))
    assert similarity.shape == (max(frames - 1, 0),)


def test_a_grid_of_27_by_27(device: torch.device) -> None:
    check(torch.randn(3, 27 * 27, 33).to(device))


def test_frames_of_a_strided_buffer(device: torch.device) -> None:
    check(torch.randn(4, 30, 2, 60).to(device)[:, 1:, 1])


def test_zero_and_equal_and_opposite_frames(device: torch.device) -> None:
    ones = torch.ones(5, 60)
    _, similarity = check(torch.stack([ones, ones * 3, -ones, ones * 0, ones]).to(device))
    torch.testing.assert_close(similarity.cpu(), torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_large_half_precision_values_do_not_overflow(device: torch.device) -> None:
    mean, similarity = check(torch.full((2, 64, 60), 60000.0, dtype=torch.float16, device=device))
    assert mean.isfinite().all()
    assert similarity[0].item() == pytest.approx(1.0)


def test_refusals(device: torch.device) -> None:
    with pytest.raises(ValueError, match="its frames are empty"):
        event_similarity(torch.zeros(2, 0, 4, device=device))
    with pytest.raises(TypeError, match="features is int64"):
        event_similarity(torch.zeros(2, 3, 4, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="last axis of features must be contiguous"):
        event_similarity(torch.zeros(2, 4, 3, device=device).transpose(1, 2))
