"""How long the parts of METok's work take on the device, measured without making the host wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from metok_vllm.contract.counters import SECOND_BOUNDS, TIMED_PARTS, Histogram

MOST_PENDING = 512
"""Measurements whose events the device has not reached yet;
further ones are not measured until some have been read.
"""


class PartTimes:
    """Durations by part, in seconds.

    On CUDA a measurement is two events on the current stream. They are read later, and only those that the
    device has passed, so that no step ever waits. Elsewhere it is wall time. One that ends with an exception
    is not counted.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.on_cuda = torch.device(device).type == "cuda"
        self.unmeasured = 0  # measurements that found `MOST_PENDING` others before them
        self._seconds = {part: Histogram(SECOND_BOUNDS) for part in TIMED_PARTS}
        self._pending: deque[tuple[Histogram, Any, Any]] = deque()
        self._free: list[Any] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the work that is enqueued inside the ``with`` block.

        Args:
            name: one of `TIMED_PARTS`.

        Raises:
            KeyError: there is no such part.
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
        """Part to what `Histogram.snapshot` gives, of all measurements that the device has finished."""
        self._read()
        return {part: seconds.snapshot() for part, seconds in self._seconds.items()}

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
        # One stream runs in order: where a measurement is not over, none behind it is.
        while self._pending and self._pending[0][2].query():
            seconds, start, end = self._pending.popleft()
            seconds.observe(start.elapsed_time(end) / 1000)
            self._free += (start, end)
