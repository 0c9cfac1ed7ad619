"""Where the question's own tokens stand in a prompt: the rows that score with `score_rows` "question".

The prompt has only token ids at that place, and its items' placeholders are laid down. So the text between
the items is decoded token by token, which says what characters each token stands for, and the turn is found
in it as `question.py` finds it. Where that cannot be told exactly, nothing is guessed: all text scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from metok_vllm.frontend.question import TurnMarkers

ITEM = "\uffff"
"""Stands for an image or a video in the decoded prompt: no character of any text."""

MOST_TOKENS = 16384
"""More text than this behind the first video is not looked through."""

_LONGEST_CHARACTER = 8  # tokens; a character that is not complete by then is none
_INCOMPLETE = "\ufffd"

Runs = list[tuple[int, int]]
"""First position, one past the last."""


def text_runs(length: int, items: Sequence[tuple[int, int]]) -> Runs:
    """Runs of a prompt's positions around its items: one before each and one behind the last; some empty.

    Args:
        length: tokens of the prompt.
        items: first position and number of tokens of each image and video, ascending.
    """
    starts = [0, *(offset + tokens for offset, tokens in items)]
    return list(zip(starts, [*(offset for offset, _ in items), length], strict=True))


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, Runs] | None:
    """A run of tokens as text, and the characters that each of them stands for.

    Tokens that make one character together all stand for it. None where the tokenizer does not decode piece
    by piece what it decodes in one.
    """

    def decoded(first: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[first:end]), skip_special_tokens=False))

    # As vLLM's own detokenizer does: a window that starts one token earlier, since some tokenizers leave the
    # space in front of the first token out.
    text, spans, first, done, before = "", Runs(), 0, 0, ""
    for end in range(1, len(ids) + 1):
        window = decoded(first, end)
        if window.endswith(_INCOMPLETE) and end < len(ids) and end - done < _LONGEST_CHARACTER:
            continue
        if not window.startswith(before):
            return None
        added = window[len(before) :]
        spans += [(len(text), len(text) + len(added))] * (end - done)
        text += added
        first, done = done, end
        before = decoded(first, done)
    return (text, spans) if text == decoded(0, len(ids)) else None


def question_parts(text: str, markers: TurnMarkers | None, remove: Sequence[str], query: str | None) -> Runs:
    """The characters of the question in a decoded prompt, as runs without what stands between them.

    Args:
        text: the prompt, with `ITEM` for every image and video.
        markers: of the template that rendered it; None, or without a start, if that is not known.
        remove: strings that are not text of the user, such as special tokens.
        query: the question that the request states, where the last user turn is not it.

    Returns:
        Nothing where the question is not found.
    """
    if query is not None:
        wanted = query.strip()
        at = text.rfind(wanted) if wanted else -1
        return [(at, at + len(wanted))] if at >= 0 else []
    start = "" if markers is None else markers.start.strip()
    if markers is None or not start or start not in text:
        return []
    begin = text.rindex(start) + len(start)
    end = text.find(markers.end.strip(), begin) if markers.end.strip() else -1
    turn = text[begin : end if end >= 0 else len(text)]
    between = "|".join(re.escape(piece) for piece in (*remove, ITEM) if piece)
    edges = [0, *(edge for match in re.finditer(between, turn) for edge in match.span()), len(turn)]
    parts = []
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        piece = turn[first:last]
        if piece.strip():
            first += len(piece) - len(piece.lstrip())
            parts.append((begin + first, begin + first + len(piece.strip())))
    return parts


def question_rows(
    ids: Sequence[int],
    items: Sequence[tuple[int, int]],
    last_video_end: int,
    tokenizer: Any,
    markers: TurnMarkers | None,
    remove: Sequence[str],
    query: str | None = None,
) -> tuple[int, ...]:
    """Positions of the question's own tokens behind the first item.

    A token that holds a part of the question and something else is the question's.

    Args:
        ids: of the prompt, placeholders included.
        items: first position and number of tokens of each image and video, ascending, at least one.
        last_video_end: one past the last video's last token.
        tokenizer: the model's.
        markers: as of `question_parts`.
        remove: as of `question_parts`.
        query: as of `question_parts`.

    Returns:
        Ascending; nothing where they cannot be told, or none of them stands behind the last video.
    """
    runs = text_runs(len(ids), items)
    if sum(end - start for start, end in runs[1:]) > MOST_TOKENS:
        return ()
    start, end = runs[0]
    text = str(tokenizer.decode(list(ids[start:end]), skip_special_tokens=False))
    places: list[tuple[int, tuple[int, int]]] = []  # position, characters
    for start, end in runs[1:]:
        found = token_spans(tokenizer, ids[start:end])
        if found is None:
            return ()
        text += ITEM
        places += [(p, (a + len(text), b + len(text))) for p, (a, b) in zip(range(start, end), found[1], strict=True)]
        text += found[0]
    parts = question_parts(text, markers, remove, query)
    rows = tuple(p for p, (a, b) in places if any(a < last and b > first for first, last in parts))
    return rows if rows and rows[-1] >= last_video_end else ()
