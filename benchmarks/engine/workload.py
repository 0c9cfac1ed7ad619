"""Frames and prompts: the same for every variant, from seeds alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCENES = 8
OPENING = "What happens after the band leaves the stage, and who is there? "
FILLER = "Answer with the letter of the correct option: (A) singing (B) running (C) cooking (D) sleeping. "


SOURCE_RATE = 24
"""Frames a second of the file that the frames are said to be from."""
SAMPLED_RATE = 2
"""Frames a second that a variant with all frames takes of it, as Qwen's processors do."""


def video(seed: int, frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Frames [frames, height, width, 3]: scenes of different pictures and lengths, each changing slowly.

    A video of fewer frames shows the same scenes: it is the longer one, sampled more coarsely.
    """
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.random(SCENES - 1))
    pictures = rng.random((SCENES, 6, 6, 3))
    drift = rng.random((2, 6, 6, 3)) * 0.3
    rows, columns = (np.arange(height) * 6) // height, (np.arange(width) * 6) // width
    out = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        at = (index + 0.5) / frames
        coarse = pictures[np.searchsorted(cuts, at)] + drift[0] * np.sin(7 * at) + drift[1] * np.cos(11 * at)
        out[index] = (np.clip(coarse / 1.6, 0, 1) * 255).astype(np.uint8)[rows][:, columns]
    return out


def times(frames: int, whole: int) -> dict[str, Any]:
    """When the frames of a video are, as vLLM's loaders say it.

    `frames` are taken of a video that all variants but one take `whole` of.
    """
    total = whole * SOURCE_RATE // SAMPLED_RATE
    indices = [int((index + 0.5) / frames * total) for index in range(frames)]  # as `video` places them
    return {
        "fps": float(SOURCE_RATE),
        "duration": total / SOURCE_RATE,
        "total_num_frames": total,
        "frames_indices": indices,
        "do_sample_frames": False,
    }


def prompt_ids(folder: Path, text_tokens: int, turn: str) -> list[int]:
    """A chat turn with one video and a question, about `text_tokens` tokens long without the video.

    `turn` is the family's, with {question} in it.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(question: str) -> list[int]:
        return list(tokenizer(turn.format(question=question.strip())).input_ids)

    question = OPENING
    while len(ids(question + FILLER)) <= text_tokens + 1:
        question += FILLER
    return ids(question)
