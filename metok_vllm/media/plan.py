"""Which frames to sample, and which stretches of packets must be decoded to get them. Pure Python and numpy."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

JUMP_GAP = 8
"""Skip undecoded packets only where at least this many are saved; fewer are cheaper to decode than a restart."""


@dataclass(frozen=True)
class PacketTable:
    """One row per packet of the video stream, in file (= decoding) order.

    `pts` is in stream ticks; where `timed` is false it holds nothing of use, and frames are known by their order alone.
    """

    pts: npt.NDArray[np.int64]
    """[P] presentation time of each packet."""
    key: npt.NDArray[np.bool_]
    """[P] whether decoding may start at this packet."""
    shown: npt.NDArray[np.bool_]
    """[P] whether the packet yields a frame for display (edit lists and hidden reference frames do not)."""
    timed: bool
    """Whether every packet has a `pts` of its own, so that a frame is known by it."""
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

    `total` >= 1 frames last `duration` seconds; `num_frames` and `fps` limit the sample unless they are -1, the lower
    of the two counts, and at least one frame is taken. Returns strictly increasing indices in ``[0, total)``.
    """
    count = total
    if num_frames > 0:
        count = min(count, num_frames)
    if fps > 0:
        count = min(count, math.floor(duration * fps))
    count = max(1, count)
    if count == total:
        return list(range(total))
    # The truncation of linspace's floats is part of vLLM's choice: an exact integer formula differs now and then.
    return [int(index) for index in np.linspace(0, total - 1, count, dtype=int)]


def plan_runs(table: PacketTable, indices: list[int], *, jump: bool = True) -> list[Run]:
    """Cut the work of decoding frames `indices` (increasing) into runs, in file order and without overlap.

    Each wanted frame is decoded from the last key packet that is neither shown nor stored after it. With `jump` false,
    or in a table that is not timed, one run from the first packet on covers everything.
    """
    if not table.timed:
        return [Run(0, len(table.pts) - 1, {index: slot for slot, index in enumerate(indices)})]
    packets = table.display_order()[indices]
    if not jump:
        return [Run(0, int(packets.max()), _by_pts(table, packets, range(len(indices))))]

    runs: list[tuple[int, int, list[int]]] = []
    keys = np.flatnonzero(table.key)
    # Highest pts among the keys up to each one, so that a key shown later than its successors is passed over rightly.
    key_list = [0, *(int(key) for key in keys if key > 0)]
    for slot, packet in enumerate(int(packet) for packet in packets):
        start = _start_for(table, key_list, packet)
        if runs and start <= runs[-1][1] + JUMP_GAP:
            first, last, slots = runs[-1]
            runs[-1] = (min(first, start), max(last, packet), [*slots, slot])
        else:
            runs.append((start, packet, [slot]))
    return [Run(first, last, _by_pts(table, packets, slots)) for first, last, slots in runs]
