"""Qwen3.5 and 3.6, dense and with experts, with METok's stage 1.

Their tower is Qwen3-VL's without levels, and so are the times between the frames and the positions on three
axes. Most layers of the language model carry a state along instead of attending (gated delta rule), which no
token can be taken out of again: nothing is pruned there. vLLM's models are in
vllm/model_executor/models/qwen3_5.py.
"""

from __future__ import annotations

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.models.qwen3_vl import MetokQwen3VLMultiModalProcessor, Qwen3Model


@MULTIMODAL_REGISTRY.register_processor(
    MetokQwen3VLMultiModalProcessor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class MetokQwen3_5ForConditionalGeneration(Qwen3Model, Qwen3_5ForConditionalGeneration):
    """Qwen3.5 and 3.6."""


@MULTIMODAL_REGISTRY.register_processor(
    MetokQwen3VLMultiModalProcessor, info=Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class MetokQwen3_5MoeForConditionalGeneration(  # type: ignore[misc]  # vLLM's two bases differ by themselves
    Qwen3Model, Qwen3_5MoeForConditionalGeneration
):
    """Qwen3.5 and 3.6 with experts."""
