"""The generator: seeds, determinism, the scene graph's promises, and pixels that show what the graph says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from training.draw import RGB, background, draw_video, item_mask
from training.seeds import SPLITS, seed_of, split_of
from training.world import MAX_FRAMES, MIN_FRAMES, SIZE, make_video, place_of

SEEDS = range(60)


def test_splits_share_no_seed() -> None:
    for (_, a), (_, b) in itertools.combinations(SPLITS.items(), 2):
        assert a.stop <= b.start or b.stop <= a.start
    for name, seeds in SPLITS.items():
        assert split_of(seed_of(name, 0)) == name == split_of(seeds[-1])
    with pytest.raises(IndexError):
        seed_of("test", -1)
    with pytest.raises(IndexError):
        seed_of("demo", len(SPLITS["demo"]))
    with pytest.raises(ValueError, match="no split"):
        split_of(-5)


def test_a_seed_is_a_video() -> None:
    for seed in (0, 7, seed_of("test", 3)):
        assert make_video(seed) == make_video(seed)
        assert np.array_equal(draw_video(make_video(seed)), draw_video(make_video(seed)))
    assert make_video(1) != make_video(2)


@pytest.mark.parametrize("frames", [(4, 10), (MIN_FRAMES, MAX_FRAMES)])
def test_graph_keeps_its_promises(frames: tuple[int, int]) -> None:
    moving = changing = repeated = 0
    for seed in SEEDS:
        v = make_video(seed, frames)
        assert frames[0] <= v.frames <= frames[1]
        ends = [s.end for s in v.scenes]
        assert [s.start for s in v.scenes] == [0, *ends[:-1]]
        assert ends[-1] == v.frames
        assert len({s.kind for s in v.scenes}) == len(v.scenes)
        for item in v.items:
            scene = v.scenes[item.scene]
            assert scene.start <= item.start < item.end <= scene.end
        for kind in ("digit", "word"):
            found = [(i.scene, i.name) for i in v.items if i.kind == kind]
            assert len({s for s, _ in found}) == len({n for _, n in found}) == len(found)
        names = [i.name for i in v.shapes() if i.name != v.counted]
        assert len(set(names)) == len(names)
        counted = [i.colour for i in v.shapes(v.counted)]
        assert len(set(counted)) == len(counted)
        moving += sum(i.xy2 is not None for i in v.items)
        changing += sum(i.colour2 is not None for i in v.items)
        repeated += len(counted) > 1
    assert moving > 2
    assert changing > 2
    assert repeated > 2


def test_nothing_overlaps_and_everything_is_drawn() -> None:
    pairs = 0
    for seed in SEEDS:
        v = make_video(seed)
        pixels = draw_video(v)
        for t in range(v.frames):
            masks = [item_mask(i, t) for i in v.visible(t)]
            pairs += len(masks) > 1
            for a, b in itertools.combinations(masks, 2):
                assert not (a & b).any()
        for item in v.shapes():
            for t in (item.start, item.end - 1):
                inside = pixels[t][item_mask(item, t)]
                assert (inside == RGB[item.colour_at(t) or ""]).all(axis=1).mean() > 0.9
    assert pairs > 20


def test_items_are_gone_outside_their_frames() -> None:
    v = next(v for v in map(make_video, SEEDS) if v.scenes[0].end - v.items[0].end > 2)
    empty = [t for t in range(v.scenes[0].end) if not v.visible(t)]
    assert empty
    assert (draw_video(v)[empty] == background(v.scenes[0])).all()


def test_directions_and_places() -> None:
    assert place_of((1, 1)) == "top left"
    assert place_of((SIZE - 1, SIZE - 1)) == "bottom right"
    seen = set()
    for seed in range(300):
        for i in make_video(seed).items:
            if i.xy2 is not None:
                (x, y), (x2, y2) = i.centre(i.start), i.centre(i.end - 1)
                expected = {"left": x2 < x - 8, "right": x2 > x + 8, "up": y2 < y - 8, "down": y2 > y + 8}
                assert [d for d, holds in expected.items() if holds] == [i.direction]
                seen.add(i.direction)
    assert seen == {"left", "right", "up", "down"}
