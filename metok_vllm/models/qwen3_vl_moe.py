"""Qwen3-VL with a mixture of experts for its MLPs, which treat each row alone: else it is Qwen3-VL."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.models.qwen3_vl import MetokQwen3VLMultiModalProcessor, Qwen3Model


@MULTIMODAL_REGISTRY.register_processor(
    MetokQwen3VLMultiModalProcessor, info=Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class MetokQwen3VLMoeForConditionalGeneration(  # type: ignore[misc]  # vLLM's two bases differ by themselves
    Qwen3Model, Qwen3VLMoeForConditionalGeneration
):
    """Qwen3-VL with experts."""
