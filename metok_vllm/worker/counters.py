"""What a worker counts of the requests that METok prunes: plain numbers,
added up once a prompt and read by HTTP requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metok_vllm.contract.counters import EVENT_BOUNDS, KV_KINDS, TOKEN_COUNTS, Histogram


class PruningCounters:
    """Totals over the requests that one worker has pruned since it started."""

    def __init__(self) -> None:
        self.requests = 0
        self.recomputed = 0  # prompts computed once more after a preemption; counted nowhere else
        self.videos = 0
        self.visual_tokens = dict.fromkeys(TOKEN_COUNTS, 0)
        self.kv_bytes = dict.fromkeys(KV_KINDS, 0)
        self.events = Histogram(EVENT_BOUNDS)

    def add(self, visual_tokens: Mapping[str, int], kv_bytes: Mapping[str, int], events: Iterable[int]) -> None:
        """Count one pruned request.

        Args:
            visual_tokens: by `TOKEN_COUNTS`, all its pruned videos together.
            kv_bytes: by `KV_KINDS`.
            events: of each of its pruned videos.
        """
        self.requests += 1
        for name in TOKEN_COUNTS:
            self.visual_tokens[name] += visual_tokens[name]
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
