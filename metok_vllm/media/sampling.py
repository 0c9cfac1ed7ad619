"""Which frames to sample, and which stretches of packets must be decoded for them. Python and numpy alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

JUMP_GAP = 8
"""Jump over packets only where more than this many are saved; fewer are cheaper to decode than a restart."""
_KEYS_TO_TRY = 64

QWEN_FRAMES = (4, 768)
"""Fewest and most frames of a video that Qwen2-VL's and Qwen3-VL's own processors take by `fps`."""
_QWEN_MOST_FPS = 30

QWEN3_RATE = 24.0
"""Frames a second that Qwen3-VL takes a video for whose rate nobody knows; its frames are labelled by it."""


@dataclass(frozen=True)
class PacketTable:
    """One row per packet of the video stream, in file (= decoding) order."""

    pts: npt.NDArray[np.int64]
    """[P] time of display of each packet, in stream ticks; of no use where `timed` is false."""
    key: npt.NDArray[np.bool_]
    """[P] whether decoding may start at this packet."""
    shown: npt.NDArray[np.bool_]
    """[P] whether the packet yields a frame for display: what edit lists hide, for one, does not."""
    timed: bool
    """Whether every packet has a `pts` of its own by which its frame is known; else the order alone tells."""
    damaged: bool = False
    """Whether reading the container ended in an error."""

    @property
    def total(self) -> int:
        """Frames for display."""
        return int(self.shown.sum())

    def display_order(self) -> npt.NDArray[np.int64]:
        """[total] packet number of each displayed frame, by time of display (needs `timed`)."""
        shown = np.flatnonzero(self.shown)
        return shown[np.argsort(self.pts[shown], kind="stable")]


@dataclass(frozen=True)
class Run:
    """Packets `start` .. `end` (inclusive) to decode without a break, and what is wanted from them."""

    start: int
    end: int
    wanted: dict[int, int]
    """Frame key (its pts; its ordinal where the table is not timed) -> slot in the output."""

    @property
    def cost(self) -> int:
        """Packets to decode."""
        return self.end - self.start + 1


def sample_indices(total: int, duration: float, num_frames: int, fps: float) -> list[int]:
    """Frame indices to sample, as vLLM's own uniform loader chooses them.

    `total` >= 1 frames last `duration` seconds; `num_frames` and `fps` limit the sample unless they are -1,
    the lower count of the two holds; at least one frame is taken. Returns increasing indices in ``[0,
    total)``.
    """
    count = total
    if num_frames > 0:
        count = min(count, num_frames)
    if fps > 0:
        count = min(count, math.floor(duration * fps))
    count = max(1, count)
    if count == total:
        return list(range(total))
    # Truncated floats are part of vLLM's choice: exact integer arithmetic would differ now and then.
    return [int(index) for index in np.linspace(0, total - 1, count, dtype=int)]


def qwen_indices(total: int, rate: float, num_frames: int, fps: float) -> list[int]:
    """Frame indices to sample as Qwen2-VL's own video processor chooses them.

    `total` >= 1 frames are shown at `rate` a second. An `fps` above 0 decides alone: so many a second, from
    `QWEN_FRAMES[0]` to `QWEN_FRAMES[1]`. Else `num_frames` does, unless it is -1. Their number is even, since
    the tower takes pairs; only a video of one frame gives one. Returns increasing indices in ``[0, total)``.
    """
    least, most = QWEN_FRAMES
    count: float = total
    if fps > 0:
        count = min(max(total / rate * min(fps, _QWEN_MOST_FPS), least), most)
    elif num_frames > 0:
        count = round(num_frames / 2) * 2
    pairs = max(int(min(count, total) / 2), 1)
    # Exact, where transformers and vLLM add up a step in float32: one index in a long video may differ by 1.
    return [place * total // (2 * pairs) for place in range(min(2 * pairs, total))]


def qwen3_indices(total: int, rate: float, num_frames: int, fps: float) -> list[int]:
    """Frame indices to sample as Qwen3-VL's own video processor chooses them
    (vllm/multimodal/video.py: `Qwen3VLVideoBackend`, which takes an `fps` alone).

    `total` >= 1 frames are shown at `rate` a second. An `fps` above 0 decides alone: so many a second,
    rounded down, from `QWEN_FRAMES[0]` to `QWEN_FRAMES[1]`. Else `num_frames` does, unless it is -1. From the
    first frame to the last. Returns increasing indices in ``[0, total)``.
    """
    least, most = QWEN_FRAMES
    count = total
    if fps > 0:
        # Truncated and rounded floats are the model's: by these indices its frames are labelled.
        count = min(max(int(total / rate * min(fps, _QWEN_MOST_FPS)), least), most)
    elif num_frames > 0:
        count = num_frames
    return [int(index) for index in np.linspace(0, total - 1, min(count, total)).round()]


def decode_runs(table: PacketTable, indices: list[int], *, jump: bool = True) -> list[Run]:
    """Cut the work of decoding frames `indices` (increasing) into runs, in file order and without overlap.

    Each wanted frame is decoded from the last key packet stored and shown no later than it. If `jump` is
    false or the table not timed, one run from the first packet on covers everything.
    """
    if not table.timed:
        return [Run(0, len(table.pts) - 1, {index: slot for slot, index in enumerate(indices)})]
    packets = table.display_order()[indices]
    if not jump:
        return [Run(0, int(packets.max()), _by_pts(table, packets, range(len(indices))))]

    keys = [0, *(int(key) for key in np.flatnonzero(table.key) if key > 0)]
    spans: list[tuple[int, int, list[int]]] = []
    for slot, packet in enumerate(int(packet) for packet in packets):
        spans.append((_start_for(table, keys, packet), packet, [slot]))
        while len(spans) > 1 and spans[-1][0] <= spans[-2][1] + JUMP_GAP:
            (first, last, slots), later = spans[-2], spans.pop()
            spans[-1] = (min(first, later[0]), max(last, later[1]), slots + later[2])
    return [Run(first, last, _by_pts(table, packets, slots)) for first, last, slots in spans]


def _start_for(table: PacketTable, keys: list[int], packet: int) -> int:
    """The key packet from which to decode `packet`; 0 where none is near."""
    at = bisect_right(keys, packet) - 1
    # Only in damaged files are many keys in a row shown after packets that follow them: give up early there.
    for key in keys[max(0, at - _KEYS_TO_TRY + 1) : at + 1][::-1]:
        if table.pts[key] <= table.pts[packet]:
            return key
    return 0


def _by_pts(table: PacketTable, packets: npt.NDArray[np.int64], slots: Iterable[int]) -> dict[int, int]:
    return {int(table.pts[packets[slot]]): slot for slot in slots}
