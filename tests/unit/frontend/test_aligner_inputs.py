"""What the front end makes of a video for the dual tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metok_vllm.contract.fields import PIXELS_FIELD
from metok_vllm.demo.checkpoint import build_checkpoint
from metok_vllm.frontend.aligner_inputs import FOLDER, AlignerProcessor
from tests.support.oracle.samples import scene_video


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_travel_in_the_models_dtype(tmp_path: Path, make_config: Callable[..., Any], dtype: torch.dtype) -> None:
    """To bfloat16 they are rounded once, as the tower would have done."""
    from transformers import AutoImageProcessor
    from vllm.multimodal import MULTIMODAL_REGISTRY

    model = build_checkpoint(tmp_path / "model", layers=4, aligner="siglip")
    config = make_config(model=str(model), dtype=str(dtype).removeprefix("torch."))
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    frames = scene_video(1, 5)
    items = processor.info.parse_mm_data({"video": [frames]})
    prompt = "<|im_start|>user\n<video>What is it?<|im_end|>\n<|im_start|>assistant\n"
    video: Any = processor(prompt, items)["mm_kwargs"]["video"][0]
    sent = video[PIXELS_FIELD].data
    images: Any = AutoImageProcessor.from_pretrained(model / FOLDER)
    exact = images(images=list(frames), return_tensors="pt")["pixel_values"]
    assert exact.dtype == torch.float32
    assert sent.dtype == video["pixel_values_videos"].data.dtype == dtype
    assert torch.equal(sent, exact.to(dtype))


def test_frames_are_not_changed(tmp_path: Path) -> None:
    model = build_checkpoint(tmp_path / "model", layers=4, aligner="clip")
    frames = scene_video(2, 3)
    before = frames.copy()
    assert AlignerProcessor(str(model / FOLDER)).pixels(frames, torch.float16).shape[:2] == (3, 3)
    assert np.array_equal(frames, before)
