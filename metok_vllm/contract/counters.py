"""What a worker counts of the requests that METok prunes: plain numbers, added up once a prompt and read by HTTP requests.

Every process hands out its numbers as a `snapshot`: a nest of dicts, lists and numbers of fixed shape, so that those of
several engines can be added (`summed`). The HTTP server makes Prometheus metrics of them (`serve/metrics.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOKEN_STAGES = ("stock", "encoded", "after_l1", "after_l2", "retained")
"""Visual tokens of a request along its way, as in `compression.accounting.VisualTokens`."""

KV_KINDS = ("stock", "metok")
"""KV bytes that a request's prompt would take without METok, and those it takes."""

EVENT_BOUNDS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


@dataclass
class Histogram:
    """Counts of observations by upper bound (inclusive), and their sum."""

    bounds: Sequence[float]  # ascending; one more count than bounds, for what is above the last
    counts: list[int] = field(default_factory=list)
    total: float = 0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> dict[str, Any]:
        """``counts`` (not cumulative) and ``sum``."""
        return {"counts": list(self.counts), "sum": self.total}


class PruningCounters:
    """Totals over the requests that one worker has pruned since it started."""

    def __init__(self) -> None:
        self.requests = 0
        self.recomputed = 0  # prompts computed once more after a preemption; counted nowhere else
        self.videos = 0
        self.visual_tokens = dict.fromkeys(TOKEN_STAGES, 0)
        self.kv_bytes = dict.fromkeys(KV_KINDS, 0)
        self.events = Histogram(EVENT_BOUNDS)

    def add(self, visual_tokens: Mapping[str, int], kv_bytes: Mapping[str, int], events: Iterable[int]) -> None:
        """Count one pruned request.

        Args:
            visual_tokens: by `TOKEN_STAGES`, all its pruned videos together.
            kv_bytes: by `KV_KINDS`.
            events: of each of its pruned videos.
        """
        self.requests += 1
        for stage in TOKEN_STAGES:
            self.visual_tokens[stage] += visual_tokens[stage]
        for kind in KV_KINDS:
            self.kv_bytes[kind] += kv_bytes[kind]
        for count in events:
            self.videos += 1
            self.events.observe(count)

    def snapshot(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "recomputed": self.recomputed,
            "videos": self.videos,
            "visual_tokens": dict(self.visual_tokens),
            "kv_bytes": dict(self.kv_bytes),
            "events": self.events.snapshot(),
        }


def summed(snapshots: Sequence[Any]) -> Any:
    """The sum of snapshots of one shape: numbers are added, lists and dicts entry by entry.

    Raises:
        ValueError: there is none, or their shapes differ.
    """
    if not snapshots:
        raise ValueError("there is no snapshot to add up")
    first = snapshots[0]
    if isinstance(first, Mapping):
        if any(set(other) != set(first) for other in snapshots):
            raise ValueError(f"snapshots of different shapes: {[sorted(other) for other in snapshots]}")
        return {key: summed([other[key] for other in snapshots]) for key in first}
    if isinstance(first, list):
        return [summed(list(entries)) for entries in zip(*snapshots, strict=True)]
    return sum(snapshots)
