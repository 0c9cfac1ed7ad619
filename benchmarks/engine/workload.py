"""Frames and prompts: the same for every variant, from seeds alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCENES = 8
OPENING = "What happens after the band leaves the stage, and who is there? "
FILLER = "Answer with the letter of the correct option: (A) singing (B) running (C) cooking (D) sleeping. "


def video(seed: int, frames: int, side: int) -> NDArray[np.uint8]:
    """Frames [frames, side, side, 3]: scenes of different pictures and lengths, each of which changes slowly.

    A video of fewer frames shows the same scenes: it is the longer one, sampled more coarsely.
    """
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.random(SCENES - 1))
    pictures = rng.random((SCENES, 6, 6, 3))
    drift = rng.random((2, 6, 6, 3)) * 0.3
    rows = (np.arange(side) * 6) // side
    out = np.empty((frames, side, side, 3), dtype=np.uint8)
    for index in range(frames):
        at = (index + 0.5) / frames
        coarse = pictures[np.searchsorted(cuts, at)] + drift[0] * np.sin(7 * at) + drift[1] * np.cos(11 * at)
        out[index] = (np.clip(coarse / 1.6, 0, 1) * 255).astype(np.uint8)[rows][:, rows]
    return out


def prompt_ids(folder: Path, text_tokens: int) -> list[int]:
    """A chat turn with one video and a question, about `text_tokens` tokens long without the video."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(question: str) -> list[int]:
        turn = f"<|im_start|>user <video>\n{question.strip()}<|im_end|><|im_start|>assistant\n"
        return list(tokenizer(turn).input_ids)

    question = OPENING
    while len(ids(question + FILLER)) <= text_tokens + 1:
        question += FILLER
    return ids(question)
