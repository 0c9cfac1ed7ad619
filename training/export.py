"""Write a trained model as a Hugging Face folder that transformers and stock vLLM load unchanged.

Usage::

    python -m training.export --tower runs/tower/tower.pt --lm runs/lm --aligner runs/aligner --out out/model

Tensors are bfloat16, under the names published LLaVA-OneVision checkpoints use.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from training.lm import LMConfig
from training.tokenizer import END, IMAGE, PAD, START, VIDEO, load_tokenizer
from training.tower import Tower
from training.train_lm import Model, load_tower
from training.world import SIZE

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ '\\n' + message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MAX_POSITIONS = 4096
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")


def tower_weights(tower: Tower) -> dict[str, Tensor]:
    """Tower parameters under published names (``vision_tower.vision_model....``)."""
    root, c = "vision_tower.vision_model.", tower.c
    # training flattens a patch as (colour, row, column), which is the convolution's own order
    patch = tower.patch_embedding.weight.view(c.hidden, 3, c.patch, c.patch)
    out = {
        f"{root}embeddings.patch_embedding.weight": patch,
        f"{root}embeddings.patch_embedding.bias": tower.patch_embedding.bias,
        f"{root}embeddings.position_embedding.weight": tower.position_embedding,
        f"{root}post_layernorm.weight": torch.ones(c.hidden),  # not on the path of the video model
        f"{root}post_layernorm.bias": torch.zeros(c.hidden),
    }
    for number, block in enumerate(tower.blocks):
        for name, p in block.named_parameters():
            part = name.split(".")[0]
            group = "self_attn." if part in _ATTENTION else "mlp." if part.startswith("fc") else ""
            out[f"{root}encoder.layers.{number}.{group}{name}"] = p
    return out


def model_weights(tower: Tower, model: Model) -> dict[str, Tensor]:
    """All parameters of the video model under published names."""
    out = tower_weights(tower)
    out["image_newline"] = model.newline
    for part, layer in (("linear_1", tower.linear_1), ("linear_2", model.last)):
        out[f"multi_modal_projector.{part}.weight"] = layer.weight
        out[f"multi_modal_projector.{part}.bias"] = layer.bias
    root = "language_model.model."
    out["language_model.lm_head.weight"] = model.lm.lm_head.weight
    out[f"{root}embed_tokens.weight"] = model.lm.embed_tokens.weight
    out[f"{root}norm.weight"] = model.lm.norm
    for number, layer in enumerate(model.lm.layers):
        for name, p in layer.named_parameters():
            part = name.split(".")[0]
            if part.endswith("layernorm"):
                name = f"{name}.weight"
            group = "self_attn." if part in _ATTENTION else "mlp." if part.endswith("_proj") else ""
            out[f"{root}layers.{number}.{group}{name}"] = p
    return {k: v.detach() for k, v in out.items()}


def hf_config(c: LMConfig, tower: Tower, ids: dict[str, int]) -> LlavaOnevisionConfig:
    """The model's config; ``ids`` maps special tokens to their ids."""
    t = tower.c
    text = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.intermediate,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.eps,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": ids[PAD],
        "pad_token_id": ids[PAD],
        "eos_token_id": ids[END],
        "dtype": "bfloat16",
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": t.hidden,
        "intermediate_size": t.intermediate,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "image_size": SIZE,
        "patch_size": t.patch,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_index=ids[IMAGE],
        video_token_index=ids[VIDEO],
        image_grid_pinpoints=[[SIZE * r, SIZE * k] for r in (1, 2) for k in (1, 2)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def hf_tokenizer(folder: Path, window: int = MAX_POSITIONS) -> PreTrainedTokenizerFast:
    """The run folder's tokenizer as transformers wraps it."""
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=load_tokenizer(folder),
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, IMAGE, VIDEO],
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def export(tower: Tower, model: Model, tokenizer_folder: Path, out: Path) -> Path:
    """Write the video model's folder; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = hf_tokenizer(tokenizer_folder)
    ids = {t: int(tokenizer.convert_tokens_to_ids(t)) for t in (PAD, START, END, IMAGE, VIDEO)}
    config = hf_config(model.lm.c, tower, ids)
    weights = {k: v.to(torch.bfloat16).contiguous().clone() for k, v in model_weights(tower, model).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    generation = {
        "bos_token_id": ids[PAD],
        "pad_token_id": ids[PAD],
        "eos_token_id": ids[END],
        "do_sample": False,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    pixels: dict[str, Any] = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image = LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **pixels)
    video = LlavaOnevisionVideoProcessor(**pixels)
    make: Any = LlavaOnevisionProcessor
    make(
        image_processor=image,
        tokenizer=tokenizer,
        video_processor=video,
        num_image_tokens=tower.c.grid**2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    image.save_pretrained(out)
    video.save_pretrained(out)
    return out


def export_aligner(path: Path, tower: Tower, tokenizer_folder: Path, out: Path) -> Path:
    """Write the paired text/image tower's folder; returns it."""
    from training.train_aligner import WINDOW, build

    tokenizer = hf_tokenizer(tokenizer_folder, WINDOW)
    tokenizer.model_input_names = ["input_ids"]
    model: Any = build(len(tokenizer), tower.c)
    model.load_state_dict(torch.load(path, map_location="cpu")["model"])
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(out)
    return out


def load_model(folder: Path, tower: Tower) -> tuple[Model, dict[str, Any]]:
    """The fp32 model of a run folder's ``last.pt``, and the run's state beside it."""
    state = torch.load(folder / "last.pt", map_location="cpu")
    model = Model(LMConfig(**state["config"]), tower)
    model.load_state_dict(state.pop("model"))
    return model.eval(), state


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--tower", "--lm", "--out"):
        ap.add_argument(name, type=Path, required=True)
    ap.add_argument("--aligner", type=Path, help="folder of train_aligner; none: no metok_aligner/")
    args = ap.parse_args()
    tower = load_tower(args.tower)
    model, _ = load_model(args.lm, tower)
    export(tower, model, args.lm, args.out)
    if args.aligner:
        export_aligner(args.aligner / "aligner.pt", tower, args.lm, args.out / "metok_aligner")
    card = Path(__file__).parent / "README.md"
    if card.exists():
        shutil.copy(card, args.out / "README.md")
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
