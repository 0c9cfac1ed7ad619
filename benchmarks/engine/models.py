"""Model folders for the engine benchmark: a tiny random checkpoint,
and the published shapes without weights.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    layers: int
    grid: int  # patches on a side of the tower's grid
    image_size: int  # pixels on a side of a frame
    dummy: bool  # there are no weights: vLLM makes them up


def write_model(name: str, root: Path) -> BenchmarkModel:
    """The model called `name`: "tiny", "0.5b", "7b", or a folder with a LLaVA-OneVision checkpoint.

    The first three are written below `root` unless they are there already.

    Raises:
        ValueError: `name` is none of these.
    """
    if name == "tiny" or name in PUBLISHED:
        folder = root / f"llava-onevision-{name}"
        stamp = folder / "benchmark-format"
        if not stamp.exists() or stamp.read_text() != str(FORMAT):
            _write_tiny(folder) if name == "tiny" else _write_published(folder, PUBLISHED[name])
            stamp.write_text(str(FORMAT))
        return describe(name, folder, dummy=name != "tiny")
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model must be tiny, {', '.join(PUBLISHED)} or a model's folder, not {name!r}")
    return describe(folder.resolve().name, folder, dummy=not list(folder.glob("*.safetensors")))


def describe(name: str, folder: Path, dummy: bool) -> BenchmarkModel:
    """Read a model folder's config.

    Raises:
        ValueError: it is no LLaVA-OneVision model.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llava_onevision":
        raise ValueError(f"the benchmark is for LLaVA-OneVision models, not {config.get('model_type')!r}")
    vision, text = config["vision_config"], config["text_config"]
    side = vision["image_size"]
    return BenchmarkModel(name, folder, text["num_hidden_layers"], side // vision["patch_size"], side, dummy)


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
            if parameter.dim() < 2:
                scale = 0.02 if name.endswith("bias") or "norm" in name else 1.0
                parameter.normal_(0, scale, generator=generator)
                if "norm" in name and not name.endswith("bias"):
                    parameter.add_(1)
            elif "position_embedding" in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0, 0.5, generator=generator)
            else:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
