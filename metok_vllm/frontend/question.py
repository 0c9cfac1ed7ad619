"""The question of a prompt: the text of its last user turn, without the chat template's markers.

At the place where the video's placeholders are laid down only token ids are left, so the turn is found in the
decoded prompt by the strings that a chat template puts around a user's text. Which template that is vLLM
decides, by request (vllm/renderers/hf.py, `resolve_chat_template`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_FIRST, _REPLY, _LAST = "\u2460first\u2460", "\u2461reply\u2461", "\u2462last\u2462"


@dataclass(frozen=True)
class TurnMarkers:
    """Strings that a chat template puts before and after the text of a user's turn;
    empty where it has none.
    """

    start: str
    end: str


NO_MARKERS = TurnMarkers("", "")


def templates_markers(tokenizer: Any, model_config: ModelConfig, chat_template: str | None) -> tuple[TurnMarkers, ...]:
    """Markers of the templates that vLLM may render a request with, the usual one first.

    With ``--chat-template`` that is one. Without it a request with tools is rendered with the tokenizer's
    template, any other with the processor's, and the two may differ.

    Args:
        chat_template: the server's own, a file or a text; None for the checkpoint's.

    Returns:
        None of those that have no markers.

    Raises:
        ValueError, OSError, jinja2.TemplateSyntaxError: a template cannot be read.
    """
    from vllm.renderers.chat_utils import load_chat_template, validate_chat_template
    from vllm.renderers.hf import resolve_chat_template

    validate_chat_template(chat_template)
    given = load_chat_template(chat_template)
    # Any tool will do: what matters is that there is one.
    tool = {"type": "function", "function": {"name": "a", "description": "a", "parameters": {}}}
    found: list[TurnMarkers] = []
    for tools in (None, [tool]):
        template = resolve_chat_template(tokenizer, given, tools, model_config=model_config)
        markers = NO_MARKERS if template is None else turn_markers(tokenizer, template)
        if markers != NO_MARKERS and markers not in found:
            found.append(markers)
    return tuple(found)


def fitting_markers(prompt: str, candidates: Sequence[TurnMarkers]) -> TurnMarkers | None:
    """Those of the template that has rendered a prompt; None if it is none of them."""
    return next((markers for markers in candidates if markers.start.strip() in prompt), None)


def turn_markers(tokenizer: Any, chat_template: str | None = None) -> TurnMarkers:
    """Read a chat template's markers off a short conversation rendered with it.

    Args:
        tokenizer: has `apply_chat_template`.
        chat_template: a template other than the tokenizer's own.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """
    from jinja2 import TemplateSyntaxError

    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        return NO_MARKERS

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
        except TemplateSyntaxError:
            raise
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
    return NO_MARKERS


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
