"""The method again in plain Python loops, to judge the tensor functions by. Shares no code with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def best_first(scores: Sequence[float], among: Sequence[int]) -> list[int]:
    """`among`, highest score first, ties lowest index, NaN last."""
    return sorted(among, key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i))


def segment(similarity: Sequence[float], events: int) -> list[int]:
    cuts = set(sorted(range(len(similarity)), key=lambda i: (similarity[i], i))[: events - 1])
    ids = [0]
    for i in range(len(similarity)):
        ids.append(ids[-1] + (1 if i in cuts else 0))
    return ids


def members(event_ids: Sequence[int]) -> dict[int, list[int]]:
    events: dict[int, list[int]] = {}
    for i, event in enumerate(event_ids):
        events.setdefault(event, []).append(i)
    return events


def paper_tiers(event_ids: Sequence[int], r: Sequence[float], key: Sequence[bool], key_frames: int) -> list[int]:
    tiers = [0] * len(event_ids)
    for event, frames in members(event_ids).items():
        best = set(best_first(r, frames)[:key_frames])
        for frame in frames:
            if key[event]:
                tiers[frame] = 0 if frame in best else 1
            else:
                tiers[frame] = 1 if frame in best else 2
    return tiers


def assign(
    event_ids: Sequence[int],
    r: Sequence[float],
    key: Sequence[bool],
    key_frames: int,
    counts: tuple[int, int, int],
) -> list[int]:
    paper = paper_tiers(event_ids, r, key, key_frames)
    order = [frame for tier in (0, 1, 2) for frame in best_first(r, [i for i, t in enumerate(paper) if t == tier])]
    tiers = [2] * len(paper)
    for position, frame in enumerate(order):
        tiers[frame] = 0 if position < counts[0] else 1 if position < counts[0] + counts[1] else 2
    return tiers


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as `parts` positive integers, in order."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)
