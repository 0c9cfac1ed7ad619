"""How far the videos of a prompt reach on the axis of time, where rotary positions have several axes.

A frame stands on that axis by the second at which it is shown, or takes as many positions as it has rows or
columns. So a long video takes more positions than METok leaves it tokens, and a file that lies about its
frame rate any number. Behind the model's table of positions there
is foreign memory: one video too long is refused by the front end, several together by the scheduler, which
alone has the data of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from metok_vllm.contract.fields import EXTENT_FIELD

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

TABLE_FACTOR = 4
"""vLLM's table of rotary positions is so many times `max_position_embeddings` long, where they have several
axes (vllm/model_executor/layers/rotary_embedding/mrope.py). Stock Qwen3-VL's is not, METok's is.
"""


def most_positions(model_config: Any) -> int:
    """Positions that the videos of one prompt may take together, beside `max_model_len` tokens."""
    table = TABLE_FACTOR * int(model_config.hf_text_config.max_position_embeddings)
    return table - int(model_config.max_model_len)


def taken(features: Iterable[MultiModalFeatureSpec] | None) -> int:
    """Positions that the videos of a prompt take; 0 where a token takes one."""
    found = 0
    for feature in features or ():
        item: Any = feature.data
        if feature.modality == "video" and item is not None and EXTENT_FIELD in item:
            data = item[EXTENT_FIELD].data
            if isinstance(data, torch.Tensor) and data.dtype == torch.int64 and data.numel() == 1:
                found += max(*data.flatten().tolist(), 0)
    return found


def too_far(positions: float, most: int) -> str:
    """What is wrong with videos that reach too far, behind the words that name them."""
    return f"with {positions:.0f} positions in time, and this model has {most}: send a shorter one, or fewer."
