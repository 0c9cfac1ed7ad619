"""Sampling and planning, without any video."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.media.plan import JUMP_GAP, PacketTable, plan_runs, sample_indices


@st.composite
def tables(draw: st.DrawFn) -> PacketTable:
    """Tables of up to 80 packets in any order of display, keys and hidden packets anywhere."""
    count = draw(st.integers(1, 80)) flags = st.lists(st.booleans(), min_size=count, max_size=count) near =
    draw(st.booleans())  # as real codecs reorder: by a few packets only order = [n + draw(st.integers(-3,
    3)) * 1.01 for n in range(count)] if near else draw(st.permutations(range(count))) pts =
    np.argsort(np.argsort(order)) * 7 - 20 shown = np.array(draw(flags)) shown[draw(st.integers(0, count -
    1))] = True return PacketTable(pts, np.array(draw(flags)), shown, timed=draw(st.booleans()))


@given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(1, 600)), st.one_of(st.just(-1), st.floats(0.01, 60)))
def test_sampled_indices_rise_within_the_video_and_are_as_many_as_asked(total: int, frames: int, fps: float) -> None:
    indices = sample_indices(total, total / 25, frames, fps)
    assert indices[0] == 0
    assert all(a < b for a, b in zip(indices, indices[1:], strict=False))
    assert indices[-1] < total
    wished = min(total, frames if frames > 0 else total, int(total / 25 * fps) if fps > 0 else total)
    assert len(indices) == max(1, wished)


@given(st.data(), tables())
def test_runs_are_disjoint_in_order_and_reach_every_wanted_frame_from_a_key(data: st.DataObject, table: PacketTable) -> None:
    wish = data.draw(st.sets(st.integers(0, table.total - 1), min_size=1))
    indices = sorted(wish)
    runs = plan_runs(table, indices)
    assert sorted(slot for run in runs for slot in run.wanted.values()) == list(range(len(indices)))
    assert all(a.end + JUMP_GAP < b.start for a, b in zip(runs, runs[1:], strict=False))
    if not table.timed:
        assert len(runs) == 1
        assert runs[0].wanted == {index: slot for slot, index in enumerate(indices)}
        return
    shown = sorted((int(pts), number) for number, pts in enumerate(table.pts) if table.shown[number])
    for run in runs:
        assert run.start == 0 or table.key[run.start]
        for pts, slot in run.wanted.items():
            assert pts == shown[indices[slot]][0]
            packet = shown[indices[slot]][1]
            assert run.start <= packet <= run.end
            # Nothing between the run's start and the frame is skipped that a nearer key would have saved twice over.
            assert run.start == 0 or table.pts[run.start] <= pts
    (walk,) = plan_runs(table, indices, jump=False)
    assert walk.start == 0
    assert sum(run.cost for run in runs) <= walk.cost


def test_sparse_frames_of_a_long_video_cost_little() -> None:
    count = 90_000
    key = np.arange(count) % 250 == 0
    table = PacketTable(np.arange(count), key, np.ones(count, dtype=bool), timed=True)
    runs = plan_runs(table, sample_indices(count, 3600.0, 16, -1))
    assert len(runs) == 16
    assert sum(run.cost for run in runs) < 16 * 250


def test_planning_is_quick_where_every_key_is_shown_after_its_followers() -> None:
    count = 200_000
    pts = np.arange(count)[::-1].copy()
    table = PacketTable(pts, np.ones(count, dtype=bool), np.ones(count, dtype=bool), timed=True)
    runs = plan_runs(table, list(range(0, count, 200)))
    assert sum(len(run.wanted) for run in runs) == 1000
