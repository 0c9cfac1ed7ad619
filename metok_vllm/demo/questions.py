"""Questions of the demo: stated by the user, or read from a file that may know the right answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic

from metok_vllm.demo.errors import DemoError


@dataclass(frozen=True)
class DemoQuestion:
    """What the user's turn says, and the right answer where somebody knows it."""

    prompt: str
    answer: str | None = None


class _Row(pydantic.BaseModel):
    """A line of a file of questions, as `training/make_set.py` writes it;
    what else it holds is not read here.
    """

    video: str
    question: str = ""
    prompt: str = ""  # where the question has options, they are in here
    options: list[str] = []
    answer: str | None = None


def load_questions(path: Path, video: Path | None) -> tuple[Path, list[DemoQuestion]]:
    """The video to ask about and its questions.

    Args:
        path: JSON lines of ``video`` (relative to the file), ``question`` or ``prompt``, and perhaps
            ``answer``.
        video: ask about this file, with the lines that name it; None: about the first line's.

    Raises:
        DemoError: the file cannot be read, a line is not what it must be, or none is about the video.
    """
    rows = _rows(path)
    name = video.name if video else rows[0].video if rows else ""
    chosen = [row for row in rows if Path(row.video).name == Path(name).name]
    if not chosen:
        raise DemoError(f"The file {path} holds no question" + (f" about {name}." if name else "."))
    return video or path.parent / name, [DemoQuestion(row.prompt or row.question, row.answer) for row in chosen]


def load_lines(path: Path) -> list[tuple[str, str]]:
    """Every line's video, as it stands there, and what is asked about it. Raises as `load_questions`."""
    return [(row.video, row.prompt or row.question) for row in _rows(path)]


def _rows(path: Path) -> list[_Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DemoError(f"Cannot read the questions {path}: {reason}.") from None
    return [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _row(path: Path, number: int, line: str) -> _Row:
    try:
        row = _Row.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DemoError(
            f"Line {number} of {path} is no question: {where + ': ' if where else ''}{first['msg']}."
        ) from None
    if not (row.prompt or row.question).strip():
        raise DemoError(f"Line {number} of {path} asks nothing.")
    if row.options and not row.prompt:
        raise DemoError(f'Line {number} of {path} has options: state "prompt", the question with its options as asked.')
    return row
