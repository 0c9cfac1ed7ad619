"""Tiny random checkpoints of InternVL3 in its authors' format, for tests and `make demo MODEL=`.

    python -m metok_vllm.demo.internvl_chat_checkpoint FOLDER

The folder holds what a published `InternVL3-*` one holds: a config with the code that reads it, so that a
server needs `--trust-remote-code`, weights, tokenizer and chat template; no processor's config. The model is
that of `internvl_checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from metok_vllm.demo.internvl_checkpoint import MOST_TILES, PATCH, Language, random_model, write_ends

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
)

_CODE = '''"""Reads the config of a checkpoint in the format of InternVL3's authors."""

from transformers import CONFIG_MAPPING, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **others):
        super().__init__(**others)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        llm_config = llm_config or {"model_type": "qwen2"}
        self.llm_config = CONFIG_MAPPING[llm_config["model_type"]](**llm_config)
'''

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_NAMES = (
    (r"^model\.vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^model\.vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^model\.vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"^model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.qkv."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)


def build_internvl_chat_checkpoint(
    path: str | Path,
    language: Language = "qwen3",
    *,
    seed: int = 0,
    layers: int = 8,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 256,
    side: int = 4,
) -> Path:
    """Write a random tiny checkpoint into folder `path`; arguments as of `build_internvl_checkpoint`.

    Returns `path`.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "intermediate": intermediate}
    model, tokenizer = random_model(SPECIALS, language, side, seed, **sizes)
    save_file(_published(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model.config), indent=2) + "\n")
    (folder / "configuration_internvl_chat.py").write_text(_CODE)
    write_ends(folder, tokenizer)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the authors' names, queries, keys and values of the tower in one."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".vision_tower." in name and re.search(r"\.attention\.[qkv]_proj\.", name):
            if ".q_proj." not in name:
                continue
            value = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        for old, new in _NAMES:
            name = re.sub(old, new, name)
        found[name] = value.contiguous()
    return found


def _config(config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config.to_dict()
    size = vision.image_size[0]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": size,
        "max_dynamic_patch": MOST_TILES,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "llm_config": {key: value for key, value in text.items() if key != "transformers_version"},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": size,
            "initializer_factor": 1.0,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": PATCH,
            "qk_normalization": False,
            "qkv_bias": True,
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A tiny random checkpoint of InternVL3 in its authors' format.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language", choices=get_args(Language), default="qwen3")
    asked = parser.parse_args()
    print(build_internvl_chat_checkpoint(asked.folder, asked.language))
