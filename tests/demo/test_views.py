"""The demo's tables and picture, from reports that the engine's own code made of the demo's own clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from metok_vllm.demo.ask import Answer
from metok_vllm.demo.errors import DemoError
from metok_vllm.demo.model_choice import CLIP
from metok_vllm.demo.tables import bytes_text, plain, render
from metok_vllm.demo.timeline import MOST_THUMBNAILS, draw_timeline
from metok_vllm.demo.video import SampledVideo, load_video
from metok_vllm.demo.view import ReportView, read_report
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings
from tests.support.demo.reports import TEXT_TOKENS, real_report
from tests.support.oracle.samples import Sample

FRAMES = 32
ON, OFF = Answer("Yes.", "id", 379), Answer("No.", "id", 543)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def report(sample: Callable[..., Sample], patch: pytest.MonkeyPatch) -> Any:
    frames = decode_video(CLIP.read_bytes(), VideoSettings(num_frames=FRAMES)).frames
    return real_report(sample(), frames, patch)


@pytest.fixture(scope="module")
def video() -> SampledVideo:
    return load_video(CLIP, FRAMES)


@pytest.fixture(scope="module")
def view(report: Any, video: SampledVideo) -> ReportView:
    return read_report(report, video.times, video.duration)


def rows(text: str) -> list[list[str]]:
    """Cells of every table row in rendered text."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_events_cover_the_video_and_account_for_every_token(report: Any, view: ReportView):
    assert [event.index for event in view.events] == list(range(5))
    assert sum(event.key for event in view.events) == 3
    assert [e.first for e in view.events] == [0, *(e.last + 1 for e in view.events[:-1])]
    assert view.events[-1].last == FRAMES - 1
    assert [e.start for e in view.events] == [0, *(e.end for e in view.events[:-1])]
    assert view.events[-1].end == view.duration == 30
    # The clip's four scene cuts, which METok finds (test_scene_cuts.py), lie within half a sample of these.
    assert [e.end for e in view.events[:-1]] == pytest.approx([1.54, 11.88, 15.75, 23.04], abs=30 / 31 / 2)
    encoded = dict(view.visual_tokens)["encoded"]
    assert sum(event.tokens for event in view.events) == encoded == report["visual_tokens"]["encoded"]
    assert view.text_tokens == TEXT_TOKENS
    assert view.stock_tokens_per_frame == pytest.approx(16, abs=0.1)


def test_the_tables_say_what_the_report_says(report: Any, view: ReportView):
    text = plain(render(view, ON, OFF))
    table = rows(text)
    per_frame = report["videos"][0]["per_frame"]
    for event in view.events:
        mine = [entry for entry in per_frame if entry["event"] == event.index]
        summary = next(row for row in table if row[0] == str(event.index + 1) and row[1] in ("key", "-"))
        assert summary[1] == ("key" if mine[0]["key_event"] else "-")
        assert summary[2] == (f"{event.first}-{event.last}" if len(mine) > 1 else str(event.first))
        assert summary[-1] == str(sum(entry["tokens"] for entry in mine))
        counts = [sum(entry["stride"] == stride for entry in mine) for stride in view.strides]
        assert summary[4:-1] == [str(count) for count in counts]
        strides = next(row for row in table if row[0] == str(event.index + 1) and row[1] not in ("key", "-"))
        assert strides[1].split() == [str(entry["stride"]) for entry in mine]
    amounts = {row[0]: row[1:] for row in table if len(row) == 4}
    assert amounts["prompt tokens (text and video)"] == ["543", "379", "30.2 %"]
    visual = report["visual_tokens"]
    assert amounts["visual tokens encoded"][:2] == [str(visual["stock"]), str(visual["encoded"])]
    assert amounts["visual tokens from layer 1"][1] == str(visual["after_l1"])
    assert amounts["visual tokens from layer 3"][1] == str(visual["after_l2"])
    assert amounts["visual tokens from layer 5"][1:] == ["0", "100.0 %"]
    kv = report["kv_bytes"]
    saved = f"{100 - 100 * kv['metok'] / kv['stock']:.1f} %"
    assert amounts["KV cache of the prompt"] == [bytes_text(kv["stock"]), bytes_text(kv["metok"]), saved]


def test_an_answer_is_shown_as_it_is_and_obeys_nothing(view: ReportView):
    text = plain(render(view, Answer("[red]one[/red] \x1b[2Jtwo", "id", 1), Answer("", "id", 1)))
    assert "[red]one[/red] \ufffd[2Jtwo" in text
    assert "(no words)" in text


def test_the_picture_shows_the_frames_and_the_events(view: ReportView, video: SampledVideo, tmp_path: Path):
    path = tmp_path / "a.png"
    draw_timeline(view, video, r"What costs $\frac{5$?", path)
    picture = imread(path)[..., :3]
    assert picture.shape[1] == 1210
    assert picture.shape[0] > 900
    blank = tmp_path / "b.png"
    white = SampledVideo(video.name, b"", np.full_like(video.thumbnails, 255), video.times, 30.0, True)
    draw_timeline(view, white, r"What costs $\frac{5$?", blank)
    # The film strip shows the frames themselves: white ones make another picture.
    assert (np.abs(imread(blank)[..., :3] - picture).max(-1) > 0.1).mean() > 0.15


@pytest.mark.parametrize(("frames", "settings"), [(1, {}), (3, {}), (7, {"strides": (2, 2, 2), "key_events": 0})])
def test_short_videos_and_odd_settings_are_shown_too(
    sample: Callable[..., Sample], patch: pytest.MonkeyPatch, tmp_path: Path, frames: int, settings: dict[str, Any]
):
    sampled = decode_video(CLIP.read_bytes(), VideoSettings(num_frames=frames)).frames
    report = real_report(sample(), sampled, patch, **settings)
    video = load_video(CLIP, frames)
    view = read_report(report, video.times, video.duration)
    assert len(view.events) == min(5, frames)
    assert plain(render(view, ON, OFF, timed=False)).count("\n") > 20
    draw_timeline(view, video, "Who?" * 60, tmp_path / "a.png")


def test_a_long_sample_shows_every_few_frames(sample: Callable[..., Sample], patch: pytest.MonkeyPatch, tmp_path: Path):
    frames = MOST_THUMBNAILS + 1
    video = load_video(CLIP, frames)
    view = read_report(real_report(sample(), video.thumbnails, patch), video.times, video.duration)
    assert view.strides == (2, 4, 8)
    draw_timeline(view, video, "Who?", tmp_path / "a.png")
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert height < width


@pytest.mark.parametrize("spoil", ["frames", "empty", "keys", "layers"])
def test_a_report_of_something_else_is_refused(report: Any, video: SampledVideo, spoil: str):
    per_frame = report["videos"][0]["per_frame"]
    wrong = {
        "frames": {**report, "videos": [{"per_frame": per_frame[:-1]}]},
        "empty": {},
        "keys": {**report, "videos": [{"per_frame": [{}] * FRAMES}]},
        "layers": {**report, "prune_layers": [1, 2]},
    }[spoil]
    with pytest.raises(DemoError, match=r"^The server"):
        read_report(wrong, video.times, video.duration)


def test_bytes_are_told_in_a_unit_that_fits():
    told = [bytes_text(count) for count in (0, 1023, 1024, 3 * 2**20, 5 * 2**30)]
    assert told == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("frames", "groups", "shown"),
    [
        (8, 4, [0, 2, 4, 6]),
        (7, 4, [0, 2, 4, 6]),
        (8, 8, list(range(8))),
        (8, 5, list(range(8))),
        (8, 0, list(range(8))),
    ],
)
def test_of_frames_that_a_model_takes_in_pairs_the_first_are_shown(frames: int, groups: int, shown: list[int]) -> None:
    video = SampledVideo("a", b"", np.arange(frames, dtype=np.uint8), [float(i) for i in range(frames)], 8.0, True)
    found = video.in_groups(groups)
    assert found.times == shown
    assert found.thumbnails.tolist() == shown
