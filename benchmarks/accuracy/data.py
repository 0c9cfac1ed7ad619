"""The questions of the accuracy benchmark: JSON lines, checked line by line before anything runs.

A line is an object with `video` (path, relative to the file), `question`, `answer`, and optionally `options`
(list of texts, maybe empty), `kind` (a name to report by), `of` (a part of a kind to report by too) and
`seed` (of a generated video). Other keys are ignored. `training/make_set.py` writes such files; a set like
Video-MME's is one line a question with its four options and the letter as its answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.questions import LETTERS, format_prompt
from training.seeds import split_of

Group = Literal["letter", "open", "short"]
OPEN_WORDS = 8
"""An answer of this many words or more counts as open."""
HELD_OUT = ("valid", "test", "demo")


class UsageError(ValueError):
    """What was asked for cannot be done; the message is one sentence."""


@dataclass(frozen=True)
class Item:
    """One question about one video."""

    number: int  # from 0, in the order of the file
    video: Path
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str
    seed: int | None = None
    of: str = ""  # what the question is of its kind, empty where the kind says all

    @property
    def prompt(self) -> str:
        """What the user sends beside the video."""
        return format_prompt(self.question, self.options)

    @property
    def group(self) -> Group:
        """Whether the answer is one letter, a sentence, or a few words."""
        if self.options and len(self.answer) == 1:
            return "letter"
        return "open" if len(self.answer.split()) >= OPEN_WORDS else "short"


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read a set; `limit` keeps the first so many questions.

    Raises:
        UsageError: no such file, a line that does not fit, a missing video, a video of the training split, or
            no line at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"The set {path} cannot be read: {reason}.") from None
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(line, len(items), f"{path}, line {number}", path.parent))
    if not items:
        raise UsageError(f"The set {path} holds no question.")
    return items[:limit]


def by_video(items: Sequence[Item]) -> dict[Path, list[Item]]:
    """The items of each video, videos in the order of their first question."""
    grouped: dict[Path, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.video, []).append(item)
    return grouped


def _item(line: str, number: int, where: str, folder: Path) -> Item:
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise UsageError(f"{where}: this is not JSON.") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a line must be a JSON object.")
    for key in ("video", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UsageError(f"{where}: '{key}' must be a text that is not empty.")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UsageError(f"{where}: 'options' must be a list of texts.")
    if len(options) > len(LETTERS):
        raise UsageError(f"{where}: there are {len(options)} options and letters for {len(LETTERS)}.")
    answer = row["answer"].strip()
    letters = LETTERS[: len(options)]
    if options and answer not in tuple(letters):
        raise UsageError(f"{where}: with these options 'answer' must be one of {', '.join(letters)}.")
    kind = row.get("kind", "question")
    if not isinstance(kind, str) or not kind:
        raise UsageError(f"{where}: 'kind' must be a text that is not empty.")
    of = row.get("of", "")
    if not isinstance(of, str):
        raise UsageError(f"{where}: 'of' must be a text.")
    video = folder / row["video"]
    if not video.is_file():
        raise UsageError(f"{where}: there is no video {row['video']} beside the file.")
    return Item(
        number, video, row["question"], tuple(options), answer, kind, _seed(row, where), "" if of == kind else of
    )


def _seed(row: dict[str, Any], where: str) -> int | None:
    """The seed of a generated video, which must be one that no training has seen."""
    seed = row.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"{where}: 'seed' must be a whole number.")
    try:
        split = split_of(seed)
    except ValueError:
        raise UsageError(f"{where}: seed {seed} belongs to no split of the generated videos.") from None
    if split not in HELD_OUT:
        raise UsageError(f"{where}: the video of seed {seed} was trained on, so it can measure nothing.")
    return seed
