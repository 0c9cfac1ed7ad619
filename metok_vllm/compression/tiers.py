"""Tiers: how finely each frame is kept, with counts known before any
tensor is (docs/method.md 1.4, 1.5 and 4).

Tier 0 is pooled with the first stride (finest), tier 1 with the second, tier 2 with the third.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .ordering import best_first_by_group, place_in_group

TokensPerFrame = tuple[int, int, int]
"""Tokens of one frame in tier 0, 1 and 2; see `pooling.tokens_per_frame`."""


@dataclass(frozen=True)
class TierQuota:
    """How many events a video has and how many of its frames fall in each tier; plain integers."""

    events: int
    tier0: int  # frames in tier 0, the finest
    tier1: int
    tier2: int

    def __post_init__(self) -> None:
        if min(self.tier0, self.tier1, self.tier2) < 0 or not 1 <= self.events <= self.frames:
            raise ValueError(f"a video has frames in every event and no negative counts, unlike {self!r}")

    @property
    def frames(self) -> int:
        return self.tier0 + self.tier1 + self.tier2

    def counts(self) -> tuple[int, int, int]:
        """Frames in tier 0, 1 and 2."""
        return (self.tier0, self.tier1, self.tier2)


def expected_event_sizes(frames: int, events: int) -> list[int]:
    """Frames of each event if a video were cut evenly: `min(events, frames)` sizes, larger ones first.

    Raises:
        ValueError: there is no frame or no event.
    """
    if frames < 1 or events < 1:
        raise ValueError(f"a video has at least 1 frame and 1 event, not {frames} and {events}")
    present = min(events, frames)
    return [frames // present + (1 if i < frames % present else 0) for i in range(present)]


def quota(frames: int, events: int, key_events: int, key_frames: int) -> TierQuota:
    """Frames per tier of a video, from its frame count and the settings alone (docs/method.md section 4).

    Args:
        frames: `T`, at least 1.
        events: events wanted, at least 1; a video has `min(events, frames)`.
        key_events: how many of them are key events; more than there are means all.
        key_frames: how many key frames each event has; more than it has frames means all.

    Raises:
        ValueError: a number is below its range.
    """
    if key_events < 0 or key_frames < 0:
        raise ValueError(f"key_events and key_frames cannot be negative, not {key_events} and {key_frames}")
    sizes = expected_event_sizes(frames, events)
    in_key, in_others = sizes[:key_events], sizes[key_events:]
    tier0 = sum(min(key_frames, size) for size in in_key)
    tier1 = sum(in_key) - tier0 + sum(min(key_frames, size) for size in in_others)
    return TierQuota(events=len(sizes), tier0=tier0, tier1=tier1, tier2=frames - tier0 - tier1)


def video_tokens(quota: TierQuota, tokens_per_frame: TokensPerFrame, separators: bool) -> int:
    """Tokens of a video after stage 1; `separators` says whether one follows each event (section 1.6)."""
    t1, t2, t3 = tokens_per_frame
    return quota.tier0 * t1 + quota.tier1 * t2 + quota.tier2 * t3 + (quota.events if separators else 0)


def with_budget(quota: TierQuota, tokens_per_frame: TokensPerFrame, separators: bool, budget: int) -> TierQuota:
    """Lower a quota until the video fits `budget` tokens,
    in as few steps as possible (docs/method.md section 4).

    One step moves one frame down one tier. Among the shortest ways, the one with most steps from tier 0 to
    tier 1 is taken. A quota that already fits is returned as it is.

    Raises:
        ValueError: the budget is below what the video takes with every frame in tier 2, or a finer tier has
            fewer tokens a frame than a coarser one.
    """
    t1, t2, t3 = tokens_per_frame
    if not t1 >= t2 >= t3 >= 1:
        raise ValueError(f"a finer tier cannot have fewer tokens a frame than a coarser one: {tokens_per_frame}")
    excess = video_tokens(quota, tokens_per_frame, separators) - budget
    if excess <= 0:
        return quota
    smallest = quota.frames * t3 + (quota.events if separators else 0)
    if budget < smallest:
        raise ValueError(
            f"token_budget {budget} is too small for a video of {quota.frames} frames: "
            f"the smallest possible is {smallest}"
        )

    def ways() -> Iterator[tuple[int, int, int]]:
        """(steps, minus steps from tier 0, steps from tier 1), one way for every number of the former."""
        for first in range(quota.tier0 + 1):
            missing = excess - first * (t1 - t2)
            if missing <= 0:
                yield first, -first, 0
            elif t2 > t3:
                second = -(-missing // (t2 - t3))
                if second <= quota.tier1 + first:
                    yield first + second, -first, second

    _, minus_first, second = min(ways())
    return TierQuota(
        events=quota.events,
        tier0=quota.tier0 + minus_first,
        tier1=quota.tier1 - minus_first - second,
        tier2=quota.tier2 + second,
    )


def paper_tiers(event_ids: Tensor, r: Tensor, key: Tensor, key_frames: int) -> Tensor:
    """The paper's plain rule (docs/method.md 1.4 and 1.5), whose counts depend on the content.

    Args:
        event_ids: int64 [T].
        r: float [T], alignment of each frame.
        key: bool [e], which events are key events.
        key_frames: key frames an event.

    Returns:
        int64 [T]: 0 for a key frame of a key event, 1 for another frame of a key event and for a key frame of
        another event, 2 for the rest.
    """
    is_key_frame = place_in_group(r, event_ids) < key_frames
    return 2 - key[event_ids].to(torch.int64) - is_key_frame.to(torch.int64)


def assign(event_ids: Tensor, r: Tensor, key: Tensor, key_frames: int, quota: TierQuota) -> Tensor:
    """Tier of each frame, with exactly the quota's counts (docs/method.md section 4).

    Frames are sorted by the paper's tier, then by higher `r`, then by index; the quota's first get tier
    0, the next tier 1, the rest tier 2. Arguments as in `paper_tiers`, to which the result is equal where the
    paper's counts are the quota's. Never waits for the GPU.

    Returns:
        int64 [T].

    Raises:
        ValueError: the quota is for another number of frames.
    """
    if event_ids.shape[0] != quota.frames:
        raise ValueError(f"the quota is for {quota.frames} frames, the video has {event_ids.shape[0]}")
    paper = paper_tiers(event_ids, r, key, key_frames)
    order = best_first_by_group(r, paper)
    tiers = torch.zeros_like(order)
    tiers.index_fill_(0, order[quota.tier0 :], 1)
    return tiers.index_fill_(0, order[quota.tier0 + quota.tier1 :], 2)
