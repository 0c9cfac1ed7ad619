"""Tiny Qwen3-VL checkpoints, dense and with experts, and requests for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration
from transformers.video_utils import VideoMetadata

from metok_vllm.demo.qwen3_checkpoint import Qwen3Kind, build_qwen3_checkpoint
from tests.support.oracle.qwen3 import LAYOUT, Pixels
from tests.support.oracle.qwen_samples import QwenSample


@dataclass(frozen=True)
class Qwen3Sample(QwenSample):
    """As `QwenSample`; every video has its frames' times."""

    def pixels(self, video: Any) -> Pixels:
        frames, metadata = self.as_sent(video)
        known = {key: value for key, value in metadata.items() if key != "do_sample_frames"}
        out = self.processor(
            text="<|video_pad|>",
            videos=[frames],
            video_metadata=[VideoMetadata(**known)],
            do_sample_frames=metadata.get("do_sample_frames", False),
            return_tensors="pt",
        )
        return Pixels(out["pixel_values_videos"], out["video_grid_thw"], self.text_of(out["input_ids"][0].tolist()))

    def text_of(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Of a video as transformers writes it out, the text before and behind each pair's visual tokens."""
        config = self.model.config
        found: list[tuple[list[int], list[int]]] = []
        before: list[int] = []
        for token in ids:
            if token == config.vision_end_token_id:
                found.append((before, [token]))
                before = []
            elif token != config.video_token_id:
                before.append(token)
        return found


def load_qwen3(folder: Path, kind: Qwen3Kind, **shape: Any) -> Qwen3Sample:
    """Build a checkpoint with `build_qwen3_checkpoint(folder, kind, **shape)` and load it."""
    path = build_qwen3_checkpoint(folder, kind, **shape)
    which: Any = Qwen3VLMoeForConditionalGeneration if kind == "qwen3-vl-moe" else Qwen3VLForConditionalGeneration
    model = which.from_pretrained(path, attn_implementation="eager").eval()
    model.layout = LAYOUT
    return Qwen3Sample(path, model, AutoProcessor.from_pretrained(path), kind)
