"""Folders of Qwen2.5-VL and Qwen3-VL for the engine benchmark: tiny random checkpoints,
and published shapes without weights.

The sizes are facts of the config.json of Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-8B-Instruct on Hugging
Face; a test counts the parameters that follow from them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """What a published config says otherwise than the tiny checkpoint's, and how large pictures may be."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image_pixels: tuple[int, int]  # fewest and most of a picture
    video_pixels: tuple[int, int]  # Qwen2.5-VL: of a frame; Qwen3-VL: of all frames together


QWEN2_5_VL_7B = Published(
    text={
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128_000,
        "max_window_layers": 28,
        "layer_types": ["full_attention"] * 28,
        "rope_theta": 1_000_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    },
    vision={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    image_pixels=(3136, 12_845_056),
    video_pixels=(100_352, 602_112),  # transformers' own for videos: 128 and 768 tokens of 28 x 28
)

QWEN3_VL_8B = Published(
    text={
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 262_144,
        "rope_theta": 5_000_000.0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    vision={
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    image_pixels=(65_536, 16_777_216),
    video_pixels=(4096, 25_165_824),
)

MODELS: dict[str, Published | None] = {
    "qwen2.5-vl-tiny": None,
    "qwen2.5-vl-7b": QWEN2_5_VL_7B,
    "qwen3-vl-tiny": None,
    "qwen3-vl-8b": QWEN3_VL_8B,
}
"""By the benchmark's name; None is the tiny random checkpoint."""


def write(name: str, folder: Path) -> None:
    """Write one of `MODELS` into `folder`."""
    published = MODELS[name]
    if published is None:
        _tiny(name, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Config, tokenizer and processors are the tiny one's: 515 tokens at the bottom of a full vocabulary.
        tiny = Path(scratch) / "tiny"
        _tiny(name, tiny, layers=1)
        for file in tiny.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, folder / file.name)
    _change(folder / "config.json", {
        "dtype": "bfloat16", "text_config": {**published.text, "dtype": "bfloat16"}, "vision_config": published.vision,
    })  # fmt: skip
    images, videos = ({"size": _edges(*pixels)} for pixels in (published.image_pixels, published.video_pixels))
    _change(folder / "preprocessor_config.json", images)
    _change(folder / "video_preprocessor_config.json", videos)
    _change(folder / "processor_config.json", {"image_processor": images, "video_processor": videos})


def _tiny(name: str, folder: Path, **shape: Any) -> None:
    if name.startswith("qwen3"):
        from metok_vllm.demo.qwen3_checkpoint import build_qwen3_checkpoint

        build_qwen3_checkpoint(folder, **shape)
    else:
        from metok_vllm.demo.qwen_checkpoint import build_qwen_checkpoint

        build_qwen_checkpoint(folder, **shape)


def _edges(fewest: int, most: int) -> dict[str, int]:
    """Pixels, under the names that Qwen's processors give them."""
    return {"shortest_edge": fewest, "longest_edge": most}


def _change(file: Path, changes: Mapping[str, Any]) -> None:
    """Put values into a JSON file; a mapping is merged into the one that is there."""
    content: dict[str, Any] = json.loads(file.read_text())
    for key, value in changes.items():
        is_merged = isinstance(value, Mapping) and isinstance(content.get(key), dict)
        content[key] = {**content[key], **value} if is_merged else value
    file.write_text(json.dumps(content, indent=2) + "\n")
