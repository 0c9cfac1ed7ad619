"""Model folders for the engine benchmark: tiny random checkpoints,
and published shapes without weights. Qwen's are in `qwen.py`.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import qwen
from benchmarks.engine.families import LLAVA_ONEVISION, Family, Grid, by_model_type, mean_over_layers
from metok_vllm.compression.accounting import VisualTokens
from metok_vllm.compression.selection import prune_layers

FORMAT = 2
"""Changes with what `write_model` writes,
so that folders of an older version of this file are written anew.
"""


@dataclass(frozen=True)
class LanguageShape:
    """A Qwen2 language model's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool  # input and output embeddings are one


# llava-onevision-qwen2-0.5b-ov-hf and -7b-ov-hf.
PUBLISHED = {
    "0.5b": LanguageShape(24, 896, 14, 2, 4864, 152_000, tied=True),
    "7b": LanguageShape(28, 3584, 28, 4, 18_944, 152_128, tied=False),
}

# SigLIP so400m-patch14-384 as the published LLaVA-OneVision checkpoints have it: the 27th layer, whose output
# the model never uses, is not there.
TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True)
class BenchmarkModel:
    """A folder that vLLM can load, and what the benchmark must know of it."""

    name: str
    path: Path
    family: Family
    layers: int  # of the language model
    grid: Grid  # of a frame, or of the frames that the tower takes at once
    frame: Grid  # height and width of a frame in pixels
    dummy: bool  # there are no weights: vLLM makes them up
    video_token: int  # id of the placeholders of a video

    def stock_tokens(self, frames: int) -> int:
        """Visual tokens of a video in stock vLLM."""
        return self.family.stock_tokens(frames, self.grid)

    def label_tokens(self, frames: int) -> int:
        """Text tokens inside a video, at the most."""
        return self.family.steps(frames) * self.family.most_label

    def expected(self, frames: int) -> VisualTokens:
        """Visual tokens of a video with METok's preset `paper`, for events of equal length."""
        return self.family.expected(frames, self.grid)

    def expected_mean(self, frames: int) -> float:
        """The mean of `expected` over the layers in prefill."""
        return mean_over_layers(self.expected(frames), self.prune_layers, self.layers)

    @property
    def prune_layers(self) -> tuple[int, int, int]:
        """METok's L1, L2 and L3, as it chooses them."""
        return prune_layers(self.layers)


def write_model(name: str, root: Path) -> BenchmarkModel:
    """The model called `name`: "tiny", "0.5b", "7b", one of `qwen.MODELS`, or a folder with a checkpoint.

    All but the last are written below `root` unless they are there already.

    Raises:
        ValueError: `name` is none of these.
    """
    known = ("tiny", *PUBLISHED, *qwen.MODELS)
    if name in known:
        folder = root / (name if name in qwen.MODELS else f"llava-onevision-{name}")
        stamp = folder / "benchmark-format"
        if not stamp.exists() or stamp.read_text() != str(FORMAT):
            if name in qwen.MODELS:
                qwen.write(name, folder)
            elif name == "tiny":
                _write_tiny(folder)
            else:
                _write_published(folder, PUBLISHED[name])
            stamp.write_text(str(FORMAT))
        is_tiny = name == "tiny" or name.endswith("-tiny")
        return describe(name, folder, dummy=not is_tiny, is_tiny=is_tiny)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be {', '.join(known)} or a model's folder, not {name!r}")
    return describe(folder.resolve().name, folder, dummy=not list(folder.glob("*.safetensors")))


def describe(name: str, folder: Path, dummy: bool, is_tiny: bool = False) -> BenchmarkModel:
    """Read a model folder's config. `is_tiny`: frames are small, where the config leaves their size open.

    Raises:
        ValueError: the benchmark has no such family.
    """
    config = json.loads((folder / "config.json").read_text())
    family = by_model_type(config.get("model_type"))
    vision, text = config["vision_config"], config.get("text_config", config)
    if family is LLAVA_ONEVISION:
        height = width = vision["image_size"]
    else:
        height, width = family.tiny_frame if is_tiny else family.frame
    token = int(vision.get("patch_size", 14)) * family.merge  # Qwen2.5-VL's own config leaves its 14 out
    grid = height // token, width // token
    video_token = config["video_token_index" if family is LLAVA_ONEVISION else "video_token_id"]
    return BenchmarkModel(name, folder, family, text["num_hidden_layers"], grid, (height, width), dummy, video_token)


def _write_tiny(folder: Path) -> None:
    from metok_vllm.demo.checkpoint import build_checkpoint

    build_checkpoint(folder)


def _write_published(folder: Path, shape: LanguageShape) -> None:
    """Config, tokenizer and processor files, no weights.

    The tokenizer is the tiny checkpoint's: 512 tokens at the bottom of a vocabulary of the published size.
    """
    from metok_vllm.demo.checkpoint import build_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tiny = build_checkpoint(
            Path(scratch) / "tiny", layers=1, image_size=TOWER["image_size"], patch_size=TOWER["patch_size"]
        )
        for file in tiny.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, folder / file.name)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_window_layers": shape.layers,
        "layer_types": ["full_attention"] * shape.layers,
        "dtype": "bfloat16",
    }
    config["vision_config"] |= TOWER
    config |= {"dtype": "bfloat16", "tie_word_embeddings": shape.tied}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def spread_weights(model: Any) -> None:
    """Refill made-up weights, in place, so that activations keep their
    scale and frames differ from each other.

    vLLM's own dummy weights are all near zero: every frame would look alike to METok, and its events would be
    degenerate.
    """
    import torch

    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if not parameter.is_floating_point():
                continue
            generator = torch.Generator(device=parameter.device).manual_seed(index)
            is_norm = "norm" in name or name.endswith("ln_q.weight")
            if parameter.dim() < 2:
                scale = 0.02 if name.endswith("bias") or is_norm else 1.0
                parameter.normal_(0, scale, generator=generator)
                if is_norm and not name.endswith("bias"):
                    parameter.add_(1)
            elif "position_embedding" in name or "pos_embed" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0, 0.5, generator=generator)
            else:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
