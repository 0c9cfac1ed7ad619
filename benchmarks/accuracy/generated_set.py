"""The benchmark's own questions about generated videos: `training/make_set.py`'s,
and more of the two kinds that matter most.

What METok costs shows in one-letter answers (prefill alone gives them) and in sentences (decoding must still
know the video). A set that draws all kinds evenly has too few of either to tell one point from another.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from benchmarks.accuracy.data import UsageError
from training.make_set import row_of, write_set
from training.questions import questions
from training.seeds import SPLITS
from training.world import MAX_FRAMES, MIN_FRAMES, make_video

MIXED = 12
"""Questions of each video over all kinds."""
MORE = {"letter": 4, "open": 2}
"""Questions of each video on top, as far as it has that many different ones."""
NEVER = "train"


def generate(split: str, videos: int, folder: Path) -> Path:
    """Write the first `videos` videos of a held-out split with their questions; returns the JSON lines.

    The same arguments always give the same set. What the folder held is replaced.

    Raises:
        UsageError: the split was trained on, or there is none of that name.
    """
    if split == NEVER or split not in SPLITS:
        held_out = ", ".join(name for name in SPLITS if name != NEVER)
        raise UsageError(f"Questions come from a held-out split ({held_out}), not from '{split}'.")
    shutil.rmtree(folder, ignore_errors=True)
    path = write_set(split, 0, videos, MIXED, folder)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}\n" for line in [*lines, *_more(lines)]), encoding="utf-8")
    return path


def _more(lines: list[str]) -> list[str]:
    """Further questions about the same videos, none of them there already."""
    rows = [json.loads(line) for line in lines]
    there = {(row["video"], row["kind"], row["question"]) for row in rows}
    found = []
    for name, seed in {row["video"]: row["seed"] for row in rows}.items():
        video = make_video(seed, (MIN_FRAMES, MAX_FRAMES))
        for kind, count in MORE.items():
            # Its own stream of choices, so that the questions of `write_set` are not drawn again.
            drawn = questions(video, MIXED, random.Random(f"{seed} {kind}"), (kind,))
            fresh = [q for q in drawn if (name, q.kind, q.text) not in there]
            found += [json.dumps(row_of(name, video, q)) for q in fresh[:count]]
    return found
