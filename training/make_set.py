"""Write videos of a split as mp4 files, with their questions as JSON lines for the benchmark.

Usage::

    python -m training.make_set --split test --videos 100 --questions 12 --out out/test
    python -m training.make_set --split demo --videos 1 --scale 4 --out out/demo

Every line is what :func:`row_of` gives.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from training.draw import draw_video
from training.questions import KINDS, Question, form, questions
from training.seeds import SPLITS, seed_of
from training.video_file import write_mp4
from training.world import MAX_FRAMES, MIN_FRAMES, Video, make_video


def write_set(
    split: str,
    first: int,
    videos: int,
    per_video: int,
    out: Path,
    scale: int = 1,
    frames: tuple[int, int] = (MIN_FRAMES, MAX_FRAMES),
) -> Path:
    """Write the set; returns the path of ``questions.jsonl``. The same arguments write the same questions."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "questions.jsonl"
    with path.open("w") as sheet:
        for index in range(first, first + videos):
            video = make_video(seed_of(split, index), frames)
            name = f"{split}_{index:05d}.mp4"
            write_mp4(draw_video(video), out / name, scale=scale)
            for q in questions(video, per_video, random.Random(video.seed), KINDS):
                sheet.write(json.dumps(row_of(name, video, q)) + "\n")
    return path


def row_of(name: str, video: Video, q: Question) -> dict[str, Any]:
    """A line of a set. ``prompt`` is the question with its options as the model was trained to read them,
    ``of`` what a letter stands for or a sentence tells of, ``about`` the frames that must be seen to answer.
    """
    return {
        "video": name,
        "question": q.text,
        "prompt": q.prompt,
        "options": list(q.options),
        "answer": q.answer,
        "kind": q.kind,
        "of": form(q),
        "about": [list(span) for span in q.about],
        "seed": video.seed,
        "frames": video.frames,
    }


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--split", choices=sorted(SPLITS), default="test")
    ap.add_argument("--first", type=int, default=0)
    ap.add_argument("--videos", type=int, default=100)
    ap.add_argument("--questions", type=int, default=12, help="of each video")
    ap.add_argument("--frames", type=int, nargs=2, default=(MIN_FRAMES, MAX_FRAMES), metavar=("LEAST", "MOST"))
    ap.add_argument("--scale", type=int, default=1, help="enlarge for watching")
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    there = len(SPLITS[args.split])
    if args.first < 0 or args.videos < 1 or args.first + args.videos > there:
        ap.error(f"split {args.split} has the videos 0 to {there - 1}")
    frames = (args.frames[0], args.frames[1])
    print(write_set(args.split, args.first, args.videos, args.questions, args.out, args.scale, frames))


if __name__ == "__main__":
    main()
