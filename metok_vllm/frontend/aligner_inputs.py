"""The inputs of a dual tower (docs/method.md section 1.3).

An aligner tells how well a frame fits the question. `dual-tower` is the paper's: a paired image and text
tower (SigLIP or CLIP). Its inputs are made here; it runs beside the model's own tower
(`worker/dual_tower.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from metok_vllm.frontend.reasons import reason

FOLDER = "metok_aligner"
"""A dual tower in a folder of this name inside the model's own folder wins over a configured one."""


def aligner_folder(model: str) -> str | None:
    """Path of the aligner inside a model's folder, or None where there is nothing of that name.

    What is there is looked into by `aligner_files.check_aligner`.
    """
    folder = os.path.join(model, FOLDER)
    return folder if os.path.lexists(folder) else None


@contextmanager
def reading(tower: str, part: str) -> Iterator[None]:
    """Any error as one sentence about a part of the checkpoint.

    Raises:
        ValueError: whatever transformers raises, which is what its parsers meet.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"METok: the aligner {tower} cannot be loaded: {part}: {reason(error)}.") from None


class AlignerProcessor:
    """Front-end half of a dual tower: frames to pixels, the question to windows of token ids.

    Raises:
        ValueError: a part of the checkpoint cannot be loaded, in one sentence.
    """

    def __init__(self, tower: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        # Code that lies in the folder is not run.
        with reading(tower, "config.json"):
            config: Any = AutoConfig.from_pretrained(tower, trust_remote_code=False)
            self.window = int(config.text_config.max_position_embeddings)
        with reading(tower, "preprocessor_config.json"):
            images: Any = AutoImageProcessor
            self.image_processor: Any = images.from_pretrained(tower, trust_remote_code=False)
        with reading(tower, "tokenizer"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tower, trust_remote_code=False)
            # SigLIP was trained on windows padded to their full length; CLIP finds the end of the text by
            # itself.
            self.pad_id = self.tokenizer.pad_token_id
            if self.pad_id is None:
                self.pad_id = self.tokenizer.eos_token_id
            self.prefix, self.suffix = self._special_tokens()

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self._encode("a", special=False)
        full = self._encode("a", special=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def reads_nothing(self, text: str) -> bool:
        """Whether every token of a text is the unknown one: some tokenizers load without their vocabulary."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return all(token == unknown for token in self._encode(text, special=False))

    def windows(self, question: str) -> torch.Tensor:
        """Token ids, int64 [windows, window length];
        a question longer than the tower's window is cut into several.
        """
        ids = self._encode(question, special=False)
        room = self.window - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise ValueError(f"windows of {self.window} tokens have no room for text")
        pieces = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
        rows = [[*self.prefix, *piece, *self.suffix] for piece in pieces]
        return torch.tensor([row + [self.pad_id] * (self.window - len(row)) for row in rows], dtype=torch.int64)

    def pixels(self, frames: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Frames as `rgb_frames` takes them, to what the tower takes, `dtype` [T, 3, h, w].

        The tower would round them to its dtype anyway. Rounded here, they are half as large on their way to
        it, as the model's own pixels are.
        """
        # Stated, since transformers would guess the order from each frame's shape, and by another rule for
        # pictures than for videos.
        images = list(rgb_frames(frames))
        outputs = self.image_processor(images=images, input_data_format="channels_first", return_tensors="pt")
        pixels: torch.Tensor = outputs["pixel_values"]
        return pixels.to(dtype)


def rgb_frames(frames: Any) -> torch.Tensor:
    """A video's frames in one order of dimensions, whoever made them.

    Args:
        frames: an array or tensor, [T, H, W, 3] as every video file and list of pictures has them, whatever
            their height and width; else [T, 3, H, W], as `LLM()` takes them too; else grey, [T, 1, H, W] or
            [T, H, W, 1]. Where a shape fits two of these, the first counts.

    Returns:
        [T, 3, H, W], the values and dtype of `frames`.

    Raises:
        ValueError: it is none of these. Stock's own processor comes first and refuses it too.
    """
    video = torch.as_tensor(frames)
    for axis, channels in ((3, 3), (1, 3), (1, 1), (3, 1)):
        if video.ndim == 4 and video.shape[axis] == channels:
            return video.movedim(axis, 1).expand(-1, 3, -1, -1).contiguous()
    raise ValueError(f"a video of shape {tuple(video.shape)} has neither three nor one colour channels.")
