"""Which questions are asked about which videos, and that no video is in both parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from metok_vllm.calibrate.errors import CalibrateError
from metok_vllm.calibrate.questions import GENERIC, choose
from metok_vllm.demo.model_choice import SAMPLE

CLIP = SAMPLE.with_suffix(".mp4")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abcd":
        shutil.copy(CLIP, folder / f"{name}.mp4")
    return folder


def sheet(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps({"video": video, "question": text}) + "\n" for video, text in rows))
    return path


def test_generic_questions_are_split_by_video(videos: Path) -> None:
    (videos / "notes.txt").write_text("no video")
    (videos / "broken.MP4").write_bytes(b"no video either")
    asked = choose(videos, None, 6, held_out=True)
    assert asked.generic
    assert asked.unusable == ("broken.MP4",)
    assert [len(part) for part in (asked.search, asked.held_out)] == [6, 6]
    names = [{Path(one.video).stem for one in part} for part in (asked.search, asked.held_out)]
    assert names == [{"a", "c"}, {"b", "d"}]
    assert {one.question for one in asked.search} <= set(GENERIC)
    assert len({(one.video, one.question) for one in asked.search}) == 6
    assert len({one.question for one in asked.search[:2]}) == 2, "two videos begin with different questions"


def test_one_video_is_in_one_part_whatever_its_names(videos: Path, tmp_path: Path) -> None:
    (videos / "sub").mkdir()
    (videos / "sub" / "e.mp4").symlink_to(videos / "a.mp4")
    asked = choose(videos, None, 99, held_out=True)
    assert {Path(one.video).stem for one in (*asked.search, *asked.held_out)} == set("abcd")
    rows = [("a.mp4", "Who?"), ("sub/../a.mp4", "What?"), ("sub/e.mp4", "Where?"), ("b.mp4", "When?")]
    parts = choose(None, sheet(videos, rows), 9, held_out=True)
    assert [len(part) for part in (parts.search, parts.held_out)] == [3, 1]


def test_a_folders_folders_are_looked_through(videos: Path) -> None:
    (videos / "more" / "of them").mkdir(parents=True)
    shutil.copy(CLIP, videos / "more" / "of them" / "e.MP4")
    asked = choose(videos, None, 99, held_out=False)
    assert {Path(one.video).stem for one in asked.search} == set("abcde")


def test_a_probe_needs_no_second_part(videos: Path) -> None:
    asked = choose(videos, None, 100, held_out=False)
    assert (len(asked.search), asked.held_out) == (4 * len(GENERIC), ())


def test_a_sheets_videos_lie_beside_it_or_in_the_folder(videos: Path, tmp_path: Path) -> None:
    rows = [("a.mp4", "Who?"), ("b.mp4", "What?"), ("a.mp4", "Where?")]
    beside = choose(None, sheet(videos, rows), 9, held_out=True)
    assert [one.question for one in beside.search] == ["Who?", "Where?"]
    assert [one.question for one in beside.held_out] == ["What?"]
    assert not beside.generic
    elsewhere = choose(videos, sheet(tmp_path, rows), 9, held_out=True)
    assert [one.video for one in elsewhere.search] == [one.video for one in beside.search]


def test_a_changed_file_is_another_question(videos: Path) -> None:
    before = choose(videos, None, 1, held_out=False).search[0]
    shutil.copy(SAMPLE, videos / "z.txt")
    assert choose(videos, None, 1, held_out=False).search[0] == before
    (videos / "a.mp4").write_bytes((videos / "a.mp4").read_bytes() + b"\0")
    assert choose(videos, None, 1, held_out=False).search[0] != before


def refused(videos: Path | None, questions: Path | None, held_out: bool = True) -> str:
    with pytest.raises(CalibrateError) as error:
        choose(videos, questions, 8, held_out)
    return str(error.value)


def test_what_cannot_be_measured_is_refused(videos: Path, tmp_path: Path) -> None:
    assert refused(None, None) == (
        "Name the videos to measure on: --videos FOLDER, or --questions FILE that names some."
    )
    assert refused(tmp_path / "gone", None) == f"There is no folder {tmp_path / 'gone'}."
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty, None) == f"There is no video to measure on in {empty}."
    assert refused(None, tmp_path / "no.jsonl") == (
        f"Cannot read the questions {tmp_path / 'no.jsonl'}: No such file or directory."
    )
    missing = refused(None, sheet(tmp_path, [("a.mp4", "Who?")]))
    assert missing.endswith("asked.jsonl names, as a video: No such file or directory.")
    for name in "bcd":
        (videos / f"{name}.mp4").unlink()
    assert refused(videos, None).startswith("There is one video: ")
    assert choose(videos, None, 8, held_out=False).search
