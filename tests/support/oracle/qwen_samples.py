"""Tiny Qwen2.5-VL and Qwen2-VL checkpoints, and requests for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration
from transformers.video_utils import VideoMetadata

from metok_vllm.demo.qwen3_5_checkpoint import Qwen3_5Kind
from metok_vllm.demo.qwen3_checkpoint import Qwen3Kind
from metok_vllm.demo.qwen_checkpoint import QwenKind, build_qwen_checkpoint
from tests.support.oracle.qwen import LAYOUT, Pixels
from tests.support.oracle.samples import QUESTION, Sample


@dataclass(frozen=True)
class QwenSample(Sample):
    """As `Sample`; videos are frames [F, h, w, 3], or such frames and their metadata."""

    kind: QwenKind | Qwen3Kind | Qwen3_5Kind = "qwen2.5-vl"
    strides: ClassVar[tuple[int, int, int]] = (1, 2, 4)

    def prompt_ids(self, question: str = QUESTION, *, videos: int = 1, images: int = 0, between: str = "") -> list[int]:
        """The chat prompt, one placeholder an item, images first; `between` follows the first video."""
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        place = "<|video_pad|><|vision_end|>"
        return list(self.processor.tokenizer(text.replace(place, place + between, 1)).input_ids)

    def as_sent(self, video: Any) -> Any:
        """Frames without metadata are sent as 2 a second, all of them."""
        if isinstance(video, tuple) or self.kind == "qwen2-vl":
            return video
        count = len(video)
        return video, {
            "fps": 2.0,
            "total_num_frames": count,
            "frames_indices": list(range(count)),
            "duration": count / 2,
            "do_sample_frames": False,
        }

    def looked_at(self, video: Any) -> Any:
        """The first of each pair, where all frames that are sent are taken."""
        return (video[0] if isinstance(video, tuple) else video)[::2]

    def pixels(self, video: Any) -> Any:
        sent = self.as_sent(video)
        if self.kind == "qwen2-vl":
            out = self.processor.video_processor([sent], return_tensors="pt")
            return Pixels(out["pixel_values_videos"], out["video_grid_thw"], None)
        frames, metadata = sent
        known = {key: value for key, value in metadata.items() if key != "do_sample_frames"}
        out = self.processor(
            text="<|video_pad|>", videos=[frames], video_metadata=[VideoMetadata(**known)], return_tensors="pt"
        )
        # float32, as it travels.
        seconds = float(np.float32(out["second_per_grid_ts"][0]))
        return Pixels(out["pixel_values_videos"], out["video_grid_thw"], seconds)

    def image_inputs(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """The HF processor's (pixel_values, image_grid_thw)."""
        out = self.processor.image_processor(pictures, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]


def load_qwen(folder: Path, kind: QwenKind, **shape: Any) -> QwenSample:
    """Build a checkpoint with `build_qwen_checkpoint(folder, kind, **shape)` and load it."""
    path = build_qwen_checkpoint(folder, kind, **shape)
    which: Any = Qwen2VLForConditionalGeneration if kind == "qwen2-vl" else Qwen2_5_VLForConditionalGeneration
    model = which.from_pretrained(path, attn_implementation="eager").eval()
    model.layout = LAYOUT
    return QwenSample(path, model, AutoProcessor.from_pretrained(path), kind)
