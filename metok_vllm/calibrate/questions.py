"""The user's videos and questions, split by video into those that the search sees and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from metok_vllm.calibrate.errors import CalibrateError
from metok_vllm.calibrate.jobs import Asked
from metok_vllm.demo.errors import DemoError
from metok_vllm.demo.questions import load_lines
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoError, VideoSettings

GENERIC = (
    "Describe the video.",
    "What happens in this video?",
    "Who or what is in this video?",
    "Where does this video take place?",
    "What happens at the beginning of the video?",
    "What happens at the end of the video?",
    "What changes in the course of the video?",
    "In which order do things happen in this video?",
)
"""What is asked of every video where the user has no questions."""

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


@dataclass(frozen=True)
class Questions:
    """What is asked. No video is in both parts."""

    search: tuple[Asked, ...]
    held_out: tuple[Asked, ...]
    generic: bool
    unusable: tuple[str, ...] = ()  # files of the folder that are no videos


def choose(videos: Path | None, sheet: Path | None, most: int, held_out: bool) -> Questions:
    """At most `most` questions in each part.

    Args:
        videos: folder of video files, in folders of it too; with a sheet, where its videos are looked for if
            they are not beside it.
        sheet: JSON lines of ``video`` and ``question`` (or ``prompt``).
        most: questions in a part.
        held_out: whether a second part is wanted.

    Raises:
        CalibrateError: there is nothing to ask about, or too little.
    """
    if videos is None and sheet is None:
        raise CalibrateError("Name the videos to measure on: --videos FOLDER, or --questions FILE that names some.")
    if videos is not None and not videos.is_dir():
        raise CalibrateError(f"There is no folder {videos}.")
    unusable: list[str] = []
    if sheet is None:
        assert videos is not None
        by_video = {}
        for path in _files(videos):
            if fault(path):
                unusable.append(path.name)
            else:
                by_video[path] = list(GENERIC)
    else:
        by_video = _of_sheet(sheet, videos)
    if not by_video:
        raise CalibrateError(f"There is no video to measure on in {videos or sheet}.")
    if held_out and len(by_video) < 2:
        raise CalibrateError("There is one video: calibration needs two or more, so that some can be held out.")
    paths = list(by_video)
    parts = (paths[::2], paths[1::2]) if held_out else (paths, [])
    search, other = (_in_turn([_asked(path, by_video[path]) for path in part], most) for part in parts)
    return Questions(search, other, sheet is None, tuple(unusable))


def _of_sheet(sheet: Path, videos: Path | None) -> dict[Path, list[str]]:
    try:
        lines = load_lines(sheet)
    except DemoError as error:
        raise CalibrateError(str(error)) from None
    by_video: dict[Path, list[str]] = {}
    for name, question in lines:
        beside = sheet.parent / name
        path = videos / Path(name).name if videos is not None and not beside.is_file() else beside
        by_video.setdefault(path.resolve(), []).append(question)  # one video is one, whatever its name
    for path in by_video:
        if why := fault(path):
            raise CalibrateError(f"Cannot use {path}, which {sheet} names, as a video: {why}")
    return by_video


def _files(videos: Path) -> list[Path]:
    """The folder's video files in the order of their paths, each once, however many links lead to it."""
    named = sorted(one for one in videos.rglob("*") if one.suffix.lower() in SUFFIXES)
    return list(dict.fromkeys(one.resolve() for one in named))


def fault(path: Path) -> str:
    """Why a file is no video that the plugin can read; empty where it is one."""
    try:
        decode_video(path.read_bytes(), VideoSettings(num_frames=2))
    except OSError as error:
        return f"{error.strerror or error}."
    except VideoError as error:
        return str(error)
    return ""


def _asked(path: Path, questions: Sequence[str]) -> list[Asked]:
    told = path.stat()
    mark = f"{told.st_size} {told.st_mtime_ns}"
    return [Asked(video=str(path.resolve()), question=question, video_mark=mark) for question in questions]


def _in_turn(by_video: Sequence[Sequence[Asked]], most: int) -> tuple[Asked, ...]:
    """One question of every video, then a second of every video, and so on.

    The n-th video starts at its n-th question, so that generic ones differ from video to video.
    """
    turned = [[*qs[i % len(qs) :], *qs[: i % len(qs)]] for i, qs in enumerate(by_video) if qs]
    return tuple(one for row in zip_longest(*turned) for one in row if one is not None)[:most]
