"""Sampling and planning, without any video."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.video import Qwen2VLVideoBackend, Qwen3VLVideoBackend
from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

from metok_vllm.media.sampling import (
    JUMP_GAP,
    QWEN3_RATE,
    QWEN_FRAMES,
    PacketTable,
    decode_runs,
    qwen3_indices,
    qwen_indices,
    sample_indices,
)

WISHES = st.one_of(st.just(-1), st.integers(1, 600))
RATES = st.one_of(st.just(-1.0), st.floats(0.01, 60))


@st.composite
def tables(draw: st.DrawFn) -> PacketTable:
    """Tables of up to 80 packets in any order of display, keys and hidden packets anywhere."""
    count = draw(st.integers(1, 80))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    if draw(st.booleans()):  # packets a few places out of order, as codecs have them
        order = np.array([number + draw(st.floats(-3, 3)) for number in range(count)])
    else:
        order = np.array(draw(st.permutations(range(count))), dtype=float)
    pts = np.argsort(np.argsort(order, kind="stable"), kind="stable") * 7 - 20
    shown = np.array(draw(flags))
    shown[draw(st.integers(0, count - 1))] = True
    return PacketTable(pts, np.array(draw(flags)), shown, timed=draw(st.booleans()))


@given(st.integers(1, 5000), WISHES, RATES)
def test_sampled_indices_rise_and_are_as_many_as_asked(total: int, frames: int, fps: float) -> None:
    indices = sample_indices(total, total / 25, frames, fps)
    assert indices[0] == 0
    assert all(a < b for a, b in pairwise(indices))
    assert indices[-1] < total
    limits = [total, frames if frames > 0 else total, int(total / 25 * fps) if fps > 0 else total]
    assert len(indices) == max(1, min(limits))


@given(st.integers(1, 20_000), st.floats(0.5, 120), WISHES, RATES)
def test_qwens_sampling_takes_an_even_number(total: int, rate: float, frames: int, fps: float) -> None:
    indices = qwen_indices(total, rate, frames, fps)
    assert indices[0] == 0
    assert all(a < b for a, b in pairwise(indices))
    assert indices[-1] < total
    assert len(indices) % 2 == 0 or total == 1
    if fps > 0:
        assert len(indices) <= QWEN_FRAMES[1]
        assert len(indices) >= min(QWEN_FRAMES[0], total // 2 * 2)
    elif frames > 0:
        assert abs(len(indices) - frames) <= 1 or len(indices) in (1, 2, total // 2 * 2)


@given(st.integers(2, 20_000), st.floats(0.5, 120), st.floats(0.01, 60))
def test_qwens_sampling_is_vllms(total: int, rate: float, fps: float) -> None:
    """But for rounding: vLLM adds up a step in float32, and may find one index more, the last one twice."""
    source, target = VideoSourceMetadata(total, rate, total / rate), VideoTargetMetadata(-1, fps, -1)
    theirs = Qwen2VLVideoBackend.compute_frames_index_to_sample(source, target)
    ours = qwen_indices(total, rate, -1, fps)
    assert 0 <= len(theirs) - len(ours) <= 1
    assert all(abs(a - b) <= 1 for a, b in zip(ours, theirs, strict=False))


@given(st.integers(1, 20_000), st.floats(0.5, 120), st.floats(0.01, 60))
def test_qwen3s_sampling_is_vllms(total: int, rate: float, fps: float) -> None:
    source, target = VideoSourceMetadata(total, rate, total / rate), VideoTargetMetadata(-1, fps, -1)
    assert qwen3_indices(total, rate, -1, fps) == Qwen3VLVideoBackend.compute_frames_index_to_sample(source, target)


@given(st.integers(1, 5000), WISHES)
def test_qwen3s_sampling_takes_a_number_of_frames_where_no_rate_is_stated(total: int, frames: int) -> None:
    indices = qwen3_indices(total, 25, frames, -1)
    assert len(indices) == (total if frames == -1 else min(frames, total))
    assert (indices[0], indices[-1]) == (0, total - 1 if len(indices) > 1 else 0)
    assert all(a < b for a, b in pairwise(indices))


def test_a_video_of_unknown_rate_is_labelled_as_vllm_does() -> None:
    assert Qwen3VLVideoBackend._prepare_source(VideoSourceMetadata(9, 0, 0)).original_fps == QWEN3_RATE


@given(st.data(), tables())
def test_runs_are_apart_in_order_and_reach_every_frame_from_a_key(data: st.DataObject, table: PacketTable) -> None:
    indices = sorted(data.draw(st.sets(st.integers(0, table.total - 1), min_size=1)))
    runs = decode_runs(table, indices)
    assert sorted(slot for run in runs for slot in run.wanted.values()) == list(range(len(indices)))
    assert all(a.end + JUMP_GAP < b.start for a, b in pairwise(runs))
    if not table.timed:
        assert [run.wanted for run in runs] == [{index: slot for slot, index in enumerate(indices)}]
        return
    shown = sorted((int(pts), number) for number, pts in enumerate(table.pts) if table.shown[number])
    for run in runs:
        assert run.start == 0 or table.key[run.start]
        for pts, slot in run.wanted.items():
            assert pts == shown[indices[slot]][0]
            assert run.start <= shown[indices[slot]][1] <= run.end
            before = slice(run.start, shown[indices[slot]][1] + 1)
            assert run.start == 0 or (table.key[before] & (table.pts[before] <= pts)).any()
    (walk,) = decode_runs(table, indices, jump=False)
    assert walk.start == 0
    assert sum(run.cost for run in runs) <= walk.cost


def test_sparse_frames_of_a_long_video_cost_little() -> None:
    count = 90_000
    key = np.arange(count) % 250 == 0
    table = PacketTable(np.arange(count), key, np.ones(count, dtype=bool), timed=True)
    runs = decode_runs(table, sample_indices(count, 3600.0, 16, -1))
    assert len(runs) == 16
    assert sum(run.cost for run in runs) < 16 * 250


def test_planning_is_quick_where_every_key_is_shown_after_its_followers() -> None:
    count = 200_000
    every = np.ones(count, dtype=bool)
    table = PacketTable(np.arange(count)[::-1].copy(), every, every, timed=True)
    runs = decode_runs(table, list(range(0, count, 200)))
    assert sum(len(run.wanted) for run in runs) == 1000
