"""LLaVA-OneVision (Hugging Face format) with METok's three stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from metok_vllm.compression.pooling import PoolMode, pool_frames
from metok_vllm.contract.fields import PLAN_FIELD
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.frontend.processing import MetokProcessing
from metok_vllm.models.base import MetokModel

PROFILED_FRAMES = 32
"""Frames of the video that vLLM profiles memory and sizes the encoder cache with; stock vLLM stops at 16."""


class MetokLlavaOnevisionProcessingInfo(LlavaOnevisionProcessingInfo):
    """As stock, but profiles with as many frames as vLLM's front end samples by default."""

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        fitting = self._get_max_video_frames(seq_len) // max(mm_counts.get("video", 0), 1)
        return max(min(fitting, PROFILED_FRAMES), 1)


class MetokLlavaOnevisionMultiModalProcessor(MetokProcessing, LlavaOnevisionMultiModalProcessor):
    """Lays down as many placeholders as stage 1 will leave."""

    pool_mode: PoolMode = "bilinear"
    separators = True

    def tower_grid(self) -> tuple[int, int]:
        side = self.info.get_vision_encoder_info().get_patch_grid_length()
        return side, side

    def stock_video_tokens(self, frames: int) -> int:
        return int(self.info.get_num_video_tokens(image_width=1, image_height=1, num_frames=frames))


@MULTIMODAL_REGISTRY.register_processor(
    MetokLlavaOnevisionMultiModalProcessor,
    info=MetokLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class MetokLlavaOnevisionForConditionalGeneration(MetokModel, LlavaOnevisionForConditionalGeneration):
    """The stock model, its video path replaced by stage 1 and its
    forward by the pruned step where one is due.
    """

    pool_mode: PoolMode = "bilinear"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.init_metok(vllm_config, self.language_model.model)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        if kwargs.get("pixel_values_videos") is None:
            return super().embed_multimodal(**kwargs)
        plans: Any = kwargs[PLAN_FIELD]
        pixels: Any = kwargs["pixel_values_videos"]
        return tuple(
            self.embed_video(pixels[i], VideoPlan.from_tensor(plan), kwargs, i) for i, plan in enumerate(plans)
        )

    def video_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tower and projector: `pixels[T, 3, h, w]` to [T, H, W, D]."""
        tower: Any = self.vision_tower
        features: torch.Tensor = self.multi_modal_projector(self._image_pixels_to_features(tower, pixels))
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return features.view(pixels.shape[0], side, side, -1)

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """What stock vLLM makes of a video's features [T, H, W, D]:
        every frame pooled by 2, one separator at the end.
        """
        pooled = pool_frames(features, 2, self.pool_mode).flatten(0, 1)
        return torch.cat([pooled, self.image_newline[None].to(pooled.dtype)])

    def separator(self) -> torch.Tensor | None:
        return self.image_newline

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        metok_step: Any = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if metok_step is not None:
            assert inputs_embeds is not None
            output: torch.Tensor = metok_step.run(positions, inputs_embeds)
            return output
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)
        return loaded | self.aligner_weights()
