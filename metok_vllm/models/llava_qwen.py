"""LongVA, LLaVA-OneVision and LLaVA-Video as their authors published them, with METok's three stages.

One architecture; the checkpoint's config says how it pools and where its newlines stand
(`original_llava/config.py: Layout`). All else is LLaVA-OneVision's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlavaOnevisionProcessor
from vllm.model_executor.models.llava_onevision import LlavaOnevisionDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from metok_vllm.compression.pooling import pool_frames
from metok_vllm.contract.video_plan import VideoGrid
from metok_vllm.log import metok_logger
from metok_vllm.models.llava_onevision import (
    STOCK_STRIDE,
    MetokLlavaOnevisionForConditionalGeneration,
    MetokLlavaOnevisionMultiModalProcessor,
    MetokLlavaOnevisionProcessingInfo,
)
from metok_vllm.models.original_llava.config import Layout, layout_of
from metok_vllm.models.original_llava.processor import build_processor
from metok_vllm.models.original_llava.tiles import patches_a_side, tiles_of
from metok_vllm.models.original_llava.weights import WEIGHTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = metok_logger(__name__)


def _number(value: Any) -> float:
    """A number above 0 that somebody states; 0 where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0
    return number if math.isfinite(number) and number > 0 else 0


class MetokLlavaQwenProcessingInfo(MetokLlavaOnevisionProcessingInfo):
    """Counts tokens as the checkpoint's layout says, with a processor built in code."""

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.get_hf_config())

    @cached_property
    def _processor(self) -> LlavaOnevisionProcessor:
        return build_processor(self.get_hf_config(), self.get_tokenizer())

    def get_hf_processor(self, **kwargs: object) -> LlavaOnevisionProcessor:
        return self._processor

    @cached_property
    def _pooled_side(self) -> int:
        return math.ceil(patches_a_side(self.get_hf_config()) / STOCK_STRIDE)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"video": None} if self.layout.images == "none" else super().get_supported_mm_limits()

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        side, separators = self._pooled_side, self.layout.separators
        return num_frames * side * (side + (separators == "row")) + (separators == "event")

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        if self.layout.images != "unires":
            return int(super().get_num_image_tokens(image_width=image_width, image_height=image_height))
        rows, columns = tiles_of(self.get_hf_config(), image_height, image_width)
        return rows * columns * self._pooled_side**2

    def get_image_size_with_most_features(self) -> ImageSize:
        if self.layout.images != "unires":
            return super().get_image_size_with_most_features()
        height, width = max(self.get_hf_config().image_grid_pinpoints, key=math.prod)
        return ImageSize(width=width, height=height)


class MetokLlavaQwenMultiModalProcessor(MetokLlavaOnevisionMultiModalProcessor):
    """Lays down as many placeholders as stage 1 will leave, and tells a model when the frames are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool_style = self.info.layout.style
        self.reads_text_behind = self.info.layout.tells_times

    def stock_video_tokens(self, grid: VideoGrid) -> int:
        return int(self.info.get_num_video_tokens(image_width=1, image_height=1, num_frames=grid.frames))

    def text_behind(self, frames: int, metadata: Mapping[str, Any]) -> str:
        """The authors' time instruction (LLaVA-NeXT `playground/demo/video_demo.py`), to the letter."""
        rate, total = _number(metadata.get("fps")), _number(metadata.get("total_num_frames"))
        indices = metadata.get("frames_indices")
        if not rate or not total or indices is None or len(indices) != frames:
            logger.warning_once(  # type: ignore[attr-defined]  # vLLM's loggers have it
                "METok: a video came without the times of its frames, which this model was trained to read; send the "
                "file itself, or its metadata beside the frames."
            )
            return ""
        times = ",".join(f"{index / rate:.2f}s" for index in indices)
        return (
            f"The video lasts for {total / rate:.2f} seconds, and {frames} frames are uniformly sampled from it. These "
            f"frames are located at {times}.Please answer the following questions related to this video."
        )


@MULTIMODAL_REGISTRY.register_processor(
    MetokLlavaQwenMultiModalProcessor,
    info=MetokLlavaQwenProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class MetokLlavaQwenForCausalLM(MetokLlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with the layout and the weights' names of an original checkpoint."""

    hf_to_vllm_mapper = WEIGHTS

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.layout = layout_of(self.config)
        self.pool_style = self.layout.style
        if not self.layout.has_newline:  # vLLM would miss its weights
            self.image_newline = None  # type: ignore[assignment]

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """Every frame pooled by 2, newlines where the layout has them."""
        pooled = pool_frames(features, STOCK_STRIDE, self.pool_style.mode)
        newline = self.separator()
        if newline is None:
            return pooled.flatten(0, 1)
        newline = newline.to(pooled.dtype)
        if self.pool_style.separators == "event":
            return torch.cat([pooled.flatten(0, 1), newline[None]])
        rows = pooled.view(pooled.shape[0], math.ceil(features.shape[1] / STOCK_STRIDE), -1, pooled.shape[-1])
        return torch.cat([rows, newline.expand(*rows.shape[:2], 1, -1)], dim=2).flatten(0, 2)

    def separator(self) -> torch.Tensor | None:
        return None if self.pool_style.separators == "none" else self.image_newline

    def _merge_image_patch_embeddings(self, image_size: Any, patch_embeddings: torch.Tensor, **kwargs: Any) -> Any:
        """A picture's tokens from its tiles [1 + n, H * W, D], the first of which is the whole picture.

        "unires": the n tiles alone, each pooled, one after the other.
        """
        if self.layout.images != "unires":
            return super()._merge_image_patch_embeddings(image_size, patch_embeddings, **kwargs)
        rows, columns = tiles_of(self.config, *image_size.tolist())
        side = patches_a_side(self.config)
        tiles = patch_embeddings[1 : 1 + rows * columns]  # padded beside larger pictures
        tiles = tiles.view(rows * columns, side, side, -1)
        return pool_frames(tiles, STOCK_STRIDE, "average").flatten(0, 1)
