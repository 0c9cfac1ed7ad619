"""What the scheduler and the worker count by, and how their numbers are added up.

Every process hands out its numbers as a `snapshot`: a nest of dicts, lists and numbers of fixed shape, so
that those of several engines can be added (`summed`). The HTTP server makes Prometheus metrics of them
(`serve/metrics.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOKEN_COUNTS = ("stock", "encoded", "after_l1", "after_l2", "retained", "after_l3")
"""Visual tokens of a request along its way, as in `compression.accounting.VisualTokens`."""

KV_KINDS = ("stock", "metok")
"""KV bytes that a request's prompt would take without METok, and those it takes."""

TIMED_PARTS = ("tower", "stage1", "shallow", "scoring", "deep")
"""Parts of METok's work whose time is measured. Vision tower and projector of one video; stage 1 of one
video; then of one pruned step: the layers below L1, the choice of survivors, the layers from L1 up."""

SCHEDULER_UTILITY = "scheduler"
"""The name by which vLLM's client reaches `MetokScheduler.__call__`."""

SECOND_BOUNDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
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
