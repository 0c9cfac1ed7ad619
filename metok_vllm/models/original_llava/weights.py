"""The authors' names of the weights, as vLLM's LLaVA-OneVision calls them."""

from vllm.model_executor.models.utils import WeightsMapper

WEIGHTS = WeightsMapper(
    orig_to_new_substr={".embeddings.position_ids": None},  # a table of numbers, saved by older transformers
    # They apply one after the other, so the shortest comes last.
    orig_to_new_prefix={
        "model.vision_tower.vision_tower.": "vision_tower.",
        "model.mm_projector.0.": "multi_modal_projector.linear_1.",
        "model.mm_projector.2.": "multi_modal_projector.linear_2.",
        "model.vision_resampler.": None,  # the identity
        "model.image_newline": "image_newline",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
)
