"""How long the stages of METok's path take on the device, measured without making the host wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from metok_vllm.contract.counters import Histogram

TIMED_STAGES = ("tower", "stage1", "shallow", "scoring", "deep")
"""Vision tower and projector of one video; stage 1 of one video; then of one pruned step: the layers below L1, the choice of
survivors, the layers from L1 up."""

SECOND_BOUNDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

MOST_PENDING = 512
"""Spans whose events the device has not reached yet; further ones are not measured until some have been read."""


class StageTimes:
    """Durations by stage, in seconds.

    On CUDA a span is two events on the current stream. They are read later, and only those that the device has passed, so
    that no step ever waits. Elsewhere a span is wall time. A span that ends with an exception is not counted.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.on_cuda = torch.device(device).type == "cuda"
        self.unmeasured = 0  # spans that found `MOST_PENDING` others before them
        self._seconds = {stage: Histogram(SECOND_BOUNDS) for stage in TIMED_STAGES}
        self._pending: deque[tuple[Histogram, Any, Any]] = deque()
        self._free: list[Any] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the work that is enqueued inside the ``with`` block.

        Args:
            name: one of `TIMED_STAGES`.

        Raises:
            KeyError: there is no such stage.
        """
        seconds = self._seconds[name]
        if not self.on_cuda:
            begun = perf_counter()
            yield
            seconds.observe(perf_counter() - begun)
            return
        # While a CUDA graph is captured an event would become part of the graph.
        if torch.cuda.is_current_stream_capturing() or not self._has_room():
            yield
            return
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._pending.append((seconds, start, end))

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Stage to what `Histogram.snapshot` gives, of all spans that the device has finished."""
        self._read()
        return {stage: seconds.snapshot() for stage, seconds in self._seconds.items()}

    def _has_room(self) -> bool:
        if len(self._pending) >= MOST_PENDING:
            self._read()
        full = len(self._pending) >= MOST_PENDING
        self.unmeasured += full
        return not full

    def _event(self) -> Any:
        if self._free:
            return self._free.pop()
        # torch does not annotate this constructor.
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def _read(self) -> None:
        # One stream runs in order: where a span is not over, none behind it is.
        while self._pending and self._pending[0][2].query():
            seconds, start, end = self._pending.popleft()
            seconds.observe(start.elapsed_time(end) / 1000)
            self._free += (start, end)
