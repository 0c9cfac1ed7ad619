"""What the front end makes of a video for the dual tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metok_vllm.contract.fields import PIXELS_FIELD
from metok_vllm.demo.checkpoint import build_checkpoint
from metok_vllm.frontend.aligner_inputs import FOLDER, AlignerProcessor, rgb_frames
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


SIZES = [(48, 64), (1, 1), (1, 64), (64, 1), (3, 1), (1, 3), (3, 64), (64, 3), (3, 3), (2, 1), (4, 4)]


def coloured(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(height * 100 + width).integers(0, 256, (4, height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_frames_of_a_file_are_read_the_right_way_whatever_their_size(height: int, width: int) -> None:
    frames = coloured(height, width)
    expected = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())
    assert torch.equal(rgb_frames(frames), expected)
    assert torch.equal(rgb_frames(torch.from_numpy(frames)), expected)
    assert torch.equal(rgb_frames(np.array([Image.fromarray(frame) for frame in frames])), expected)


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if size[1] != 3])
def test_channels_first_is_read_too_unless_it_looks_like_a_files_frames(height: int, width: int) -> None:
    first = torch.from_numpy(coloured(height, width)).movedim(3, 1).contiguous()
    assert torch.equal(rgb_frames(first), first)
    assert torch.equal(rgb_frames(first.numpy()), first)


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if 3 not in size and size[0] > 1])
def test_grey_frames_have_three_equal_channels(height: int, width: int) -> None:
    grey = torch.from_numpy(coloured(height, width)[..., :1])
    expected = grey.movedim(3, 1).repeat(1, 3, 1, 1)
    assert torch.equal(rgb_frames(grey), expected)
    assert torch.equal(rgb_frames(grey.movedim(3, 1)), expected)


@pytest.mark.parametrize("shape", [(4, 48, 64, 4), (4, 4, 48, 64), (48, 64, 3), (1, 4, 3, 48, 64)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="neither three nor one"):
        rgb_frames(np.zeros(shape, np.uint8))


FORMS: dict[str, Callable[[Any], Any]] = {
    "array, channels last": lambda frames: frames,
    "array, channels first": lambda frames: frames.transpose(0, 3, 1, 2).copy(),
    "tensor, channels last": torch.from_numpy,
    "tensor, channels first": lambda frames: torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()),
    "list of pictures": lambda frames: [Image.fromarray(frame) for frame in frames],
    "list of arrays": list,
    "list of tensors": lambda frames: [torch.from_numpy(frame).movedim(2, 0) for frame in frames],
}


def test_whatever_stock_takes_the_dual_tower_takes_and_sees_the_same_picture(
    tmp_path: Path, make_config: Callable[..., Any]
) -> None:
    """Every form of a video, through the whole front end, down to frames of one pixel."""
    from transformers import AutoImageProcessor
    from vllm.multimodal import MULTIMODAL_REGISTRY

    model = build_checkpoint(tmp_path / "model", layers=4, aligner="siglip")
    processor = MULTIMODAL_REGISTRY.create_processor(make_config(model=str(model), dtype="float32").model_config)
    images: Any = AutoImageProcessor.from_pretrained(model / FOLDER)
    prompt = "<|im_start|>user\n<video>What is it?<|im_end|>\n<|im_start|>assistant\n"
    for height, width in ((48, 64), (1, 64), (64, 1), (1, 1)):
        frames = coloured(height, width)
        expected = images(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
        for name, form in FORMS.items():
            items = processor.info.parse_mm_data({"video": [form(frames)]})
            video: Any = processor(prompt, items)["mm_kwargs"]["video"][0]
            assert torch.equal(video[PIXELS_FIELD].data, expected), f"{name}, {width} x {height}"
