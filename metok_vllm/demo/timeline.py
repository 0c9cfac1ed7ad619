"""A picture of what METok made of a video: its events in time,
its frames as finely as they are kept, the tokens.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from metok_vllm.demo.video import SampledVideo
from metok_vllm.demo.view import EventView, ReportView

MOST_THUMBNAILS = 128
"""A longer sample shows every second, third, ... frame in the film strip; the bars show all."""

_WIDTH = 11.0  # inches: what a README shows without shrinking the text
_MARGIN = 0.45
_CAPTION = 0.26  # inches under each thumbnail
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7B4FA3", "#8C564B")
"""Colours that stay apart for colour-blind eyes; events take them in turn."""
_INK, _GREY = "#222222", "#8A8A8A"
_SIZES = (1.0, 0.72, 0.5)
"""Sides of a thumbnail at the finest, the middle and the coarsest stride, as shares of its cell."""


def draw_timeline(view: ReportView, video: SampledVideo, question: str, path: Path) -> None:
    """Draw `view` with the frames of `video` into the PNG file `path`.

    Raises:
        OSError: the file cannot be written.
    """
    shown = list(range(0, len(view.frames), -(-len(view.frames) // MOST_THUMBNAILS)))
    widest = min(max(math.ceil(math.sqrt(2.2 * len(shown))), 8), 16)
    columns = max(8, -(-len(shown) // -(-len(shown) // widest)))  # rows of about equal length
    cell = (_WIDTH - 2 * _MARGIN) / columns
    height, width = video.thumbnails.shape[1:3]
    row = min(cell * height / width, 1.6 * cell) + _CAPTION
    strip = -(-len(shown) // columns) * row
    title, charts = 0.95, 2.7
    total = title + charts + 0.55 + strip + 0.3
    figure = Figure(figsize=(_WIDTH, total), facecolor="white")
    FigureCanvasAgg(figure)

    def area(left: float, top: float, wide: float, high: float) -> Any:
        """Axes at a place in inches, from the upper left corner."""
        return figure.add_axes((left / _WIDTH, 1 - (top + high) / total, wide / _WIDTH, high / total))

    _title(figure, view, video, question, total)
    split = _WIDTH * 0.72
    band = area(_MARGIN + 0.25, title, split - _MARGIN - 0.25, 0.42)
    _event_band(band, view)
    bars = area(_MARGIN + 0.25, title + 0.5, split - _MARGIN - 0.25, charts - 0.85)
    _token_bars(bars, view, video)
    _visual_tokens(area(split + 1.35, title + 0.15, _WIDTH - split - 1.35 - _MARGIN, charts - 0.5), view)
    film = area(_MARGIN, title + charts + 0.5, _WIDTH - 2 * _MARGIN, strip)
    _film_strip(film, view, video, shown, (columns, cell, row))
    figure.savefig(path, dpi=110)


def _colour(event: EventView | int) -> str:
    index = event if isinstance(event, int) else event.index
    return _COLOURS[index % len(_COLOURS)]


def _title(figure: Figure, view: ReportView, video: SampledVideo, question: str, total: float) -> None:
    left = _MARGIN / _WIDTH
    key = sum(event.key for event in view.events)
    figure.text(
        left,
        1 - 0.36 / total,
        textwrap.shorten(f"\u201c{question}\u201d", 110, placeholder=" \u2026\u201d"),
        fontsize=15,
        fontweight="bold",
        color=_INK,
        va="center",
        parse_math=False,
    )
    figure.text(
        left,
        1 - 0.68 / total,
        f"{video.name}: {len(view.frames)} frames in {len(view.events)} events, {key} of them key.  "
        f"Prompt KV cache {100 * view.kv_bytes.saved:.1f} % smaller, prefill work "
        f"{100 * view.prefill_flops.saved:.1f} % less.",
        fontsize=11,
        color=_INK,
        va="center",
        parse_math=False,
    )


def _event_band(axes: Any, view: ReportView) -> None:
    """The events over time."""
    for event in view.events:
        width = event.end - event.start
        axes.add_patch(Rectangle((event.start, 0), width, 1, linewidth=1.5, **_fill(event)))
        share = width / view.duration
        label = f"event {event.index + 1}" + (" (key)" if event.key else "")
        if share < 0.1:
            label = str(event.index + 1)
        if share > 0.012:
            box = None if event.key else {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(
                event.start + width / 2,
                0.5,
                label,
                ha="center",
                va="center",
                fontsize=10,
                color="white" if event.key else _colour(event),
                fontweight="bold",
                bbox=box,
            )
    axes.set(xlim=_time_limits(view), ylim=(0, 1))
    axes.axis("off")


def _fill(event: EventView) -> dict[str, Any]:
    """Key events are filled, others hatched."""
    colour = _colour(event)
    if event.key:
        return {"facecolor": colour, "edgecolor": colour}
    return {"facecolor": "white", "edgecolor": colour, "hatch": "////"}


def _time_limits(view: ReportView) -> tuple[float, float]:
    """The time axis: half a bar more than the video at both ends,
    where the first and the last frame stand.
    """
    half = view.duration / len(view.frames) / 2
    return -half, view.duration + half


def _token_bars(axes: Any, view: ReportView, video: SampledVideo) -> None:
    """Tokens of every frame over time, against what the stock model takes."""
    spacing = view.duration / len(view.frames)
    for event in view.events:
        for frame in view.frames[event.first : event.last + 1]:
            axes.bar(frame.time, frame.tokens, width=0.78 * spacing, linewidth=1, **_fill(event))
    stock = view.stock_tokens_per_frame
    low, high = _time_limits(view)
    axes.axhline(stock, color=_INK, linewidth=1.2, linestyle=(0, (5, 3)))
    top = 1.3 * max(stock, *(frame.tokens for frame in view.frames))
    axes.text(
        high, 0.97 * top, f"dashed: METok off, {stock:.0f} a frame", ha="right", va="top", fontsize=9.5, color=_INK
    )
    axes.set(xlim=(low, high), ylim=(0, top))
    axes.set_ylabel("tokens of a frame", color=_INK)
    axes.set_xlabel("seconds" if video.timed else "frame of the video", color=_INK)
    _quiet(axes)


def _visual_tokens(axes: Any, view: ReportView) -> None:
    """Visual tokens along the request's way, as horizontal bars."""
    rows = list(view.visual_tokens)
    if view.retained is not None:
        rows.append(("kept for decoding", view.retained))
    names = ["METok off", "after stage 1", *(name for name, _ in rows[2:])]
    most = max(count for _, count in rows)
    for place, (_, count) in enumerate(rows):
        axes.barh(place, count, color=_GREY if place == 0 else _COLOURS[0], height=0.62)
        axes.text(count + 0.02 * most, place, str(count), va="center", fontsize=10, color=_INK)
    axes.set_yticks(range(len(rows)), names, fontsize=10)
    axes.set(xlim=(0, 1.2 * most), ylim=(len(rows) - 0.4, -0.6), xticks=[])
    axes.set_title("visual tokens", fontsize=11, color=_INK, loc="left")
    _quiet(axes)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)


def _film_strip(
    axes: Any, view: ReportView, video: SampledVideo, shown: list[int], layout: tuple[int, float, float]
) -> None:
    """Thumbnails in order of time, the larger the finer they are kept, framed in the colour of their event.

    `layout`: cells in a row, width of a cell, height of a row.
    """
    columns, cell, row = layout
    height, width = video.thumbnails.shape[1:3]
    room = row - _CAPTION
    for place, number in enumerate(shown):
        frame = view.frames[number]
        x, y = place % columns * cell, place // columns * row
        colour = _colour(frame.event)
        # The cell's ground carries the event from frame to frame.
        axes.add_patch(Rectangle((x, y), cell, row, facecolor=colour, alpha=0.16))
        size = _SIZES[min(view.strides.index(frame.stride), 2)]
        scale = 0.94 * min(cell / width, room / height) * size
        w, h = scale * width, scale * height
        left, top = x + (cell - w) / 2, y + 0.05 + (room - h) / 2
        axes.imshow(video.thumbnails[number], extent=(left, left + w, top + h, top), interpolation="antialiased")
        axes.add_patch(Rectangle((left, top), w, h, fill=False, edgecolor=colour, linewidth=2))
        when = f"{frame.time:.1f} s" if video.timed else f"#{frame.time:.0f}"
        label = f"{when}  \u00b7  {frame.tokens}"
        middle = y + row - _CAPTION / 2 + 0.02
        axes.text(x + cell / 2, middle, label, ha="center", va="center", fontsize=9, color=_INK)
    axes.set(xlim=(0, columns * cell), ylim=(-(-len(shown) // columns) * row, 0), aspect="auto")
    axes.axis("off")
    every = shown[1] - shown[0] if len(shown) > 1 else 1
    some = "" if every == 1 else f", one of every {every}"
    axes.text(
        0,
        -0.15,
        f"Sampled frames{some}: time \u00b7 tokens.  Larger is finer: stride {', '.join(map(str, view.strides))}.  "
        "Colour: event; above, key events are filled and others hatched.",
        fontsize=10.5,
        color=_INK,
        va="center",
    )


def _quiet(axes: Any) -> None:
    """Take away what does not inform."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#BBBBBB")
    axes.tick_params(colors=_INK, labelsize=9.5)
