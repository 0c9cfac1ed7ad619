"""The oracle of Qwen3-VL and Qwen3.5 without METok against transformers' own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.oracle import OracleSettings, run
from tests.support.oracle.qwen3_5_samples import load_qwen3_5
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.samples import greedy, picture, scene_video


@pytest.mark.parametrize(
    ("load", "kind", "shape"),
    [
        (load_qwen3, "qwen3-vl", {"deepstack": (1, 2, 3)}),
        (load_qwen3, "qwen3-vl-moe", {"deepstack": (1, 2, 3)}),
        (load_qwen3_5, "qwen3.5", {}),
        (load_qwen3_5, "qwen3.5-moe", {}),
    ],
)
def test_without_metok_it_is_transformers(
    tmp_path_factory: pytest.TempPathFactory, load: Callable[..., Any], kind: str, shape: dict[str, Any]
) -> None:
    """Text around the frames, its positions, and what the tower adds to pictures and videos."""
    sample = load(tmp_path_factory.mktemp("tiny"), kind, seed=5, **shape)
    config = sample.model.config
    video, image = scene_video(3, 7, side=224)[:, :150], picture(2, 90, 150)
    pixels, pictures = sample.pixels(video), sample.image_inputs([image])
    found = run(sample.model, sample.prompt_ids(images=1), [pixels], pictures, [], OracleSettings(off=True), 12)
    kinds = {config.image_token_id: 1, config.video_token_id: 2}
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([found.prompt_ids]),
        "attention_mask": torch.ones(1, len(found.prompt_ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[kinds.get(token, 0) for token in found.prompt_ids]]),
        "pixel_values_videos": pixels.patches,
        "video_grid_thw": pixels.grid,
        "pixel_values": pictures[0],
        "image_grid_thw": pictures[1],
    }
    assert found.prompt_ids.count(config.vision_start_token_id) == 4 + 2
    tokens, logprobs = greedy(sample, inputs, 12)
    assert found.tokens == tokens
    assert isinstance(found.logprobs, torch.Tensor)
    assert torch.allclose(found.logprobs, logprobs, atol=1e-4)
