"""Text of a model's own right behind its videos' places in a prompt, such as when their frames are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def with_text_behind(prompt: Sequence[int], place: int, texts: Sequence[str], tokenizer: Any) -> list[int]:
    """The prompt with a text after the place of each video, on a line of its own.

    Line ends that follow are tokenized once more with it, since a full stop and the end of its line may be
    one token. All other tokens stay what they were.

    Args:
        prompt: ids, one place a video.
        place: the id that stands for a video.
        texts: of each video, in order; empty where nothing is told. Places behind the last are left alone.
        tokenizer: the model's.
    """
    ids: list[int] = []
    video, at = 0, 0
    while at < len(prompt):
        ids.append(prompt[at])
        at += 1
        if ids[-1] != place or video >= len(texts):
            continue
        text = texts[video]
        video += 1
        if not text:
            continue
        ends = ""
        while at < len(prompt) and (piece := str(tokenizer.decode([prompt[at]]))) and not piece.strip("\r\n"):
            ends += piece
            at += 1
        ids += tokenizer.encode(f"\n{text}{ends or chr(10)}", add_special_tokens=False)
    return ids
