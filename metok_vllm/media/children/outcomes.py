"""What came of the videos, and how busy the pool is: Prometheus metrics of the API server's process."""

from __future__ import annotations

from enum import Enum
from functools import cache

from prometheus_client import Counter, Gauge

from metok_vllm.contract.refusals import FRONT_END

DECODES = "metok_video_decodes"
RUNNING, WAITING, MEMORY = "metok_video_decodes_running", "metok_video_decodes_waiting", "metok_video_memory_bytes"


class Outcome(Enum):
    """What came of one video."""

    DECODED = "decoded"
    REFUSED = "refused"
    """Something is wrong with the file, or it is larger than the settings allow."""
    LATE = "late"
    """Killed when its time was up."""
    MEMORY = "memory"
    """It took more memory than a decoder may have, or is damaged so that libav says so."""
    BROKEN = "broken"
    """The decoder crashed."""
    CANCELLED = "cancelled"
    """Its client had gone."""
    BUSY = "busy"
    """There was no room for it."""

    def count(self) -> None:
        _decodes().labels(self.value).inc()


@cache
def _decodes() -> Counter:
    counter = Counter(DECODES, "Video files, by what came of decoding them.", ["outcome"], registry=FRONT_END)
    for outcome in Outcome:
        counter.labels(outcome.value)
    return counter


@cache
def _gauges() -> tuple[Gauge, Gauge, Gauge]:
    about = (
        (RUNNING, "Video files being decoded."),
        (WAITING, "Video files that wait to be decoded."),
        (MEMORY, "Bytes of decoded frames in use, and of decoders at work."),
    )
    # With several API server processes, the sum over those that live.
    first, second, third = (Gauge(*one, registry=FRONT_END, multiprocess_mode="livesum") for one in about)
    return first, second, third


def publish(running: int, waiting: int, memory: int) -> None:
    """State how busy the pool is. Not from a finalizer: prometheus_client takes a lock."""
    _decodes()
    for gauge, value in zip(_gauges(), (running, waiting, memory), strict=True):
        gauge.set(value)
