"""Qwen2.5-VL with METok's three stages; what Qwen2-VL and Qwen3-VL share with it is here too.

The tower takes frames in pairs and merges 2 x 2 patches, so a grid is pairs x rows x columns of merged
tokens, and another one for every size of frame. Its attention never leaves a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.video_plan import VideoGrid
from metok_vllm.frontend.item_kwargs import frames_of
from metok_vllm.frontend.processing import MetokProcessing
from metok_vllm.models.base import MetokModel
from metok_vllm.models.mrope import MropePositions
from metok_vllm.models.qwen_requests import ALLOWED, check_metadata, check_stated

STYLE = PoolStyle("average", "none")

PATCHES_PER_BLOCK = 64 * 1024
"""Patches that the tower takes at once, which bounds its memory: those of the largest published picture."""


class QwenProcessing(MetokProcessing):
    """Lays down as many placeholders as stage 1 will leave, of a grid that differs from video to video."""

    pool_style = STYLE
    allowed_kwargs = ALLOWED

    @property
    def _pair(self) -> int:
        """Frames that the tower takes together."""
        return int(self.info.get_hf_config().vision_config.temporal_patch_size)

    def video_grid(self, frames: int, fields: Mapping[str, Any], item: int) -> VideoGrid:
        merge = int(self.info.get_hf_config().vision_config.spatial_merge_size)
        pairs, rows, columns = fields["video_grid_thw"][item].tolist()
        return VideoGrid(pairs, rows // merge, columns // merge)

    def stock_video_tokens(self, grid: VideoGrid) -> int:
        return grid.frames * grid.height * grid.width

    def aligner_frames(self, videos: Any, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Any:
        """The first of each pair."""
        return frames_of(videos, item)[:: self._pair]

    def video_extent(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> float | None:
        vision = self.info.get_hf_config().vision_config
        seconds = fields.get("second_per_grid_ts")
        factor = 1.0 if seconds is None else float(seconds[item]) * float(getattr(vision, "tokens_per_second", 1.0))
        return max((grid.frames - 1) * factor + 1, grid.height, grid.width)

    def check_kwargs(self, kwargs: Mapping[str, object]) -> None:
        if kwargs:
            check_stated(kwargs, self.info.get_hf_processor().video_processor.size)


class QwenTower(MetokModel):
    """A stock model whose tower takes pairs of frames of any size; its rotary positions are elsewhere."""

    pool_style = STYLE

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        stock: Any = self
        grids = fields["video_grid_thw"].tolist()
        before = sum(pairs * rows * columns for pairs, rows, columns in grids[:item])
        pairs, rows, columns = grids[item]
        area = rows * columns
        pixels = fields["pixel_values_videos"][before : before + pairs * area]
        at_once = max(PATCHES_PER_BLOCK // area, 1)
        if stock.use_data_parallel:
            at_once = min(at_once, -(-pairs // get_tensor_model_parallel_world_size()))
        blocks = [min(at_once, pairs - start) for start in range(0, pairs, at_once)]
        # Ranks that share the tower's work out by items take blocks for items, all in one call.
        calls = [blocks] if stock.use_data_parallel else [[block] for block in blocks]
        encoded: list[torch.Tensor] = []
        start = 0
        for of_call in calls:
            end = start + sum(of_call) * area
            # Not the bare tower: this covers pixels that are normalised on the device, too.
            encoded += stock._process_video_input(
                {
                    "type": "pixel_values_videos",
                    "pixel_values_videos": pixels[start:end],
                    "video_grid_thw": torch.tensor([[block, rows, columns] for block in of_call]),
                }
            )
            start = end
        merge = int(stock.config.vision_config.spatial_merge_size)
        whole = encoded[0] if len(encoded) == 1 else torch.cat(encoded)
        return whole.view(pairs, rows // merge, columns // merge, -1)

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """Every token of the tower."""
        return features.flatten(0, 2)

    def separator(self) -> torch.Tensor | None:
        return None

    def get_encoder_cudagraph_config(self) -> Any:
        """As stock, for pictures alone: graphs bypass `embed_multimodal`, and with it stage 1."""
        stock: Any = super()
        config = stock.get_encoder_cudagraph_config()
        return replace(config, modalities=[name for name in config.modalities if name != "video"])


class QwenModel(MropePositions, QwenTower):
    """The stock model; a video goes through stage 1, a step that prunes through the pruned step."""


class MetokQwen2_5_VLMultiModalProcessor(QwenProcessing, Qwen2_5_VLMultiModalProcessor):
    """Refuses, too, what says too little of a video's frame rate, by which its tokens are placed in time."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        check_metadata(mm_items.get("video"))
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    MetokQwen2_5_VLMultiModalProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class MetokQwen2_5_VLForConditionalGeneration(QwenModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, and models trained from it."""
