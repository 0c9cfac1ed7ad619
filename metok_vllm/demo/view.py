"""A request's report, as the tables and the picture show it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from metok_vllm.demo.errors import DemoError


@dataclass(frozen=True)
class FrameView:
    """One sampled frame."""

    event: int
    stride: int
    tokens: int  # with the separator that follows an event, on the event's last frame
    time: float  # s


@dataclass(frozen=True)
class EventView:
    """One event: frames `first` .. `last`, inclusive."""

    index: int
    key: bool
    first: int
    last: int
    start: float  # s; a cut lies somewhere between two sampled frames and is taken to be halfway
    end: float  # s
    tokens: int
    strides: tuple[int, ...]  # one a frame

    @property
    def frames(self) -> int:
        return self.last - self.first + 1

    def count(self, stride: int) -> int:
        """Frames at that stride."""
        return Counter(self.strides)[stride]


@dataclass(frozen=True)
class Amounts:
    """An amount without METok and with it."""

    stock: int
    metok: int

    @property
    def saved(self) -> float:
        """Share of `stock` that is gone; negative where METok takes more."""
        return 1 - self.metok / self.stock if self.stock else 0.0


@dataclass(frozen=True)
class ReportView:
    """What METok did to a request with one video."""

    frames: tuple[FrameView, ...]
    events: tuple[EventView, ...]
    duration: float  # s
    prune_layers: tuple[int, ...]
    text_tokens: int
    visual_tokens: tuple[tuple[str, int], ...]  # along the request's way: name of the place, how many
    retained: int | None
    """Visual tokens that keep KV in the layers from the first pruning one to the last while decoding.

    None with `kv_layers`: as many as the layer has.
    """
    kv_bytes: Amounts
    prefill_flops: Amounts

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides in use, ascending."""
        return tuple(sorted({frame.stride for frame in self.frames}))

    @property
    def stock_tokens_per_frame(self) -> float:
        return self.visual_tokens[0][1] / len(self.frames)


def reported_frames(report: dict[str, Any]) -> int:
    """How many frames a report is about, or pairs of frames; 0 where it is none of a video."""
    videos = report.get("videos")
    entries = (
        videos[0].get("per_frame") if isinstance(videos, list) and videos and isinstance(videos[0], dict) else None
    )
    return len(entries) if isinstance(entries, list) else 0


def read_report(report: dict[str, Any], times: list[float], duration: float) -> ReportView:
    """Read the report of the plugin's endpoint.

    Args:
        report: of a request with one video.
        times: seconds of its sampled frames, in order.
        duration: seconds.

    Raises:
        DemoError: the report is not of such a request, or not about these frames.
    """
    try:
        video, visual = report["videos"][0], report["visual_tokens"]
        entries = video["per_frame"]
        if len(entries) != len(times):
            raise DemoError(
                f"The server sampled {len(entries)} frames of the video and the demo {len(times)}; "
                "leave its video loader and its limits as they are, or ask for fewer with --frames."
            )
        frames = tuple(
            FrameView(entry["event"], entry["stride"], entry["tokens"], time)
            for entry, time in zip(entries, times, strict=True)
        )
        first, second, third = report["prune_layers"]
        visual_tokens = (
            ("stock", visual["stock"]),
            ("encoded", visual["encoded"]),
            (f"from layer {first}", visual["after_l1"]),
            (f"from layer {second}", visual["after_l2"]),
            (f"from layer {third}", 0),
        )
        return ReportView(
            frames=frames,
            events=_events(frames, {e["event"]: e["key_event"] for e in entries}, duration),
            duration=duration,
            prune_layers=(first, second, third),
            text_tokens=report["text_tokens"],
            visual_tokens=visual_tokens,
            retained=None if "kv_layers" in report else visual["retained"],
            kv_bytes=Amounts(**report["kv_bytes"]),
            prefill_flops=Amounts(**report["prefill_flops"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DemoError(f"The server's METok report is not one that this version understands ({error!r}).") from None


def _events(frames: tuple[FrameView, ...], key: dict[int, bool], duration: float) -> tuple[EventView, ...]:
    events = []
    first = 0
    for last, frame in enumerate(frames):
        ends = last + 1 == len(frames) or frames[last + 1].event != frame.event
        if not ends:
            continue
        members = frames[first : last + 1]
        events.append(
            EventView(
                index=frame.event,
                key=key[frame.event],
                first=first,
                last=last,
                start=(frames[first - 1].time + frames[first].time) / 2 if first else 0.0,
                end=(frames[last].time + frames[last + 1].time) / 2 if last + 1 < len(frames) else duration,
                tokens=sum(member.tokens for member in members),
                strides=tuple(member.stride for member in members),
            )
        )
        first = last + 1
    return tuple(events)
