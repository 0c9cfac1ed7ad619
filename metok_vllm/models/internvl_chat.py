"""InternVL3 and InternVL3.5 as their authors published them, with METok's three stages.

vLLM's model is vllm/model_executor/models/internvl.py. It reads the checkpoint's config by the code that
comes with it, so a server needs `--trust-remote-code`, METok asked for or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.models.internvl import InternVLProcessing, InternVLTower


class MetokInternVLChatProcessingInfo(InternVLProcessingInfo):
    """As stock, with the words that stand for pictures and videos in a prompt said on the processor."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """vLLM's own.

        Raises:
            ValueError: stock vLLM takes no videos with this checkpoint.
        """
        if self.ctx_video_token is None:
            raise ValueError("its tokenizer has no token with which vLLM would write videos (<|video_pad|>)")
        processor: Any = super().get_hf_processor(**kwargs)
        processor.image_token, processor.video_token = "<image>", "<video>"
        return processor


class MetokInternVLChatMultiModalProcessor(InternVLProcessing, InternVLMultiModalProcessor):
    """Of the authors' format: nothing stands between two frames, and a video is a word, not a token."""

    between_frames = ""

    @property
    def placeholder(self) -> str:
        return str(self.info.get_hf_processor().ctx_video_token)


@MULTIMODAL_REGISTRY.register_processor(
    MetokInternVLChatMultiModalProcessor,
    info=MetokInternVLChatProcessingInfo,
    dummy_inputs=InternVLDummyInputsBuilder,
)
class MetokInternVLChatModel(InternVLTower, InternVLChatModel):  # type: ignore[misc]  # of `forward`
    """The stock model; a video goes through stage 1, a step that prunes through the pruned step."""

    pixels_field = "pixel_values_flat_video"

    def get_encoder_cudagraph_config(self) -> Any:
        """As stock, for pictures alone: graphs bypass `embed_multimodal`, and with it stage 1."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[no-untyped-call]
        return replace(config, modalities=[name for name in config.modalities if name != "video"])
