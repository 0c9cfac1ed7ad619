"""Tiny InternVL3 checkpoints and requests for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, InternVLForConditionalGeneration

from metok_vllm.demo.internvl_checkpoint import build_internvl_checkpoint
from tests.support.oracle.internvl import LAYOUT, Pixels
from tests.support.oracle.samples import QUESTION, Sample


@dataclass(frozen=True)
class InternVLSample(Sample):
    """As `Sample`; its pictures start with what transformers calls the image token."""

    strides: ClassVar[tuple[int, int, int]] = (1, 2, 4)

    def prompt_ids(self, question: str = QUESTION, *, videos: int = 1, images: int = 0, between: str = "") -> list[int]:
        """The chat prompt, one placeholder an item, images first; `between` follows the first video."""
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return list(self.processor.tokenizer(text.replace("<video>", f"<video>{between}", 1)).input_ids)

    def as_read(self, ids: list[int]) -> list[int]:
        """With the marks around each picture."""
        picture, start, end = self.processor.image_token_ids
        return [one for token in ids for one in ((start, token, end) if token == picture else (token,))]

    def pixels(self, video: Any) -> Any:
        out = self.processor(text="<video>", videos=[video], return_tensors="pt")
        return Pixels(out["pixel_values"], self.text_of(out["input_ids"][0].tolist()))

    def text_of(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Of a video as transformers writes it out, the text before and behind each frame's visual tokens."""
        end = self.processor.end_image_token_id
        found: list[tuple[list[int], list[int]]] = []
        before: list[int] = []
        for token in ids:
            if token == end:
                found.append((before, [token]))
                before = []
            elif token != self.processor.image_token_id:
                before.append(token)
        return found

    def image_inputs(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """The HF processor's (pixel_values, num_patches), as it cuts pictures in a prompt."""
        out = self.processor.image_processor(pictures, crop_to_patches=True, return_tensors="pt")
        return out["pixel_values"], out["num_patches"]


def load_internvl(folder: Path, *args: Any, **shape: Any) -> InternVLSample:
    """Build a checkpoint with `build_internvl_checkpoint(folder, ...)` and load it."""
    path = build_internvl_checkpoint(folder, *args, **shape)
    model: Any = InternVLForConditionalGeneration.from_pretrained(path, attn_implementation="eager").eval()
    processor: Any = AutoProcessor.from_pretrained(path)
    model.layout = LAYOUT
    model.config.video_token_id = processor.tokenizer.convert_tokens_to_ids("<video>")
    return InternVLSample(path, model, processor)
