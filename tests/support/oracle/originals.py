"""Checkpoints in the format of LLaVA's authors, read by the tests themselves: the judge of METok's reader.

The weights are put into transformers' LLaVA-OneVision under their names there. What that class does otherwise
(pooling, newlines, pictures) the oracle does by itself, by the `Layout` that the model carries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    Qwen2Tokenizer,
    SiglipImageProcessor,
)

from metok_vllm.demo.original_checkpoint import Kind, build_original_checkpoint
from tests.support.oracle.samples import QUESTION, Sample
from tests.support.oracle.stage1 import Layout

LAYOUTS: dict[Kind, Layout] = {
    "longva": Layout("average", "none", "unires"),
    "longva-dpo": Layout("average", "none", "unires"),
    "llava-onevision": Layout("bilinear", "event"),
    "llava-video": Layout("bilinear", "row"),
}


@dataclass(frozen=True)
class Parts:
    """What a processor of transformers would have."""

    tokenizer: Any
    frames: Any
    pictures: Any


def time_instruction(times: list[float], seconds: float) -> str:
    """What LLaVA-Video reads behind a video (the authors' README); `times` of its frames, in seconds."""
    located = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {seconds:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {located}.Please answer the following questions related to this video."
    )


@dataclass(frozen=True)
class OriginalSample(Sample):
    """As `Sample`; its `processor` is `Parts`."""

    tells_times: bool = False

    def prompt_ids(self, question: str = QUESTION, *, videos: int = 1, images: int = 0, between: str = "") -> list[int]:
        """ChatML with the default system prompt, placeholders on lines of their own, images first."""
        places = ["<image>"] * images + ["<video>"] * videos
        user = "\n".join([*places, question]).replace("<video>", f"<video>{between}", 1)
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        text = f"{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.processor.tokenizer(text).input_ids)

    def pixels(self, video: NDArray[np.uint8]) -> Tensor:
        return self.processor.frames(list(video), return_tensors="pt")["pixel_values"]

    def image_inputs(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        out = self.processor.pictures(pictures, return_tensors="pt")
        return out["pixel_values"], out["image_sizes"]


def load_original(folder: Path, kind: Kind, **shape: Any) -> OriginalSample:
    """Build a checkpoint with `build_original_checkpoint(folder, kind, **shape)` and load it."""
    path = build_original_checkpoint(folder, kind, **shape)
    stated = json.loads((path / "config.json").read_text())
    tower = json.loads((path / "vision_tower" / "config.json").read_text())
    is_clip = tower["model_type"] == "clip_vision_model"
    if not is_clip:  # the authors' tower leaves out the last layer
        tower |= {"num_hidden_layers": tower["num_hidden_layers"] - 1, "vision_use_head": False}
    side = tower["image_size"]
    tilings = [[side * i, side * j] for i in (1, 2) for j in (1, 2)]
    tokenizer = Qwen2Tokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "rope_theta", "bos_token_id", "eos_token_id"]
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", "tie_word_embeddings": False, **{name: stated[name] for name in names}},
        vision_config=tower,
        vision_feature_layer=-2 if is_clip else -1,
        vision_feature_select_strategy="default" if is_clip else "full",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tilings,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model: Any = LlavaOnevisionForConditionalGeneration(config).float().eval()
    files = sorted(path.glob("model-*.safetensors"))
    weights = {transformers_name(name): value for file in files for name, value in load_file(file).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"model.image_newline"}, missing
    if missing:
        with torch.no_grad():
            model.model.image_newline.fill_(float("nan"))  # nobody may use it
    model.layout = LAYOUTS[kind]
    square = {"height": side, "width": side}
    tones: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    frames: Any = SiglipImageProcessor(size=square, resample=3)
    if is_clip:
        frames = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        tones = {}
    pictures = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=tilings, **tones)
    return OriginalSample(path, model, Parts(tokenizer, frames, pictures), kind == "llava-video")


def transformers_name(name: str) -> str:
    """What transformers calls a weight of the authors."""
    if name.startswith("lm_head."):
        return name
    name = name.removeprefix("model.")
    if name.startswith("vision_tower."):
        return "model." + name.replace("vision_tower.vision_tower.vision_model.", "vision_tower.")
    if name.startswith("mm_projector."):
        number = {"0": "1", "2": "2"}[name.split(".")[1]]
        return f"model.multi_modal_projector.linear_{number}.{name.split('.')[2]}"
    return f"model.{name}" if name == "image_newline" else f"model.language_model.{name}"
