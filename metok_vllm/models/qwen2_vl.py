"""Qwen2-VL with METok's three stages: Qwen2.5-VL without windows in the tower and without a frame rate."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.models.qwen2_5_vl import QwenModel, QwenProcessing


class MetokQwen2VLMultiModalProcessor(QwenProcessing, Qwen2VLMultiModalProcessor):
    """Lays down as many placeholders as stage 1 will leave."""


@MULTIMODAL_REGISTRY.register_processor(
    MetokQwen2VLMultiModalProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class MetokQwen2VLForConditionalGeneration(QwenModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""
