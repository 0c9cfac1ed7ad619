"""A tiny random LLaVA-OneVision checkpoint in Hugging Face format, for tests and for an untrained demo.

The folder holds what a published `llava-onevision-qwen2-*-ov-hf` one holds, under the same tensor names, so
that transformers and stock vLLM both load it unchanged: config, weights, tokenizer, chat template and the
three processor configs. Nothing is downloaded. The weights are random but scaled: attention is peaked, logits
are spread without being saturated, frames of different content get clearly different features, so that two
implementations that differ in one token of one layer do not agree by accident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

AlignerKind = Literal["siglip", "clip"]

ALIGNER_FOLDER = "metok_aligner"
"""Name of the paired image/text tower's folder inside the model's own folder."""

ALIGNER_WINDOW = 16
"""Tokens the tiny aligner's text tower reads at once: so few that ordinary questions need several windows."""

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_VOCAB_SIZE = 512
_ALIGNER_VOCAB_SIZE = 384

# As the published checkpoints render: images, videos, then the text, whatever their order in the message.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ '\\n' + message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CORPUS = """
What is happening in this video? A band plays on a small stage while people dance in front of it.
Which animal appears first, the rabbit or the bird? The white rabbit looks at the butterfly.
How many people are in the room at the end of the video? There are three people and one dog near the window.
What colour is the car that stops at the corner? The red car stops behind the blue truck and waits.
Describe the scene in one sentence. In the morning a man walks along the river to the city at night.
Does the woman open the door before or after the phone rings? She opens the door after the phone rings twice.
Where does the ball go when the boy throws it? It flies over the wall, falls into the garden and rolls on.
Answer with the letter of the correct option: (A) singing (B) running (C) cooking (D) sleeping.
What happens between the first and the second event? The picture changes from a close view to a wide view.
You are a helpful assistant. Who is holding the guitar, and what are the other players doing during the song?
"""


def build_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    layers: int = 8,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 256,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    vision_heads: int = 2,
    image_size: int = 56,
    patch_size: int = 8,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    aligner: AlignerKind | None = None,
) -> Path:
    """Write a random tiny LLaVA-OneVision checkpoint (SigLIP tower, Qwen2 language model) into folder `path`.

    The same arguments always write the same tensors. `image_size` and `patch_size` are in pixels: the tower's
    grid is `image_size // patch_size` patches a side (7 by default). `aligner` adds a paired image/text
    tower, with its tokenizer and image processor, in the sub-folder `metok_aligner` (docs/method.md 1.3).
    Returns `path`.

    Raises ValueError if `heads * head_dim != hidden` (vLLM's Qwen2 derives the head width from the two
    others), if `heads` is not a multiple of `kv_heads`, or if `aligner` is unknown.
    """
    if heads * head_dim != hidden:
        raise ValueError(f"hidden must be heads * head_dim = {heads * head_dim}, got {hidden}")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if aligner not in (None, "siglip", "clip"):
        raise ValueError(f"aligner must be None, 'siglip' or 'clip', got {aligner!r}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = make_tokenizer()
    text = text_config(tokenizer, layers, hidden, heads, kv_heads, intermediate, dtype)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision_hidden,
        "intermediate_size": 2 * vision_hidden,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "vision_use_head": False,
    }
    specials: Any = tokenizer.convert_tokens_to_ids(list(_SPECIAL_TOKENS))
    config = LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_index=specials[_SPECIAL_TOKENS.index("<image>")],
        video_token_index=specials[_SPECIAL_TOKENS.index("<video>")],
        image_grid_pinpoints=_grid_pinpoints(image_size),
        tie_word_embeddings=False,
        dtype=dtype,
    )
    model: Any = LlavaOnevisionForConditionalGeneration(config)
    model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    centre_projector(model, image_size, generator)
    with torch.no_grad():  # a logit of 0 never wins: no end, image or video token is generated by chance
        model.lm_head.weight[specials] = 0

    tensors = {
        published_name(name): tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ends = {key: text[key] for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    save_processor(folder, tokenizer, image_size, patch_size)
    if aligner is not None:
        build_aligner(folder / ALIGNER_FOLDER, aligner, generator, dtype)
    return folder


def text_config(
    tokenizer: PreTrainedTokenizerFast,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    dtype: str,
) -> dict[str, Any]:
    """The Qwen2 part of the config; rotary base and length as in the published checkpoints."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rope_theta": 1_000_000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": dtype,
    }


def _grid_pinpoints(image_size: int) -> list[list[int]]:
    """The (height, width) an image may be tiled to: at most 2 x 2 tiles, so that image prompts stay short."""
    return [[image_size * rows, image_size * columns] for rows in (1, 2) for columns in (1, 2)]


def _train_bpe(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, trained on the built-in corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise RuntimeError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def make_tokenizer(specials: Sequence[str] = _SPECIAL_TOKENS) -> PreTrainedTokenizerFast:
    """The language model's tokenizer: adds no token around a text; special ones come last, as in Qwen2.

    Without the placeholders among `specials` its other ids are the same.
    """
    bpe = _train_bpe(_VOCAB_SIZE - len(_SPECIAL_TOKENS))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = tokenizer_class(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in specials if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def save_processor(folder: Path, tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> None:
    """Write tokenizer, chat template and processor configs, in the files that published checkpoints have."""
    pixels: dict[str, Any] = {
        "size": {"height": image_size, "width": image_size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    image_processor = LlavaOnevisionImageProcessor(image_grid_pinpoints=_grid_pinpoints(image_size), **pixels)
    video_processor = LlavaOnevisionVideoProcessor(**pixels)
    processor_class: Any = LlavaOnevisionProcessor
    processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        num_image_tokens=(image_size // patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    # Readers of the older layout look for these two; newer ones take the copies inside processor_config.json.
    image_processor.save_pretrained(folder)
    video_processor.save_pretrained(folder)


def published_name(name: str) -> str:
    """The tensor name in published checkpoints of the parameter that transformers 5 calls `name`."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Refill every parameter in place, with a spread by role that keeps activations near unit variance."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            role = name.split(".")[-2] if "." in name else name
            if name.endswith("bias"):
                parameter.copy_(0.05 * noise)
            elif "norm" in role:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() < 2:  # image_newline, a class embedding; scalars (a contrastive scale) stay
                parameter.copy_(noise if parameter.dim() else parameter)
            elif "position_embedding" in name:
                parameter.copy_(0.3 * noise)
            elif role in ("embed_tokens", "token_embedding"):
                # Half of a visual token's spread: the context, not the last token alone, decides.
                parameter.copy_(0.5 * noise)
            else:
                # Queries and keys: scores of spread about 2, so some tokens clearly outrank others. The
                # output head: logits of spread about 3, so the best leads by far more than rounding can move.
                gain = {"q_proj": 1.4, "k_proj": 1.4, "lm_head": 3.0, "down_proj": 2.0}.get(role, 1.0)
                parameter.copy_(gain / math.sqrt(parameter[0].numel()) * noise)


def centre_projector(model: Any, image_size: int, generator: torch.Generator) -> None:
    """Shift and scale the projector's output to zero mean and unit spread over random frames.

    A random tower adds a large constant to every token; left there, all frames would look alike to a cosine.
    """
    frames = _random_frames(16, image_size, generator)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        states = model.model.vision_tower(frames, output_hidden_states=True).hidden_states
        tokens = projector(states[model.config.vision_feature_layer]).flatten(0, 1)
        scale = 1 / (tokens - tokens.mean(0)).std()
        projector.linear_2.weight.mul_(scale)
        projector.linear_2.bias.sub_(tokens.mean(0)).mul_(scale)


def _random_frames(count: int, image_size: int, generator: torch.Generator) -> Tensor:
    """`count` smooth random pictures: float32 [count, 3, image_size, image_size], pixel values in [-1, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=(image_size, image_size), mode="bicubic").clamp(-1, 1)


def build_aligner(folder: Path, kind: AlignerKind, generator: torch.Generator, dtype: str) -> None:
    """Write a tiny SigLIP or CLIP: 48-pixel frames, patches of 12 pixels, text window `ALIGNER_WINDOW`.

    As in the published towers, padding repeats the end token: SigLIP reads its text at the last position of a
    text padded to the whole window, CLIP at the first end token.
    """
    specials = ["</s>"] if kind == "siglip" else ["<|startoftext|>", "<|endoftext|>"]
    bpe = _train_bpe(_ALIGNER_VOCAB_SIZE - len(specials))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    start, end = _ALIGNER_VOCAB_SIZE - 2, _ALIGNER_VOCAB_SIZE - 1
    bpe.post_processor = processors.TemplateProcessing(
        single=" ".join([*specials[:-1], "$A", specials[-1]]),
        special_tokens=list(zip(specials, (start, end)[-len(specials) :], strict=True)),
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_object=bpe,
        bos_token=specials[0] if kind == "clip" else None,
        eos_token=specials[-1],
        pad_token=specials[-1],
        model_max_length=ALIGNER_WINDOW,
        model_input_names=["input_ids", "attention_mask"] if kind == "clip" else ["input_ids"],
    )
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text: dict[str, Any] = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": ALIGNER_WINDOW}
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision: dict[str, Any] = shared | {"image_size": 48, "patch_size": 12}
    size = {"height": 48, "width": 48}
    model: Any
    images: Any
    if kind == "siglip":
        text["projection_size"] = 64
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision, dtype=dtype))
        images = SiglipImageProcessor(size=size)
    else:
        text_part, vision_part = CLIPTextConfig(**text), CLIPVisionConfig(**vision)
        config = CLIPConfig(text_config=text_part, vision_config=vision_part, projection_dim=48, dtype=dtype)
        model = CLIPModel(config)
        images = CLIPImageProcessor(size=size, crop_size=size)
    randomise(model, generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
