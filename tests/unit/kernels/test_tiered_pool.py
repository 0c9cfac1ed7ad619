"""`tiered_pool` equals torch.nn.functional pooling of each frame, packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.tiered_pool import Mode, pooled_grid, reference, tiered_pool

from tests.support.kernels.common import DTYPES, assert_rounded, few_examples, ints


def build(
    grid: tuple[int, int],
    width: int,
    strides: list[int],
    mode: Mode,
    device: torch.device,
    separators: int = 2,
    row_gap: bool = False,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Frames in order with a separator before the first and then wherever there are some left; and one behind
    each row, if there is a gap for it.
    """
    frames = torch.randn(len(strides), *grid, width, generator=torch.Generator().manual_seed(width))
    offsets, rows, row = [], [], 0
    for stride in strides:
        if len(rows) < separators:
            rows.append(row)
            row += 1
        offsets.append(row)
        height, columns = pooled_grid(*grid, stride)
        if row_gap:
            rows += range(row + columns, row + height * (columns + 1), columns + 1)
        row += height * (columns + row_gap)
    options: dict[str, Any] = {"mode": mode, "total": row, "min_stride": min(strides), "row_gap": row_gap}
    if rows:
        options["separator"] = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(device)
        options["separator_offset"] = ints(*rows, device=device)
    return (frames.to(device), ints(*strides, device=device), ints(*offsets, device=device)), options


def check(arguments: tuple[torch.Tensor, ...], options: dict[str, Any]) -> torch.Tensor:
    actual, expected = tiered_pool(*arguments, **options), reference(*arguments, **options)
    assert actual.isfinite().all()  # every row was written
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    else:
        assert_rounded(actual, expected)
    return actual


@pytest.mark.parametrize("mode", ["average", "bilinear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_of_27_by_27(dtype: torch.dtype, mode: Mode, device: torch.device) -> None:
    arguments, options = build((27, 27), 60, [2, 4, 8], mode, device)
    options["separator"] = options["separator"].to(dtype)
    check((arguments[0].to(dtype), *arguments[1:]), options)


@few_examples
@given(
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    strides=st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=3),
    mode=st.sampled_from(["average", "bilinear"]),
    separators=st.integers(0, 3),
    row_gap=st.booleans(),
)
def test_any_grid(
    grid: tuple[int, int], strides: list[int], mode: Mode, separators: int, row_gap: bool, device: torch.device
) -> None:
    check(*build(grid, 20, strides, mode, device, separators, row_gap))


def test_width_of_several_blocks(device: torch.device) -> None:
    check(*build((5, 7), 300, [2, 4], "average", device))


def test_many_separators_of_several_videos(device: torch.device) -> None:
    """More separators than one program writes."""
    check(*build((2, 2), 16, [2] * 40, "bilinear", device, separators=35))


def test_plain_stride_two_is_torch(device: torch.device) -> None:
    """Against torch itself, not our reference: the stock models' pooling of a 24 x 24 grid."""
    frames = torch.randn(1, 24, 24, 16).to(device)
    stride, offset = ints(2, device=device), ints(0, device=device)
    grid = frames.permute(0, 3, 1, 2)
    average = tiered_pool(frames, stride, offset, mode="average", total=144, min_stride=2)
    torch.testing.assert_close(average.T.reshape(1, 16, 12, 12), F.avg_pool2d(grid, 2), rtol=1e-5, atol=1e-5)
    bilinear = tiered_pool(frames, stride, offset, mode="bilinear", total=144, min_stride=2)
    resized = F.interpolate(grid, size=(12, 12), mode="bilinear")
    torch.testing.assert_close(bilinear.T.reshape(1, 16, 12, 12), resized, rtol=1e-5, atol=1e-5)


def test_stride_one_copies(device: torch.device) -> None:
    for mode in ("average", "bilinear"):
        arguments, options = build((6, 5), 20, [1], mode, device, separators=0)
        assert torch.equal(tiered_pool(*arguments, **options), arguments[0].flatten(0, 2))


def test_token_counts() -> None:
    """The counts an engine reserves: 27 x 27 of LLaVA-OneVision, 24 x 24 of LongVA."""
    assert [pooled_grid(27, 27, s) for s in (2, 4, 8)] == [(14, 14), (7, 7), (4, 4)]
    assert [pooled_grid(24, 24, s) for s in (2, 4, 8)] == [(12, 12), (6, 6), (3, 3)]
    assert pooled_grid(3, 20, 8) == (1, 3)


def test_frames_of_a_strided_buffer(device: torch.device) -> None:
    arguments, options = build((6, 5), 20, [2, 4], "average", device)
    wide = torch.zeros(2, 8, 7, 30, device=device)
    wide[:, 1:7, 1:6, 4:24] = arguments[0]
    check((wide[:, 1:7, 1:6, 4:24], *arguments[1:]), options)


def test_rows_outside_the_output_are_dropped(device: torch.device) -> None:
    arguments, options = build((4, 4), 16, [2, 2], "average", device, separators=0)
    offset = ints(-2, 6, device=device)
    out = tiered_pool(arguments[0], arguments[1], offset, **{**options, "total": 8})
    expected = F.avg_pool2d(arguments[0].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(out[:2], expected[0, 2:])
    torch.testing.assert_close(out[6:], expected[1, :2])
    assert out[2:6].isnan().all()  # poisoned, and nobody wrote there


def test_refusals(device: torch.device) -> None:
    (frames, stride, offset), options = build((4, 4), 16, [2], "average", device)
    with pytest.raises(ValueError, match="mode is 'nearest'"):
        tiered_pool(frames, stride, offset, **{**options, "mode": "nearest"})
    with pytest.raises(ValueError, match="separator and separator_offset come together"):
        tiered_pool(frames, stride, offset, **{**options, "separator": None})
    with pytest.raises(TypeError, match="separator is float16, expected float32"):
        tiered_pool(frames, stride, offset, **{**options, "separator": options["separator"].half()})
    with pytest.raises(ValueError, match=r"stride has shape \[2\], expected \[1\]"):
        tiered_pool(frames, ints(2, 2, device=device), offset, **options)
