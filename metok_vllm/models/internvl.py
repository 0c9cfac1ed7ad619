"""InternVL3 and InternVL3.5 (Hugging Face format) with METok's three stages.

Every frame is one square picture, whose tokens the tower has merged by pixel shuffle: 16 x 16 in the
published checkpoints. Frames stand in text that counts them. vLLM's model is
vllm/model_executor/models/interns1.py. What the authors' own format shares with it is here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import cached_encode

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.frame_text import FrameText
from metok_vllm.contract.refusals import refusal
from metok_vllm.contract.video_plan import VideoGrid
from metok_vllm.frontend.processing import MetokProcessing
from metok_vllm.models.base import MetokModel, in_blocks

STYLE = PoolStyle("average", "none")


def side_of(hf_config: Any) -> int:
    """Rows, and columns, of a frame's tokens behind the pixel shuffle."""
    vision = hf_config.vision_config
    image, patch = (one[0] if isinstance(one, Sequence) else one for one in (vision.image_size, vision.patch_size))
    return int(image // patch * hf_config.downsample_ratio)


def frame_labels(frames: int, between: str, video_token: str, tokenizer: Any) -> list[FrameText]:
    """The text around each frame of a video: its number, and the marks of a picture.

    Args:
        frames: of the video.
        between: what stands between two of them.
        video_token: the placeholder of visual tokens, one token of the vocabulary.
        tokenizer: the model's.
    """
    # All of it at once, as stock vLLM does: what is one token may depend on what stands beside it.
    text = between.join(f"Frame{i + 1}: <img>{video_token}</img>" for i in range(frames))
    placeholder, end = (cached_encode(tokenizer, one, add_special_tokens=False)[-1] for one in (video_token, "</img>"))
    labels: list[FrameText] = []
    before: list[int] = []
    own: list[int] = []
    for token in cached_encode(tokenizer, text, add_special_tokens=False):
        if token == placeholder:
            before, own = own, []
            continue
        own.append(token)
        if token == end:
            labels.append(FrameText(tuple(before), tuple(own)))
            own = []
    return labels


class InternVLProcessing(MetokProcessing):
    """Lays down as many placeholders as stage 1 will leave, and the text of the frames among them.

    METok off, text and placeholders are the stock processor's.
    """

    pool_style = STYLE
    stock_lays_text = True
    between_frames = "\n"
    """What stock vLLM writes between two frames of a video."""

    @property
    def placeholder(self) -> str:
        """Stands for one visual token of a video."""
        return str(self.info.get_hf_processor().video_token)

    def video_placeholder(self, target: Sequence[int]) -> Sequence[int]:
        ids: Sequence[int] = cached_encode(self.info.get_tokenizer(), self.placeholder, add_special_tokens=False)
        return ids

    def video_grid(self, frames: int, fields: Mapping[str, Any], item: int) -> VideoGrid:
        taken = int(fields["video_num_patches"][item])
        if taken != frames:
            raise refusal(
                "video",
                f"METok: this checkpoint's processor takes {taken} of a video's {frames} frames: switch its "
                "do_sample_frames off, and let the loader sample.",
            )
        side = side_of(self.info.get_hf_config())
        return VideoGrid(frames, side, side)

    def stock_video_tokens(self, grid: VideoGrid) -> int:
        return grid.frames * grid.height * grid.width

    def frame_text(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Sequence[FrameText]:
        return frame_labels(grid.frames, self.between_frames, self.placeholder, self.info.get_tokenizer())


class InternVLTower(MetokModel):
    """A stock model whose tower takes square frames one by one."""

    pool_style = STYLE
    pixels_field = "pixel_values_videos"
    """Where the frames of all videos of a batch are, [frames, 3, h, w]."""

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        frames = fields["video_num_patches"].tolist()  # on the host (`keep_on_cpu`)
        before = sum(frames[:item])
        return in_blocks(self._frames, fields[self.pixels_field][before : before + frames[item]])

    def _frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixels[T, 3, h, w]` to [T, H, W, D]."""
        stock: Any = self
        tokens: torch.Tensor = stock.extract_feature(pixels)
        side = side_of(stock.config)
        return tokens.view(pixels.shape[0], side, side, -1)

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """Every token of the tower."""
        return features.flatten(0, 2)

    def separator(self) -> torch.Tensor | None:
        return None


class MetokInternVLMultiModalProcessor(InternVLProcessing, InternS1MultiModalProcessor):
    """Of the Hugging Face format."""


@MULTIMODAL_REGISTRY.register_processor(
    MetokInternVLMultiModalProcessor, info=InternS1ProcessingInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class MetokInternVLForConditionalGeneration(InternVLTower, InternS1ForConditionalGeneration):  # type: ignore[misc]  # `forward`
    """The stock model; a video goes through stage 1, a step that prunes through the pruned step."""
