"""Tiny models, videos, pictures and prompts for tests that compare two implementations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from metok_vllm.demo.checkpoint import build_checkpoint

QUESTION = "What happens after the band leaves the stage, and who is there?"


@dataclass(frozen=True)
class Sample:
    """A checkpoint on disk, loaded in transformers with eager attention."""

    path: Path
    model: Any
    processor: Any
    strides: ClassVar[tuple[int, int, int]] = (2, 4, 8)  # where nobody says otherwise; the engine must know them

    def prompt_ids(self, question: str = QUESTION, *, videos: int = 1, images: int = 0, between: str = "") -> list[int]:
        """The chat prompt, one placeholder an item, images first; `between` follows the first video."""
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        text = text.replace("<video>", f"<video>{between}", 1)
        return list(self.processor.tokenizer(text).input_ids)

    def question_ids(self, question: str = QUESTION) -> list[int]:
        """The question alone, without special tokens."""
        return list(self.processor.tokenizer(question, add_special_tokens=False).input_ids)

    def as_read(self, ids: list[int]) -> list[int]:
        """`prompt_ids` with what the model has around the placeholders outside of frames."""
        return ids

    def as_sent(self, video: Any) -> Any:
        """A case's video as vLLM is given it."""
        return video

    def looked_at(self, video: Any) -> Any:
        """Of a case's video the frames that an aligner's towers look at, [T, h, w, 3]."""
        return video

    def pixels(self, video: NDArray[np.uint8]) -> Tensor:
        """Pixel values [T, 3, height, width] of frames [T, h, w, 3]."""
        return self.processor.video_processor([video], return_tensors="pt")["pixel_values_videos"][0]

    def image_inputs(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """The HF processor's (pixel_values, image_sizes)."""
        out = self.processor.image_processor(pictures, return_tensors="pt")
        return out["pixel_values"], out["image_sizes"]


def load_sample(folder: Path, **shape: Any) -> Sample:
    """Build a checkpoint with `build_checkpoint(folder, **shape)` and load it."""
    path = build_checkpoint(folder, **shape)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(path, attn_implementation="eager")
    return Sample(path, model.eval(), AutoProcessor.from_pretrained(path))


def scene_video(seed: int, frames: int, scenes: int = 4, side: int = 84) -> NDArray[np.uint8]:
    """Frames [frames, side, side, 3]: `scenes` coarse random pictures of random lengths, slowly changing."""
    rng = np.random.default_rng(seed)
    scenes = min(scenes, frames)
    cuts = np.sort(rng.choice(np.arange(1, frames), size=scenes - 1, replace=False))
    scene_of = np.searchsorted(cuts, np.arange(frames), side="right")
    base = rng.random((scenes, 6, 6, 3))[scene_of]
    coarse = np.clip(base + 0.25 * rng.random((frames, 6, 6, 3)) - 0.1, 0, 1)
    picture = np.kron(coarse, np.ones((1, -(-side // 6), -(-side // 6), 1)))[:, :side, :side]
    return (picture * 255).astype(np.uint8)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A coarse random picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height))


def greedy(sample: Sample, inputs: dict[str, Tensor], steps: int) -> tuple[list[int], Tensor]:
    """`steps` greedy tokens of HF `generate` and their log-probabilities [steps, vocabulary]."""
    with torch.no_grad():
        out = sample.model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0, -steps:].tolist()
    return tokens, torch.cat(out.logits).log_softmax(-1)
