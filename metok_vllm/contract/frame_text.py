"""Text inside a video's placeholders: what labels each frame, from the front end to the worker.

A family whose model was trained with such labels states them (`MetokProcessing.frame_text`). Their number is
part of the plan. Where they stand depends on the tiers, so the worker lays them
(`compression/text_layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from metok_vllm.contract.video_plan import VideoPlan


class FrameText(NamedTuple):
    """Token ids around one frame's visual tokens."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


def text_tokens(texts: Sequence[FrameText]) -> int:
    """How many tokens of text that is."""
    return sum(len(text.before) + len(text.behind) for text in texts)


def to_field(texts: Sequence[FrameText]) -> torch.Tensor:
    """int64 [2 T + ids]: how many ids before and behind each of T frames, frame after frame; then the ids."""
    lengths = [len(ids) for text in texts for ids in text]
    return torch.tensor([*lengths, *(token for text in texts for ids in text for token in ids)], dtype=torch.int64)


class LaidText(NamedTuple):
    """A field taken apart."""

    before: torch.Tensor  # int64 [T]
    behind: torch.Tensor  # int64 [T]
    ids: torch.Tensor  # int64 [text tokens], in the order of the prompt


def of_field(field: torch.Tensor, frames: int) -> LaidText:
    """The inverse of `to_field`, on the field's own device and without reading it."""
    lengths = field[: 2 * frames].view(frames, 2)
    return LaidText(lengths[:, 0], lengths[:, 1], field[2 * frames :])


def fits(field: torch.Tensor, plan: VideoPlan, vocabulary: int | None) -> bool:
    """Whether a field on the host is what the plan says, so that laying its text cannot fail.

    Args:
        field: int64, of any shape.
        plan: the video's.
        vocabulary: ids are below it; None where it is not known, and was looked at before.
    """
    numbers = field.flatten().tolist()
    lengths, ids = numbers[: 2 * plan.frames], numbers[2 * plan.frames :]
    return (
        len(lengths) == 2 * plan.frames
        and min(lengths) >= 0
        and sum(lengths) == len(ids) == plan.text_tokens
        and all(token >= 0 and (vocabulary is None or token < vocabulary) for token in ids)
    )
