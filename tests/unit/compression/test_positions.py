"""Rotary positions of pooled tokens: time, and the centre of each token's window."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.pooling import pooled_grid
from metok_vllm.compression.positions import pooled_positions

SIDES = st.integers(1, 12)
STRIDES = st.lists(st.integers(1, 14), min_size=3, max_size=3).map(sorted)


def laid_out(tiers: list[int], height: int, width: int, strides: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """Frame and tier of each token."""
    tokens = [int(np.prod(pooled_grid(height, width, strides[tier]))) for tier in tiers]
    frames = [frame for frame, count in enumerate(tokens) for _ in range(count)]
    return frames, [tiers[frame] for frame in frames]


def test_by_hand() -> None:
    """A 3 x 5 grid: stride 2 has windows of 2 and 1, stride 4 of 3 rows and of 4 and 1 columns."""
    frames, tiers = laid_out([1, 2], 3, 5, (1, 2, 4))
    found = pooled_positions(
        torch.tensor(frames), torch.tensor(tiers), torch.tensor([0, 7]), height=3, width=5, strides=(1, 2, 4)
    )
    assert found.tolist() == [
        [0, 0, 0, 0, 0, 0, 7, 7],
        [0, 0, 0, 2, 2, 2, 1, 1],
        [0, 2, 4, 0, 2, 4, 1, 4],
    ]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), SIDES, SIDES, STRIDES)
def test_each_token_stands_in_the_middle_of_its_window(
    tiers: list[int], height: int, width: int, strides: list[int]
) -> None:
    chosen = (strides[0], strides[1], strides[2])
    frames, tier = laid_out(tiers, height, width, chosen)
    times = torch.arange(len(tiers)) * 3
    found = pooled_positions(torch.tensor(frames), torch.tensor(tier), times, height, width, chosen)
    expected = []
    for frame, of_frame in enumerate(tiers):
        stride = chosen[of_frame]
        for top in range(0, height, stride):
            for left in range(0, width, stride):
                rows = np.arange(top, min(top + stride, height))
                columns = np.arange(left, min(left + stride, width))
                expected.append((3 * frame, int(np.floor(rows.mean())), int(np.floor(columns.mean()))))
    assert found.T.tolist() == [list(one) for one in expected]
    assert found.dtype == torch.int64


@given(SIDES, SIDES, st.integers(1, 5))
def test_with_stride_one_the_grid_is_the_towers(height: int, width: int, frames: int) -> None:
    frame, tier = laid_out([0] * frames, height, width, (1, 2, 4))
    times = torch.arange(frames)
    found = pooled_positions(torch.tensor(frame), torch.tensor(tier), times, height, width, (1, 2, 4))
    assert np.array_equal(found.numpy(), np.indices((frames, height, width)).reshape(3, -1))
