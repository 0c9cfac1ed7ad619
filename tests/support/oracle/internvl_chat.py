"""InternVL3 in its authors' format, read by the tests themselves: weights put into transformers' model,
pictures cut and prompts written from what vLLM's processor says of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from metok_vllm.demo.internvl_chat_checkpoint import build_internvl_chat_checkpoint
from tests.support.oracle.internvl import LAYOUT, Pixels
from tests.support.oracle.internvl_samples import InternVLSample
from tests.support.oracle.samples import QUESTION

TONES = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


@dataclass(frozen=True)
class Parts:
    """What a processor of transformers would have."""

    tokenizer: Any


@dataclass(frozen=True)
class ChatSample(InternVLSample):
    """As `InternVLSample`; its `processor` is `Parts`, and a video is a word of the prompt."""

    @property
    def side(self) -> int:
        return int(self.model.config.vision_config.image_size[0])

    def prompt_ids(self, question: str = QUESTION, *, videos: int = 1, images: int = 0, between: str = "") -> list[int]:
        """As vLLM renders it: placeholders on lines of their own, images first."""
        user = "\n".join([*["<image>"] * images, *["<video>"] * videos, question])
        text = f"<|im_start|>user\n{user.replace('<video>', f'<video>{between}', 1)}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.processor.tokenizer(text).input_ids)

    def as_read(self, ids: list[int]) -> list[int]:
        """With a token for each word that stands for an item, and the marks around each picture."""
        text = self.processor.tokenizer.decode(ids)
        text = text.replace("<image>", "<img><IMG_CONTEXT></img>").replace("<video>", "<|video_pad|>")
        return list(self.processor.tokenizer(text).input_ids)

    def pixels(self, video: Any) -> Any:
        frames = torch.stack([self._toned(Image.fromarray(frame)) for frame in video])
        tokenizer = self.processor.tokenizer
        text = [(tokenizer(f"Frame{i + 1}: <img>").input_ids, tokenizer("</img>").input_ids) for i in range(len(video))]
        return Pixels(frames, text)

    def image_inputs(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """The tiles, row by row, and the whole picture behind them where there are several."""
        found, counts = [], []
        for picture in pictures:
            columns, rows = min(((1, 1), (1, 2), (2, 1)), key=lambda shape: self._rank(picture, *shape))
            large = picture.resize((columns * self.side, rows * self.side))
            boxes = [(x * self.side, y * self.side) for y in range(rows) for x in range(columns)]
            tiles = [large.crop((x, y, x + self.side, y + self.side)) for x, y in boxes]
            tiles += [picture] * (len(tiles) > 1)
            found += [self._toned(tile) for tile in tiles]
            counts.append(len(tiles))
        return torch.stack(found), torch.tensor(counts)

    def _rank(self, picture: Image.Image, columns: int, rows: int) -> tuple[float, float]:
        """How far the shapes are apart; of two as near the larger, if the picture fills half of it."""
        cells = columns * rows
        is_filled = picture.width * picture.height > cells * self.side**2 / 2
        return abs(picture.width / picture.height - columns / rows), -cells if is_filled else cells

    def _toned(self, picture: Image.Image) -> Tensor:
        mean, deviation = TONES
        return (to_tensor(picture.resize((self.side, self.side))) - mean) / deviation


def load_internvl_chat(folder: Path, *args: Any, **shape: Any) -> ChatSample:
    """Build a checkpoint with `build_internvl_chat_checkpoint(folder, ...)` and load it."""
    path = build_internvl_chat_checkpoint(folder, *args, **shape)
    stated = json.loads((path / "config.json").read_text())
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
    vision = {key: value for key, value in stated["vision_config"].items() if key != "model_type"}
    config = InternVLConfig(
        text_config=stated["llm_config"],
        vision_config={**vision, "attention_bias": stated["vision_config"]["qkv_bias"]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=stated["downsample_ratio"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model: Any = InternVLForConditionalGeneration(config).float().eval()
    weights = transformers_weights(load_file(path / "model.safetensors"))
    model.load_state_dict(weights)
    model.layout = LAYOUT
    model.config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return ChatSample(path, model, Parts(tokenizer))


def transformers_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under transformers' names."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        top, _, rest = name.partition(".")
        if top == "mlp1":
            number, _, kind = rest.partition(".")
            part = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}[number]
            found[f"model.multi_modal_projector.{part}.{kind}"] = value
        elif top == "language_model":
            found["model.language_model." + rest.removeprefix("model.") if "lm_head" not in rest else rest] = value
        elif ".attn.qkv." in name:
            for part, own in zip("qkv", value.chunk(3), strict=True):
                found[_of_tower(rest).replace(".attn.qkv.", f".attention.{part}_proj.")] = own
        else:
            found[_of_tower(rest)] = value
    return found


def _of_tower(name: str) -> str:
    for old, new in {
        "encoder.layers.": "encoder.layer.",
        "class_embedding": "cls_token",
        "position_embedding": "position_embeddings",
        "patch_embedding": "patch_embeddings.projection",
        "attn.proj": "attention.projection_layer",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
    }.items():
        name = name.replace(old, new)
    return f"model.vision_tower.{name}"
