from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.events import segment
from metok_vllm.compression.pooling import (
    FRAMES_PER_BLOCK,
    PoolMode,
    PoolStyle,
    Separators,
    pool_frames,
    pool_video,
    pooled_grid,
    tokens_per_frame,
)
from metok_vllm.compression.tiers import TierQuota, assign, quota, video_tokens
from tests.support.compression.generators import event_ids, property_test

STRIDES = (2, 4, 8)


def naive_bilinear(frame: torch.Tensor, stride: int) -> torch.Tensor:
    """[H, W, D] to [h, w, D]: centres of output cells, clamped to the grid, four neighbours each."""
    height, width, _ = frame.shape
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)

    def taps(cell: int, cells: int, size: int) -> list[tuple[int, float]]:
        at = max((cell + 0.5) * size / cells - 0.5, 0.0)
        low = min(int(at), size - 1)
        return [(low, 1 - (at - low)), (min(low + 1, size - 1), at - low)]

    out = torch.zeros(rows, columns, frame.shape[2])
    for i in range(rows):
        for j in range(columns):
            for y, wy in taps(i, rows, height):
                for x, wx in taps(j, columns, width):
                    out[i, j] += wy * wx * frame[y, x]
    return out


def naive_average(frame: torch.Tensor, stride: int) -> torch.Tensor:
    """[H, W, D] to [h, w, D]: the mean of the tokens that each window has."""
    height, width, _ = frame.shape
    rows = [frame[i : i + stride] for i in range(0, height, stride)]
    return torch.stack(
        [torch.stack([row[:, j : j + stride].mean((0, 1)) for j in range(0, width, stride)]) for row in rows]
    )


def naive_pool(frame: torch.Tensor, stride: int, mode: PoolMode) -> torch.Tensor:
    pooled = naive_bilinear(frame, stride) if mode == "bilinear" else naive_average(frame, stride)
    return pooled.flatten(0, 1)


@pytest.mark.parametrize("mode", ["bilinear", "average"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (9, 5), (3, 12), (1, 1), (27, 27)])
def test_pool_frames_equals_plain_loops(height: int, width: int, stride: int, mode: PoolMode) -> None:
    features = torch.randn(2, height, width, 3, generator=torch.Generator().manual_seed(stride))
    expected = torch.stack([naive_pool(frame, stride, mode) for frame in features])
    rows, columns = pooled_grid(height, width, stride)
    assert expected.shape == (2, rows * columns, 3)
    torch.testing.assert_close(pool_frames(features, stride, mode), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_half_precision_is_rounded_once(mode: PoolMode, dtype: torch.dtype) -> None:
    features = torch.randn(2, 9, 9, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = pool_frames(features.float(), 4, mode).to(dtype)
    torch.testing.assert_close(pool_frames(features, 4, mode), expected)


def test_stride_one_keeps_every_token() -> None:
    features = torch.randn(2, 5, 5, 4)
    assert torch.equal(pool_frames(features, 1, "bilinear"), features.flatten(1, 2))


def test_tokens_per_frame_of_the_models_grids() -> None:
    assert tokens_per_frame(27, 27, STRIDES, PoolStyle("bilinear")) == (196, 49, 16)  # LLaVA-OneVision
    assert tokens_per_frame(24, 24, STRIDES, PoolStyle("average", "none")) == (144, 36, 9)  # LongVA
    assert tokens_per_frame(27, 27, STRIDES, PoolStyle("bilinear", "row")) == (14 * 15, 7 * 8, 4 * 5)  # LLaVA-Video
    assert tokens_per_frame(3, 3, STRIDES, PoolStyle("average", "none")) == (4, 1, 1)


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pooled_grid(4, 4, 0)
    with pytest.raises(ValueError, match="unknown pooling mode 'max'"):
        pool_frames(torch.zeros(1, 4, 4, 1), 2, "max")  # type: ignore[arg-type]


def naive_video(
    features: torch.Tensor, tiers: list[int], style: PoolStyle, separator: torch.Tensor, ids: list[int]
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Frame by frame in time order, a separator where the event ends, or each row."""
    tokens, events, frames = [], [], []
    for i, frame in enumerate(features):
        pooled = naive_pool(frame, STRIDES[tiers[i]], style.mode)
        if style.separators == "row":
            rows, _ = pooled_grid(*frame.shape[:2], STRIDES[tiers[i]])
            pooled = torch.cat([torch.cat([row, separator[None]]) for row in pooled.chunk(rows)])
        if style.separators == "event" and (i + 1 == len(ids) or ids[i + 1] != ids[i]):
            pooled = torch.cat([pooled, separator[None]])
        tokens.append(pooled)
        events += [ids[i]] * len(pooled)
        frames += [i] * len(pooled)
    return torch.cat(tokens), events, frames


@property_test
@given(
    event_ids(max_frames=14),
    st.randoms(use_true_random=False),
    st.sampled_from(["bilinear", "average"]),
    st.sampled_from(["event", "row", "none"]),
    st.sampled_from([(5, 5), (8, 8), (3, 6), (1, 1)]),
)
def test_pool_video_equals_plain_loops(
    ids: list[int], rng: random.Random, mode: PoolMode, separators: Separators, grid: tuple[int, int]
) -> None:
    tiers = [rng.randint(0, 2) for _ in ids]
    q = TierQuota(ids[-1] + 1, *(tiers.count(tier) for tier in range(3)))
    features = torch.randn(len(ids), *grid, 2, generator=torch.Generator().manual_seed(rng.randint(0, 99)))
    separator, style = torch.tensor([7.0, -7.0]), PoolStyle(mode, separators)
    given = None if separators == "none" else separator
    result = pool_video(features, torch.tensor(tiers), STRIDES, q, style, given, torch.tensor(ids))
    tokens, events, frames = naive_video(features, tiers, style, separator, ids)
    assert len(tokens) == video_tokens(q, tokens_per_frame(*grid, STRIDES, style), separators == "event")
    torch.testing.assert_close(result.tokens, tokens, rtol=1e-5, atol=1e-5)
    assert result.token_event.tolist() == events
    assert result.token_frame.tolist() == frames


def test_rows_are_exact_for_every_length() -> None:
    """From frames to tokens for every T: each row is written, and carries its own frame's number."""
    separator = torch.tensor([-1.0])
    for frames in range(1, 1025):
        events = 1 + frames % 9
        q = quota(frames, events, 3, 6)
        ids = segment(torch.sin(torch.arange(frames - 1) * 1.7), events)
        tiers = assign(ids, torch.cos(torch.arange(frames) * 2.3), torch.arange(q.events) < 3, 6, q)
        features = torch.arange(frames, dtype=torch.float32)[:, None, None, None].expand(frames, 3, 3, 1)
        result = pool_video(features, tiers, STRIDES, q, PoolStyle("bilinear"), separator, ids)
        total = video_tokens(q, tokens_per_frame(3, 3, STRIDES, PoolStyle("bilinear")), separators=True)
        assert result.tokens.shape == (total, 1)
        values = result.tokens.flatten()
        is_separator = values == -1
        assert int(is_separator.sum()) == q.events
        assert bool(((values == result.token_frame) | is_separator).all())
        assert bool((result.token_frame.diff() >= 0).all())
        assert torch.equal(result.token_event, ids[result.token_frame])
    assert frames > 10 * FRAMES_PER_BLOCK  # more than one block was pooled


def test_separators_follow_their_event() -> None:
    ids = torch.tensor([0, 0, 1])
    q = TierQuota(events=2, tier0=1, tier1=0, tier2=2)
    features = torch.tensor([10.0, 20.0, 30.0], dtype=torch.bfloat16)[:, None, None, None].expand(3, 4, 4, 1)
    separator = torch.tensor([-1.0])
    result = pool_video(features, torch.tensor([2, 0, 2]), STRIDES, q, PoolStyle("average"), separator, ids)
    assert result.tokens.dtype == torch.bfloat16
    assert result.tokens.flatten().tolist() == [10, 20, 20, 20, 20, -1, 30, -1]
    assert result.token_event.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert result.token_frame.tolist() == [0, 1, 1, 1, 1, 1, 2, 2]


def test_pool_video_refuses_a_quota_for_another_video() -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit a quota of 4 frames"):
        pool_video(
            torch.zeros(3, 2, 2, 1), ids, STRIDES, TierQuota(1, 4, 0, 0), PoolStyle("bilinear", "none"), None, ids
        )


@pytest.mark.parametrize(("separators", "given"), [("event", False), ("row", False), ("none", True)])
def test_a_separator_is_there_where_the_style_has_one(separators: Separators, given: bool) -> None:
    ids, separator = torch.zeros(3, dtype=torch.int64), torch.zeros(1) if given else None
    with pytest.raises(ValueError, match=f"the style's separators are '{separators}'"):
        pool_video(
            torch.zeros(3, 2, 2, 1),
            ids,
            STRIDES,
            TierQuota(1, 3, 0, 0),
            PoolStyle("average", separators),
            separator,
            ids,
        )
