"""A video's plan: what the front end, the scheduler and the worker agree on."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from metok_vllm.compression.pooling import PoolStyle, tokens_per_frame
from metok_vllm.compression.selection import survivor_bounds
from metok_vllm.compression.tiers import quota, video_tokens, with_budget
from metok_vllm.contract.settings import RequestSettings
from metok_vllm.contract.video_plan import ALIGNERS, VideoGrid, VideoPlan, plan_video

GRID = (27, 27)
STYLE = PoolStyle("bilinear")
STYLES = [STYLE, PoolStyle("average", "none"), PoolStyle("bilinear", "row")]


def make(frames: int, aligner: str = "embedding", style: PoolStyle = STYLE, **settings: Any) -> VideoPlan:
    return plan_video(VideoGrid(frames, *GRID), style, 196 * frames + 1, RequestSettings(**settings), aligner)


numbers = st.integers(-(2**63), 2**63 - 1)
triples = st.tuples(numbers, numbers, numbers)
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "compressed": st.booleans(), "pruned": st.booleans(), "whole_video": st.booleans(), "report": st.booleans(),
    "aligner": st.sampled_from(ALIGNERS), "strides": triples, "frames_per_tier": triples,
}  # fmt: skip
NAMES = [field.name for field in fields(VideoPlan)]
plans = st.builds(VideoPlan, **{name: KINDS.get(name, numbers) for name in NAMES})
NUMBERS = len(NAMES) + 4  # the two triples have three numbers each


shares = st.integers(1, 10**6).map(lambda micro: micro / 10**6)
made = st.builds(
    make,
    st.integers(1, 2000),
    st.sampled_from(ALIGNERS),
    st.sampled_from(STYLES),
    events=st.integers(1, 1024),
    key_events=st.integers(0, 1024),
    key_frames=st.integers(0, 65536),
    keep_ratio=shares,
    quota=st.sampled_from(["event", "video"]),
    frame_smoothing=shares,
    decode_retention=shares,
    final_keep=shares,
    report=st.booleans(),
)
made |= st.builds(make, st.integers(1, 2000), st.sampled_from(ALIGNERS), stages=st.just(1))


@given(made)
def test_a_plan_survives_its_tensor(plan: VideoPlan) -> None:
    tensor = plan.to_tensor()
    assert tensor.dtype == torch.int64
    assert tensor.shape == (NUMBERS,)
    assert VideoPlan.from_tensor(tensor) == plan
    assert VideoPlan.from_tensor(tensor[None]) == plan, "an item of a batch may keep the batch's dimension"


@given(plans)
def test_numbers_that_contradict_one_another_are_no_plan(plan: VideoPlan) -> None:
    """Such a tensor comes from a client alone, where a server takes processed items."""
    assume(not 1 <= plan.events <= plan.frames or sum(plan.frames_per_tier) != plan.frames)
    with pytest.raises(ValueError, match="its counts contradict one another"):
        VideoPlan.from_tensor(plan.to_tensor())


@given(plans, st.sampled_from(NAMES), st.data())
def test_every_field_travels(plan: VideoPlan, name: str, data: st.DataObject) -> None:
    other = data.draw(KINDS.get(name, numbers).filter(lambda value: value != getattr(plan, name)))
    changed = replace(plan, **{name: other})
    assert changed != plan
    assert not torch.equal(changed.to_tensor(), plan.to_tensor())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_plan_of_another_length_is_refused(change: int) -> None:
    with pytest.raises(ValueError, match=f"a video plan has {NUMBERS} numbers, not {NUMBERS + change}"):
        VideoPlan.from_tensor(torch.zeros(NUMBERS + change, dtype=torch.int64))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"events": 1, "key_events": 0, "key_frames": 0},
    {"events": 7, "key_events": 9, "key_frames": 3, "strides": (1, 3, 27), "keep_ratio": 1, "decode_retention": 0.5},
    {"events": 1024, "key_events": 1, "key_frames": 65536, "strides": (2, 2, 2), "keep_ratio": 0.000001},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("style", STYLES)
def test_the_counts_are_those_of_the_method(settings: dict[str, Any], style: PoolStyle) -> None:
    stated = RequestSettings(**settings)
    per_frame = tokens_per_frame(*GRID, stated.strides, style)
    for frames in range(1, 1025):
        plan = make(frames, style=style, **settings)
        counts = quota(frames, stated.events, stated.key_events, stated.key_frames)
        assert plan.quota == counts
        assert plan.frames == sum(plan.frames_per_tier) == frames
        assert plan.events == min(stated.events, frames)
        assert plan.tokens == video_tokens(counts, per_frame, style.separators == "event")
        bounds = survivor_bounds(
            counts, per_frame, style.separators == "event", stated.key_events, stated.keep_ratio_micro
        )
        assert (plan.most_after_l1, plan.most_after_l2) == bounds
        assert 0 <= plan.most_after_l2 <= plan.most_after_l1 <= plan.tokens
        assert (plan.keep_ratio_micro, plan.retention_micro) == (stated.keep_ratio_micro, stated.decode_retention_micro)
        assert (plan.strides, plan.key_events, plan.key_frames) == (
            stated.strides,
            stated.key_events,
            stated.key_frames,
        )


def test_by_hand() -> None:
    # 10 frames in 5 events of 2: key events 1 to 3 keep both frames in tier 0, the others' both are key
    # frames in tier 1.
    plan = plan_video(VideoGrid(10, 4, 4), STYLE, 41, RequestSettings(), "none")
    assert plan.frames_per_tier == (6, 4, 0)
    assert plan.tokens == 6 * 4 + 4 * 1 + 5
    without = plan_video(VideoGrid(10, 4, 4), PoolStyle("bilinear", "none"), 41, RequestSettings(), "none")
    assert without.tokens == plan.tokens - 5
    assert plan.stock_tokens == 41
    assert plan.aligner == "none"


@given(st.integers(1, 200), st.integers(0, 500), st.booleans(), st.integers(0, 3000))
def test_text_of_the_frames_changes_no_other_count(frames: int, text: int, on: bool, spare: int) -> None:
    """No budget knows of it, no survivor and no event."""
    settings = RequestSettings(token_budget=smallest(frames) + spare) if on else None
    without = plan_video(VideoGrid(frames, *GRID), STYLE, 196 * frames + 1, settings, "none")
    plan = plan_video(VideoGrid(frames, *GRID), STYLE, 196 * frames + 1, settings, "none", text)
    assert plan == replace(without, tokens=without.tokens + text, text_tokens=text)
    assert plan.visual_tokens == without.tokens == without.visual_tokens
    assert VideoPlan.from_tensor(plan.to_tensor()) == plan


@pytest.mark.parametrize("text", [-1, 64, 65])
def test_text_leaves_a_visual_token(text: int) -> None:
    plan = replace(make(10, strides=(8, 9, 27)), tokens=64, text_tokens=text, most_after_l1=0, most_after_l2=0)
    with pytest.raises(ValueError, match="its counts contradict one another"):
        VideoPlan.from_tensor(plan.to_tensor())


@pytest.mark.parametrize("aligner", ALIGNERS)
@pytest.mark.parametrize("report", [False, True])
def test_aligner_and_report(aligner: str, report: bool) -> None:
    plan = make(9, aligner, report=report)
    assert plan.aligner == aligner
    assert plan.report == report


def test_auto_must_have_been_resolved() -> None:
    with pytest.raises(ValueError, match="there is no aligner 'auto'"):
        make(9, "auto")


def test_stage_1_alone_has_the_same_tokens() -> None:
    every, first = make(40), make(40, stages=1)
    assert (every.compressed, every.pruned) == (True, True)
    assert (first.compressed, first.pruned) == (True, False)
    assert replace(first, pruned=True) == every


@pytest.mark.parametrize("frames", [1, 2, 31, 1024])
def test_off_is_stock(frames: int) -> None:
    plan = plan_video(VideoGrid(frames, *GRID), STYLE, 196 * frames + 1, None, "none")
    assert not plan.compressed
    assert not plan.pruned
    assert plan.tokens == plan.stock_tokens == 196 * frames + 1
    assert (plan.most_after_l1, plan.most_after_l2, plan.retention_micro, plan.report) == (0, 0, 0, False)
    assert plan.quota.frames == frames


def smallest(frames: int) -> int:
    return frames * 16 + min(5, frames)  # ceil(27 / 8) ** 2 tokens a frame


@given(st.integers(1, 200), st.integers(0, 3000))
def test_a_budget_is_kept(frames: int, spare: int) -> None:
    budget = smallest(frames) + spare
    plan, free = make(frames, token_budget=budget), make(frames)
    assert plan.tokens <= max(budget, 0)
    assert plan.frames == frames
    if free.tokens <= budget:
        assert plan == free
    else:
        lowered = with_budget(free.quota, tokens_per_frame(*GRID, (2, 4, 8), STYLE), True, budget)
        assert plan.quota == lowered
        assert plan.most_after_l1 <= plan.tokens


@pytest.mark.parametrize("frames", [1, 4, 5, 64])
def test_the_smallest_budget(frames: int) -> None:
    assert make(frames, token_budget=smallest(frames)).tokens == smallest(frames)
    sentence = (
        rf"^METok \(mm_processor_kwargs\): token_budget {smallest(frames) - 1} is too small for a video of {frames} frames: "
        rf"the smallest possible is {smallest(frames)}\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        make(frames, token_budget=smallest(frames) - 1)
