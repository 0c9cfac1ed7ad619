"""`smooth_by_frame` equals its reference, and the rule in `compression/`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.smooth_by_frame import reference, smooth_by_frame
from metok_kernels.smooth_by_frame.launch import BLOCK, prepare

from metok_vllm.compression import scoring
from metok_vllm.compression.ratios import to_micro
from tests.support.kernels.common import few_examples


def check(scores: torch.Tensor, lengths: list[int], weight: float, device: torch.device) -> torch.Tensor:
    """The kernel's scores, equal to the reference's and to the rule's."""
    frame = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)).to(device)
    arguments = scores.to(device), frame, len(lengths)
    actual = smooth_by_frame(*arguments, weight)
    torch.testing.assert_close(actual, reference(*arguments, weight), rtol=1e-5, atol=1e-7, equal_nan=True)
    by_rule = scoring.smooth_by_frame(*arguments, to_micro(weight))
    torch.testing.assert_close(actual, by_rule, rtol=1e-5, atol=1e-7, equal_nan=True)
    return actual


@few_examples
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    weight=st.sampled_from([0.0, 0.000001, 0.3, 0.5, 1.0]),
    offset=st.integers(0, 5),
)
def test_any_frames(lengths: list[int], weight: float, offset: int, device: torch.device) -> None:
    """Frames of any length, some without a token left; scores that begin anywhere in their storage."""
    generator = torch.Generator().manual_seed(sum(lengths) + offset)
    check(torch.rand(sum(lengths) + offset, generator=generator)[offset:], lengths, weight, device)


def test_by_hand(device: torch.device) -> None:
    scores = torch.tensor([1.0, 3.0, 5.0, 0.0, 8.0])
    assert check(scores, [2, 0, 1, 2], 0.5, device).tolist() == [1.5, 2.5, 5.0, 2.0, 6.0]
    assert check(scores, [2, 0, 1, 2], 1.0, device).tolist() == [2.0, 2.0, 5.0, 4.0, 4.0]
    assert torch.equal(check(scores, [2, 0, 1, 2], 0.0, device).cpu(), scores), "weight 0 changes no bit"


def test_a_frame_longer_than_a_block(device: torch.device) -> None:
    scores = torch.rand(3 * BLOCK + 25, generator=torch.Generator().manual_seed(1))
    check(scores, [7, 2 * BLOCK + 1, BLOCK, 17], 0.7, device)


def test_no_number_stays_within_its_frame(device: torch.device) -> None:
    scores = torch.tensor([1.0, float("nan"), 2.0, 4.0])
    smooth = check(scores, [2, 2], 0.5, device)
    assert smooth.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("frames", [0, 3])
def test_nothing_alive(frames: int, device: torch.device) -> None:
    nothing = torch.empty(0, device=device)
    assert smooth_by_frame(nothing, nothing.long(), frames, 0.5).shape == (0,)


def test_same_bits_every_time(device: torch.device) -> None:
    scores = torch.rand(500, generator=torch.Generator().manual_seed(2))
    first = check(scores, [100, 250, 150], 0.3, device)
    assert all(torch.equal(first, check(scores, [100, 250, 150], 0.3, device)) for _ in range(3))


def test_refusals(device: torch.device) -> None:
    scores, frame = torch.zeros(4, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="scores is float16, expected float32"):
        smooth_by_frame(scores.half(), frame, 1, 0.5)
    with pytest.raises(TypeError, match="frame is float32, expected int32, int64"):
        smooth_by_frame(scores, scores, 1, 0.5)
    with pytest.raises(ValueError, match=r"frame has shape \[3\], expected \[4\]"):
        smooth_by_frame(scores, frame[:3], 1, 0.5)
    with pytest.raises(ValueError, match=r"the weight must be from 0 to 1, not 1\.5"):
        smooth_by_frame(scores, frame, 1, 1.5)
    with pytest.raises(ValueError, match="starts must have an entry more"):
        prepare(scores, frame[:0], 0.5)
