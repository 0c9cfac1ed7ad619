"""The authors' names of the weights, as vLLM's LLaVA-OneVision calls them; whether the tower's are there."""

from __future__ import annotations

from pathlib import Path

from vllm.model_executor.models.utils import WeightsMapper

from metok_vllm.frontend.weight_files import INDEX, WHOLE, tensor_shapes

TOWER = "model.vision_tower.vision_tower."

WEIGHTS = WeightsMapper(
    orig_to_new_substr={".embeddings.position_ids": None},  # a table of numbers, saved by older transformers
    # They apply one after the other, so the shortest comes last.
    # Some without a dot at the end: a quantised copy names whole modules that it leaves alone.
    orig_to_new_prefix={
        TOWER: "vision_tower.",
        "model.vision_tower": "vision_tower",
        "model.mm_projector.0": "multi_modal_projector.linear_1",
        "model.mm_projector.2": "multi_modal_projector.linear_2",
        "model.mm_projector": "multi_modal_projector",
        "model.vision_resampler": None,  # the identity
        "model.image_newline": "image_newline",
        "lm_head": "language_model.lm_head",
        "model.": "language_model.model.",
    },
)


def check_tower(model: str) -> None:
    """Refuse a folder without the vision tower's weights: such a checkpoint was trained beside a frozen one.

    Raises:
        ValueError: in one sentence, also where a file is missing or cut off.
    """
    folder = Path(model)
    if not any((folder / name).is_file() for name in (INDEX, WHOLE)):
        return  # a name on the hub, or files that vLLM reads in another way
    try:
        names = tensor_shapes(folder)
    except ValueError as error:
        raise ValueError(f"METok cannot serve {model}: {error}.") from None
    if not any(name.startswith(TOWER) for name in names):
        raise ValueError(
            f"METok cannot serve {model}: the weights of its vision tower are not in it, and METok fetches no others."
        )
