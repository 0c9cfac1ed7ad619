"""Stage 1 and stage 2 as the engine and the benchmarks call them, against their parts and plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metok_vllm.compression import alignment, events
from metok_vllm.compression.pooling import PoolMode, PoolStyle, tokens_per_frame
from metok_vllm.compression.ratios import to_micro
from metok_vllm.compression.selection import PruningLayer, keep_count
from metok_vllm.compression.stage1 import TORCH, Operations, Recipe, choose_frames, compress_video
from metok_vllm.compression.stage2 import EventCounts, select_survivors, survivor_mask
from metok_vllm.compression.tiers import quota, video_tokens
from tests.support.compression.generators import property_test

STRIDES = (2, 4, 8)


def features(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(frames, 6, 6, 8, generator=torch.Generator().manual_seed(seed))


def ask(question: Tensor):  # type: ignore[no-untyped-def]
    def align(vectors: Tensor, event: Tensor, count: int) -> alignment.Alignment:
        return alignment.by_question(alignment.embedding(vectors, question), event, count)

    return align


@pytest.mark.parametrize("mode", ["bilinear", "average"])
@pytest.mark.parametrize("frames", [1, 4, 21])
def test_a_compressed_video_is_laid_out_by_its_quota(mode: PoolMode, frames: int) -> None:
    x, question, separator = features(frames), torch.randn(3, 8), torch.randn(8)
    recipe = Recipe(quota(frames, 5, 3, 2), 3, 2, STRIDES, PoolStyle(mode))
    video = compress_video(x, recipe, ask(question), separator)
    per_frame = tokens_per_frame(6, 6, STRIDES, PoolStyle(mode))
    assert len(video.tokens) == video_tokens(recipe.quota, per_frame, separators=True)
    assert torch.bincount(video.choice.tier, minlength=3).tolist() == list(recipe.quota.counts())
    assert video.choice.is_key.sum() == min(3, recipe.quota.events)
    assert torch.equal(video.event, video.choice.event[video.frame])
    assert (video.frame.diff() >= 0).all()
    ends = torch.searchsorted(video.event, torch.arange(recipe.quota.events), right=True) - 1
    assert torch.equal(video.tokens[ends], separator.expand(recipe.quota.events, -1)), "a separator ends each event"
    again = choose_frames(*events.similarity(x.flatten(1, 2)), recipe, ask(question))
    assert all(torch.equal(a, b) for a, b in zip(video.choice, again, strict=True))


def test_the_operations_given_are_the_ones_that_run() -> None:
    seen = []

    def similarity(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(x.shape))
        return TORCH.similarity(x)

    recipe = Recipe(quota(9, 5, 3, 2), 3, 2, STRIDES, PoolStyle("bilinear", "none"))
    other = compress_video(features(9), recipe, alignment.none, None, Operations(similarity, TORCH.pool))
    assert seen == [(9, 36, 8)]
    assert torch.equal(other.tokens, compress_video(features(9), recipe, alignment.none, None).tokens)


@property_test
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.3, 0.76, 1.0]),
    st.integers(0, 99),
)
def test_survivors_are_the_best_of_each_event(videos: list[tuple[int, bool]], ratio: float, seed: int) -> None:
    lengths, micro = [length for length, _ in videos], to_micro(ratio)
    event = torch.repeat_interleave(torch.arange(len(videos)), torch.tensor(lengths))
    is_key = torch.tensor([key for _, key in videos])
    counts = EventCounts.of(event, is_key, micro)
    assert counts.before.tolist() == lengths
    # Few different scores, so that there are ties.
    scores = torch.randint(0, 4, (len(event),), generator=torch.Generator().manual_seed(seed)).float()
    alive = list(range(len(event)))
    steps: list[tuple[PruningLayer, list[int]]] = [(1, counts.after_l1.tolist()), (2, counts.after_l2.tolist())]
    for layer, kept in steps:
        expected = []
        for e, (_, key) in enumerate(videos):
            own = [i for i in alive if event[i] == e]
            assert kept[e] == keep_count(len(own), micro, key, layer)
            expected += sorted(own, key=lambda i: (-scores[i], i))[: kept[e]]
        mask = survivor_mask(scores[alive], counts, layer)
        alive = [i for i, stays in zip(alive, mask.tolist(), strict=True) if stays]
        assert alive == sorted(expected), f"L{layer}"
    assert not survivor_mask(scores[alive], counts, 3).any()


@property_test
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([0.000001, 0.3, 0.76, 1.0]),
    st.integers(0, 99),
)
def test_with_quota_video_as_many_survive_and_the_best_of_all(
    videos: list[tuple[int, bool]], ratio: float, seed: int
) -> None:
    lengths, micro = [length for length, _ in videos], to_micro(ratio)
    event = torch.repeat_interleave(torch.arange(len(videos)), torch.tensor(lengths))
    by_event = EventCounts.of(event, torch.tensor([key for _, key in videos]), micro)
    counts = by_event.over_the_video()
    scores = torch.randint(0, 4, (len(event),), generator=torch.Generator().manual_seed(seed)).float()
    alive = list(range(len(event)))
    kept: list[tuple[PruningLayer, int]] = [(1, int(by_event.after_l1.sum())), (2, int(by_event.after_l2.sum()))]
    assert [counts.before.tolist(), counts.after_l1.tolist(), counts.after_l2.tolist()] == [
        [len(event)], *([total] for _, total in kept)
    ]  # fmt: skip
    for layer, total in kept:
        expected = sorted(alive, key=lambda i: (-scores[i], i))[:total]
        mask = survivor_mask(scores[alive], counts, layer)
        alive = [i for i, stays in zip(alive, mask.tolist(), strict=True) if stays]
        assert alive == sorted(expected), f"L{layer}"
    assert not survivor_mask(scores[alive], counts, 3).any()


def test_several_videos_may_stand_behind_one_another() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 0.0])
    index = select_survivors(scores, torch.tensor([3, 1, 2]), torch.tensor([2, 0, 1]), 3)
    assert index.tolist() == [1, 2, 4]
