"""The question of a prompt: the text of its last user turn, without the chat template's markers.

At the place where the video's placeholders are laid down only token ids are left, so the turn is found in the
decoded prompt by the strings that the model's own chat template puts around a user's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_FIRST, _REPLY, _LAST = "\u2460first\u2460", "\u2461reply\u2461", "\u2462last\u2462"


@dataclass(frozen=True)
class TurnMarkers:
    """Strings that a chat template puts before and after the text of a user's turn;
    empty where it has none.
    """

    start: str
    end: str


def turn_markers(tokenizer: Any, chat_template: str | None = None) -> TurnMarkers:
    """Read a chat template's markers off a short conversation rendered with it.

    Args:
        tokenizer: has `apply_chat_template`.
        chat_template: a template other than the tokenizer's own.
    """
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        return TurnMarkers("", "")

    def part(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    def render(as_parts: bool) -> str:
        turns = [("user", _FIRST), ("assistant", _REPLY), ("user", _LAST)]
        messages = [{"role": role, "content": part(text) if as_parts else text} for role, text in turns]
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    # Plain text first: a template that takes only text would print a list of parts as Python writes it.
    for as_parts in (False, True):
        try:
            text = render(as_parts)
        except Exception:  # a template written for the other form of content raises whatever Jinja meets
            continue
        positions = [text.find(mark) for mark in (_FIRST, _REPLY, _LAST)]
        if -1 in positions or sorted(positions) != positions:
            continue
        before_first = text[: positions[0]]
        before_last = text[positions[1] + len(_REPLY) : positions[2]]
        after_first = text[positions[0] + len(_FIRST) : positions[1]]
        after_last = text[positions[2] + len(_LAST) :]
        return TurnMarkers(_common_suffix(before_first, before_last), _common_prefix(after_first, after_last))
    return TurnMarkers("", "")


def _common_prefix(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]


def last_user_text(prompt: str, markers: TurnMarkers, remove: tuple[str, ...]) -> str:
    """The question in a rendered prompt.

    Args:
        prompt: the prompt as text, markers and placeholders included.
        markers: of the model's chat template; with empty markers the whole prompt is the turn.
        remove: strings that are not text of the user: placeholders and special tokens.
    """
    turn = prompt
    start = markers.start.strip()
    if start and start in turn:
        turn = turn[turn.rindex(start) + len(start) :]
    end = markers.end.strip()
    if end and end in turn:
        turn = turn[: turn.index(end)]
    for piece in remove:
        turn = turn.replace(piece, " ")
    return " ".join(turn.split())
