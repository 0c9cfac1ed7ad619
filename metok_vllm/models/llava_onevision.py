"""LLaVA-OneVision (Hugging Face format) with METok's three stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.compression.pooling import PoolStyle, pool_frames
from metok_vllm.contract.video_plan import VideoGrid
from metok_vllm.frontend.processing import MetokProcessing
from metok_vllm.models.base import MetokModel, in_blocks

STYLE = PoolStyle("bilinear", "event")

STOCK_STRIDE = 2
"""With which the stock model pools every frame of a video."""

PROFILED_FRAMES = 32
"""Frames of the video that vLLM profiles memory and sizes the encoder cache with; stock vLLM stops at 16."""


class MetokLlavaOnevisionProcessingInfo(LlavaOnevisionProcessingInfo):
    """As stock, but profiles with as many frames as vLLM's front end samples by default."""

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        fitting = self._get_max_video_frames(seq_len) // max(mm_counts.get("video", 0), 1)
        return max(min(fitting, PROFILED_FRAMES), 1)


class MetokLlavaOnevisionMultiModalProcessor(MetokProcessing, LlavaOnevisionMultiModalProcessor):
    """Lays down as many placeholders as stage 1 will leave."""

    pool_style = STYLE

    def video_grid(self, frames: int, fields: Mapping[str, Any], item: int) -> VideoGrid:
        side = self.info.get_vision_encoder_info().get_patch_grid_length()
        return VideoGrid(frames, side, side)

    def stock_video_tokens(self, grid: VideoGrid) -> int:
        return int(self.info.get_num_video_tokens(image_width=1, image_height=1, num_frames=grid.frames))


@MULTIMODAL_REGISTRY.register_processor(
    MetokLlavaOnevisionMultiModalProcessor,
    info=MetokLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class MetokLlavaOnevisionForConditionalGeneration(MetokModel, LlavaOnevisionForConditionalGeneration):
    """The stock model; a video goes through stage 1, a step that prunes through the pruned step."""

    pool_style = STYLE

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        return in_blocks(self._frames, fields["pixel_values_videos"][item])

    def _frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixels[T, 3, h, w]` to [T, H, W, D]."""
        tower: Any = self.vision_tower
        features: torch.Tensor = self.multi_modal_projector(self._image_pixels_to_features(tower, pixels))
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return features.view(pixels.shape[0], side, side, -1)

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """Every frame pooled by 2, one separator at the end."""
        pooled = pool_frames(features, STOCK_STRIDE, STYLE.mode).flatten(0, 1)
        return torch.cat([pooled, self.image_newline[None].to(pooled.dtype)])

    def separator(self) -> torch.Tensor | None:
        return self.image_newline
