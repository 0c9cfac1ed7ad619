"""The authors' config.json, read as the config of LLaVA-OneVision in transformers and a `Layout`.

The keys' meaning is that of the authors' code (LLaVA-NeXT `llava/model/llava_arch.py`, LongVA
`longva/model/llava_arch.py`). `model_type` differs from checkpoint to checkpoint, so the architecture
decides. What would change a video's tokens and is not built is refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPVisionConfig, LlavaOnevisionConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from metok_vllm.compression.pooling import PoolMode, PoolStyle, Separators
from metok_vllm.frontend.reasons import reason

MODEL_TYPES = ("qwen2", "llava_qwen", "llava")

LAYOUT = "metok_layout"
"""Attribute of the config that has the `Layout`."""

Images = Literal["unires", "anyres_max_9", "none"]
"""How pictures become tokens: the tiles alone, pooled; as LLaVA-OneVision does; or not at all."""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lays out what it sees."""

    pool: PoolMode
    separators: Separators
    images: Images
    tells_times: bool  # whether the model was trained to read when a video's frames are
    has_newline: bool  # whether the checkpoint has an embedding for it

    @property
    def style(self) -> PoolStyle:
        return PoolStyle(self.pool, self.separators)


def layout_of(config: Any) -> Layout:
    """What `read_config` has found."""
    return Layout(**getattr(config, LAYOUT))


@dataclass(frozen=True)
class _Tower:
    """A vision tower, and the layer that the projector reads."""

    config: PreTrainedConfig
    layer: int
    strategy: Literal["default", "full"]  # "default": without the class token


def _clip(**sizes: Any) -> _Tower:
    return _Tower(CLIPVisionConfig(**sizes), -2, "default")


def _siglip(num_hidden_layers: int, **sizes: Any) -> _Tower:
    # The authors drop the last layer before they train, so that the last one of the checkpoint is read.
    sizes |= {"num_hidden_layers": num_hidden_layers - 1, "vision_use_head": False}
    return _Tower(SiglipVisionConfig(**sizes), -1, "full")


def _known_tower(name: str) -> _Tower | None:
    """The towers of the published checkpoints, by the last part of their name; sizes as in their configs."""
    if name == "clip-vit-large-patch14-336":
        return _clip(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
    if name == "siglip-so400m-patch14-384":
        return _siglip(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        )
    return None


def read_config(stated: Mapping[str, Any], model: str) -> LlavaOnevisionConfig:
    """The checkpoint's config. The ids of its placeholders are set when its tokenizer is known.

    Args:
        stated: what its config.json says.
        model: its folder or name.

    Raises:
        ValueError: METok cannot serve it, in one sentence that names the key.
    """

    def check(key: str, *known: Any) -> None:
        value = stated.get(key, known[0])
        if value not in known:
            takes = " or ".join(json.dumps(one) for one in known)
            raise ValueError(f"METok cannot serve {model}: its {key} is {json.dumps(value)}, and METok needs {takes}.")

    check("model_type", *MODEL_TYPES)
    check("mm_projector_type", "mlp2x_gelu")
    check("mm_resampler_type", None)
    check("mm_vision_select_layer", -2)
    check("mm_vision_select_feature", "patch")
    check("mm_use_im_start_end", False, None)
    check("add_faster_video", False, None)
    check("mm_spatial_pool_stride", 2, None)
    is_unires = stated.get("mm_patch_merge_type") == "unires"
    check("mm_patch_merge_type", "spatial_unpad", "unires")
    check("mm_spatial_pool_mode", "average", "bilinear", None)
    check("add_time_instruction", False, True, None)
    if not is_unires:
        check("mm_newline_position", "one_token", "grid", "no_token")
    tower = _tower(stated, model)
    position = "no_token" if is_unires else stated.get("mm_newline_position", "one_token")
    separators: dict[str, Separators] = {"one_token": "event", "grid": "row", "no_token": "none"}
    tiles = _tiles(stated.get("image_grid_pinpoints"), int(tower.config.image_size))
    images: Images = "none"
    if tiles and is_unires and str(stated.get("image_aspect_ratio", "anyres")).startswith("anyres"):
        images = "unires"
    elif tiles and stated.get("image_aspect_ratio") == "anyres_max_9":
        images = "anyres_max_9"
    pool: PoolMode = stated.get("mm_spatial_pool_mode") or ("average" if is_unires else "bilinear")
    side = int(tower.config.image_size) // int(tower.config.patch_size)
    if pool == "average" and side % 2:  # the authors leave the last row and column out, METok does not
        raise ValueError(
            f"METok cannot serve {model}: it averages a grid of {side} patches a side, and METok needs an even number."
        )
    layout = Layout(
        pool=pool,
        separators=separators[position],
        images=images,
        tells_times=bool(stated.get("add_time_instruction")),
        has_newline=not is_unires,
    )
    try:
        text = Qwen2Config(architectures=["Qwen2ForCausalLM"], **_of_text(stated))
    except Exception as error:  # transformers validates with whatever its validators raise
        raise ValueError(f"METok cannot read the config of {model}: {reason(error)}.") from None
    config = LlavaOnevisionConfig(
        architectures=list(stated["architectures"]),
        text_config=text,
        vision_config=tower.config,
        vision_feature_layer=tower.layer,
        vision_feature_select_strategy=tower.strategy,
        image_grid_pinpoints=tiles or [[tower.config.image_size] * 2],
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=stated.get("dtype", stated.get("torch_dtype")),
    )
    config.name_or_path = model
    setattr(config, LAYOUT, asdict(layout))
    return config


def _of_text(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are the language model's. The authors' class drops `rope_scaling`, whatever it says."""
    known = {*Qwen2Config().to_dict(), "rope_theta"}
    known -= {"architectures", "model_type", "transformers_version", "_name_or_path"}
    text = {key: value for key, value in stated.items() if key in known and value is not None}
    return text | ({"dtype": stated["torch_dtype"]} if stated.get("torch_dtype") else {})


def _tower(stated: Mapping[str, Any], model: str) -> _Tower:
    """The tower that `mm_vision_tower` names: a published one, or the folder of one with its config.json."""
    name = str(stated.get("mm_vision_tower") or stated.get("vision_tower") or "")
    folder = Path(model) / name
    if name and (folder / "config.json").is_file():
        try:
            sizes = json.loads((folder / "config.json").read_bytes())
            kind = str(sizes["model_type"])
            sizes = {key: value for key, value in sizes.get("vision_config", sizes).items() if key != "model_type"}
            return _clip(**sizes) if kind.startswith("clip") else _siglip(**sizes)
        except Exception as error:
            raise ValueError(f"METok cannot read the config of {folder}: {reason(error)}.") from None
    tower = _known_tower(name.rstrip("/").rpartition("/")[2])
    if tower is None:
        raise ValueError(
            f"METok cannot serve {model}: its mm_vision_tower is {json.dumps(name)}, and METok needs "
            "openai/clip-vit-large-patch14-336, google/siglip-so400m-patch14-384 or a folder with a config.json."
        )
    return tower


def _tiles(pinpoints: Any, side: int) -> list[list[int]] | None:
    """Sizes [height, width] that a picture may be tiled to, or None where the config has no usable ones.

    The authors write [[width, height], ...], the same as text, or "(1x1),...,(6x6)" in tiles of `side`
    pixels.
    """
    if isinstance(pinpoints, str) and (corners := re.findall(r"\((\d+)x(\d+)\)", pinpoints)):
        (left, low), (right, high) = ([int(n) for n in corner] for corner in (corners[0], corners[-1]))
        pinpoints = [[i * side, j * side] for i in range(left, right + 1) for j in range(low, high + 1)]
    elif isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            return None
    try:
        tiles = [[int(height), int(width)] for width, height in pinpoints]
    except (TypeError, ValueError):
        return None
    whole = all(n >= side and n % side == 0 for tile in tiles for n in tile)
    return tiles if tiles and whole else None
