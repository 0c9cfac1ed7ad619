from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.events import segment
from metok_vllm.compression.tiers import (
    TierQuota,
    assign,
    expected_event_sizes,
    paper_tiers,
    quota,
    video_tokens,
    with_budget,
)
from tests.support.compression import naive
from tests.support.compression.generators import event_ids, property_test, scores

SETTINGS = [
    # events, key_events, key_frames
    (5, 3, 6),  # the paper's
    (1, 1, 6),
    (1, 0, 1),
    (2, 2, 0),
    (3, 5, 1),
    (7, 2, 3),
    (16, 4, 64),
    (64, 63, 2),
    (1024, 512, 1),
    (2000, 3, 4000),
]


def test_quota_of_the_papers_settings_by_hand() -> None:
    # 64 frames: events of 13, 13, 13, 13, 12; 18 key frames in the three key events, 3 * 7 others there and
    # 12 key frames elsewhere, 7 + 6 left.
    assert quota(64, 5, 3, 6) == TierQuota(events=5, tier0=18, tier1=33, tier2=13)
    assert quota(32, 5, 3, 6) == TierQuota(events=5, tier0=18, tier1=14, tier2=0)
    assert quota(128, 5, 3, 6) == TierQuota(events=5, tier0=18, tier1=72, tier2=38)
    # Fewer frames than events: one frame an event, three of them key.
    assert quota(4, 5, 3, 6) == TierQuota(events=4, tier0=3, tier1=1, tier2=0)
    assert quota(1, 5, 3, 6) == TierQuota(events=1, tier0=1, tier1=0, tier2=0)


@pytest.mark.parametrize(("events", "key_events", "key_frames"), SETTINGS)
def test_counts_are_exact_for_every_length(events: int, key_events: int, key_frames: int) -> None:
    generator = torch.Generator().manual_seed(events)
    for frames in range(1, 1025):
        q = quota(frames, events, key_events, key_frames)
        sizes = expected_event_sizes(frames, events)
        assert sum(sizes) == q.frames == frames
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == q.events == min(events, frames)
        ids = segment(torch.rand(frames - 1, generator=generator), events)
        r = torch.rand(frames, generator=generator)
        key = torch.arange(q.events) < key_events
        tiers = assign(ids, r, key, key_frames, q)
        assert tuple((tiers == tier).sum().item() for tier in range(3)) == q.counts()


@property_test
@given(
    event_ids().flatmap(lambda ids: st.tuples(st.just(ids), scores(len(ids), nan=True))),
    st.randoms(use_true_random=False),
    st.integers(0, 8),
)
def test_tiers_equal_plain_loops_for_any_quota(
    case: tuple[list[int], list[float]], rng: random.Random, key_frames: int
) -> None:
    ids, r = case
    key = [rng.random() < 0.5 for _ in range(ids[-1] + 1)]
    low, high = sorted(rng.randint(0, len(ids)) for _ in range(2))
    q = TierQuota(events=ids[-1] + 1, tier0=low, tier1=high - low, tier2=len(ids) - high)
    tensors = (torch.tensor(ids), torch.tensor(r), torch.tensor(key))
    assert paper_tiers(*tensors, key_frames).tolist() == naive.paper_tiers(ids, r, key, key_frames)
    assert assign(*tensors, key_frames, q).tolist() == naive.assign(ids, r, key, key_frames, q.counts())


@property_test
@given(
    st.integers(1, 60),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(0, 10),
    st.randoms(use_true_random=False),
)
def test_with_the_expected_sizes_it_is_the_papers_rule(
    frames: int, events: int, key_events: int, key_frames: int, rng: random.Random
) -> None:
    # Key events of the expected sizes, in any place and order in the video.
    sizes = [(size, i < key_events) for i, size in enumerate(expected_event_sizes(frames, events))]
    rng.shuffle(sizes)
    ids = [event for event, (size, _) in enumerate(sizes) for _ in range(size)]
    key = [is_key for _, is_key in sizes]
    # Through float32 first: both sides must see the same ties.
    r = torch.tensor([rng.choice([0.1, 0.2, 0.3, rng.random()]) for _ in range(frames)]).tolist()
    q = quota(frames, events, key_events, key_frames)
    tiers = assign(torch.tensor(ids), torch.tensor(r), torch.tensor(key), key_frames, q)
    assert tiers.tolist() == naive.paper_tiers(ids, r, key, key_frames)


def test_without_them_the_counts_win_over_the_papers_rule() -> None:
    # One long key event of 8 and two others of 1: the paper would keep 2 + (6 + 2) + 0 frames.
    ids, r = [0] * 8 + [1, 2], [0.1 * i for i in range(8)] + [0.95, 0.85]
    q = quota(10, events=3, key_events=1, key_frames=2)
    assert q.counts() == (2, 6, 2)
    key = torch.tensor([True, False, False])
    tiers = assign(torch.tensor(ids), torch.tensor(r), key, 2, q).tolist()
    assert tiers == [2, 2, 1, 1, 1, 1, 0, 0, 1, 1]  # the two worst of tier 1 go down
    assert naive.paper_tiers(ids, r, [True, False, False], 2) == [1] * 6 + [0, 0, 1, 1]


def test_assign_refuses_a_quota_for_another_video() -> None:
    with pytest.raises(ValueError, match="quota is for 10 frames, the video has 9"):
        assign(torch.zeros(9, dtype=torch.int64), torch.zeros(9), torch.ones(1) > 0, 6, quota(10, 5, 3, 6))


@pytest.mark.parametrize("numbers", [(0, 5, 3, 6), (8, 0, 3, 6), (8, 5, -1, 6), (8, 5, 3, -1)])
def test_quota_refuses_impossible_numbers(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least|negative"):
        quota(*numbers)


@pytest.mark.parametrize("fields", [(0, 1, 1, 1), (4, 1, 1, 1), (1, -1, 1, 1), (1, 0, 0, 0)])
def test_a_quota_that_no_video_has_is_refused(fields: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="frames in every event"):
        TierQuota(*fields)


def shortest_ways(
    q: TierQuota, per_frame: tuple[int, int, int], separators: bool, budget: int
) -> list[tuple[int, int, int]]:
    """Breadth first, one frame down one tier at a time: all quotas that fit after the fewest steps."""
    level = {q.counts()}
    while level:
        fitting = [c for c in level if video_tokens(TierQuota(q.events, *c), per_frame, separators) <= budget]
        if fitting:
            return fitting
        level = {(a - 1, b + 1, c) for a, b, c in level if a} | {(a, b - 1, c + 1) for a, b, c in level if b}
    return []


@pytest.mark.parametrize("separators", [False, True])
@pytest.mark.parametrize("per_frame", [(9, 4, 1), (5, 4, 1), (7, 2, 1), (4, 4, 1), (6, 2, 2), (3, 3, 3), (196, 49, 16)])
def test_budget_takes_the_fewest_steps(per_frame: tuple[int, int, int], separators: bool) -> None:
    lowered = 0
    for frames in (1, 2, 5, 9):
        for events, key_events, key_frames in [(1, 1, 2), (3, 2, 1), (5, 3, 6), (4, 0, 1)]:
            q = quota(frames, events, key_events, key_frames)
            full = video_tokens(q, per_frame, separators)
            smallest = frames * per_frame[2] + (q.events if separators else 0)
            stride = max(1, full // 40)
            for budget in sorted({*range(smallest - 2, full + 2, stride), smallest, smallest - 1, full}):
                ways = shortest_ways(q, per_frame, separators, budget)
                assert bool(ways) == (budget >= smallest)
                if not ways:
                    with pytest.raises(ValueError, match=f"too small .* smallest possible is {smallest}$"):
                        with_budget(q, per_frame, separators, budget)
                    continue
                result = with_budget(q, per_frame, separators, budget)
                assert result.events == q.events
                assert result.counts() == min(ways)  # fewest left in tier 0: most steps from it
                lowered += result != q
    assert lowered > 0 or per_frame == (3, 3, 3)


def test_budget_refuses_tiers_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="finer tier"):
        with_budget(quota(8, 5, 3, 6), (9, 16, 1), False, 20)


def test_video_tokens_by_hand() -> None:
    q = TierQuota(events=2, tier0=1, tier1=2, tier2=3)
    assert video_tokens(q, (100, 10, 1), separators=False) == 123
    assert video_tokens(q, (100, 10, 1), separators=True) == 125


def test_a_lowered_quota_still_takes_the_best_frames() -> None:
    ids = list(accumulate([0] + [1 if i % 4 == 0 else 0 for i in range(1, 20)]))
    r = torch.linspace(1.0, 0.0, 20)
    key = torch.tensor([True, True, True, False, False])
    q = with_budget(quota(20, 5, 3, 2), (16, 4, 1), True, 110)  # 145 tokens lowered
    assert q.tier0 == 3
    assert assign(torch.tensor(ids), r, key, 2, q).eq(0).nonzero().flatten().tolist() == [0, 1, 4]
