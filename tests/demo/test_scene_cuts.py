"""METok's events against the scene cuts that a trained shot detector
found in the same clips (`scene_cuts.json`).

A video of as many events as the detector has scenes is cut at just as many places, so one number says it all:
at how many of them the detector cuts too. No tolerance is added to the sampling itself: a cut counts as found
if it lies between the very two sampled frames that METok cuts between.

The features come from no trained tower: from the random stand-in's ("tower", what the untrained demo shows),
and from plain pixels, as mean 8 x 8 patch ("patches"). On Big Buck Bunny's clean cuts both find all, and
nothing else. The band's scenes are one dark room seen from many sides: of 18 cuts "patches" find 12 and the
random tower 8, where chance gives 2.6. So the band is a floor for METok's rule, no measure of what a trained
tower would find.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import metok_vllm.demo
from metok_vllm.compression.events import adjacent_similarity, frame_vectors, segment
from metok_vllm.media.decoder import DecodedVideo, decode_video
from metok_vllm.media.settings import VideoSettings
from tests.support.oracle import stage1
from tests.support.oracle.samples import Sample

BUNNY, BAND = "big-buck-bunny-30s.mp4", "iscc-band-60s.mp4"
CLIPS = json.loads((Path(__file__).parents[1] / "support" / "demo" / "scene_cuts.json").read_text())["clips"]
ASSETS = Path(metok_vllm.demo.__file__).parent / "assets"

Gaps = set[int]
"""Places between sampled frames: gap i lies between the frames i and i + 1."""


@cache
def sampled(clip: str, frames: int) -> DecodedVideo:
    return decode_video((ASSETS / clip).read_bytes(), VideoSettings(num_frames=frames))


def tower_vectors(tiny: Sample, video: DecodedVideo) -> Tensor:
    with torch.no_grad():
        return frame_vectors(stage1.features(tiny.model, tiny.pixels(video.frames)).flatten(1, 2))


def patch_vectors(_: Sample, video: DecodedVideo) -> Tensor:
    pixels = torch.from_numpy(video.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = torch.nn.functional.interpolate(pixels, size=(56, 56), mode="bilinear", antialias=True)
    return frame_vectors(torch.nn.functional.unfold(small, 8, stride=8).transpose(1, 2))


FEATURES = {"tower": tower_vectors, "patches": patch_vectors}


def event_gaps(vectors: Tensor, events: int) -> Gaps:
    """The gaps that METok cuts at."""
    ids = segment(adjacent_similarity(vectors), events)
    return set(ids.diff().nonzero().flatten().tolist())


def scene_gaps(clip: str, indices: list[int]) -> Gaps:
    """The gaps that hold a scene cut; a cut's frame is the first of its scene."""
    cuts = CLIPS[clip]["cut_frames"]
    return {i for i in range(len(indices) - 1) if any(indices[i] < cut <= indices[i + 1] for cut in cuts)}


def by_chance(gaps: int, scenes: int, hits: int) -> float:
    """Probability that `scenes` of `gaps` places, drawn blindly, hit at least `hits` of the `scenes` cuts."""
    ways = sum(math.comb(scenes, h) * math.comb(gaps - scenes, scenes - h) for h in range(hits, scenes + 1))
    return ways / math.comb(gaps, scenes)


@pytest.fixture(scope="module")
def stand_in(sample: Callable[..., Sample]) -> Sample:
    """The very checkpoint that the untrained demo serves."""
    return sample()


def test_the_clips_are_those_that_the_detector_saw():
    for clip, found in CLIPS.items():
        video = sampled(clip, 2)
        assert (video.total_frames, video.fps) == (found["frames"], pytest.approx(found["fps"], rel=1e-3))
        assert found["cut_seconds"] == pytest.approx([f / video.fps for f in found["cut_frames"]], abs=0.01)
    assert [len(CLIPS[clip]["cut_frames"]) for clip in (BUNNY, BAND)] == [4, 18]


@pytest.mark.parametrize(
    ("features", "frames"), [(features, frames) for features in FEATURES for frames in (32, 64, 128)]
)
def test_every_event_of_the_cartoon_is_a_scene(stand_in: Sample, features: str, frames: int):
    video = sampled(BUNNY, frames)
    scenes = scene_gaps(BUNNY, video.indices)
    assert len(scenes) == 4
    assert event_gaps(FEATURES[features](stand_in, video), 5) == scenes


@pytest.mark.parametrize(("features", "at_least"), [("tower", 7), ("patches", 11)])
def test_events_of_the_band_are_scenes_far_more_often_than_chance(stand_in: Sample, features: str, at_least: int):
    video = sampled(BAND, 128)
    scenes = scene_gaps(BAND, video.indices)
    assert len(scenes) == 18
    assert by_chance(127, 18, at_least) < 0.005
    hits = event_gaps(FEATURES[features](stand_in, video), 19) & scenes
    assert len(hits) >= at_least


@pytest.mark.parametrize("clip", [BUNNY, BAND])
def test_the_comparison_notices_wrong_events(stand_in: Sample, clip: str):
    """Cutting where frames are most alike, or one frame too early, finds next to nothing."""
    video = sampled(clip, 128)
    scenes = scene_gaps(clip, video.indices)
    vectors = patch_vectors(stand_in, video)
    ids = segment(-adjacent_similarity(vectors), len(scenes) + 1)
    alike = set(ids.diff().nonzero().flatten().tolist())
    early = {gap - 1 for gap in event_gaps(vectors, len(scenes) + 1)}
    assert len(alike & scenes) == 0
    assert len(early & scenes) <= 1


def test_chance_is_reckoned_right():
    assert by_chance(10, 3, 0) == pytest.approx(1)
    assert by_chance(10, 3, 3) == pytest.approx(1 / 120)
    assert by_chance(4, 2, 1) == pytest.approx(5 / 6)
