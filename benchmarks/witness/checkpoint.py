"""A language model as a LLaVA-OneVision checkpoint whose tower reads word embeddings out of pixels.

The engine takes videos, not embeddings, and METok runs there in LLaVA-OneVision. So a caption's words are
painted: each number of an embedding as two pixels, its high and its low byte. The tower's patch convolution
puts the number together again, its one layer adds nothing, and the projector passes it on. What reaches the
language model is each word's embedding to 16 bits, through the stock model's own code, and METok's as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from benchmarks.witness.world import FRAMES, Prompt, Video
from metok_vllm.demo.checkpoint import published_name, save_processor

STRIDE = 2  # what stock pools video with
SIDE = 3  # tokens of a frame of captions are SIDE * SIDE: a caption's eight and a line end
LEVELS = 2**16 - 1
FAR = 16.0  # GELU is the identity from here on, to float32's last bit


def patch_size(hidden: int) -> int:
    """The least side of a patch whose pixels and colours hold two bytes for each of `hidden` numbers."""
    side = 1
    while 3 * side * side < 2 * hidden:
        side += 1
    return side


def write(model: Any, tokenizer: Any, folder: Path, side: int) -> Path:
    """Write the checkpoint.

    Args:
        model: a causal language model that vLLM serves inside LLaVA-OneVision, float32.
        tokenizer: its tokenizer, of the fast kind; gets the tokens `<image>` and `<video>`.
        folder: what to write to.
        side: tokens of a frame in stock resolution are `side * side`.

    Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words: Tensor = model.get_input_embeddings().weight.detach()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    image, video = (int(tokenizer.convert_tokens_to_ids(token)) for token in ("<image>", "<video>"))
    text = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "vocab_size": max(len(tokenizer), len(words)),
        "tie_word_embeddings": False,
    }
    hidden, patch = int(words.shape[1]), patch_size(words.shape[1])
    size = STRIDE * side * patch
    config = LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        text_config=text,
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": hidden,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": model.config.num_attention_heads,
            "image_size": size,
            "patch_size": patch,
            "vision_use_head": False,
        },
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[size, size]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        dtype="float32",
    )
    llava: Any = LlavaOnevisionForConditionalGeneration(config)
    llava.float()
    with torch.no_grad():
        _language(llava, model, words)
        _tower(llava.model, words, patch)
        llava.model.image_newline.copy_(words[_line_end(tokenizer)])
    tensors = {published_name(name): tensor.contiguous().clone() for name, tensor in llava.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ends = {key: text.get(key) for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    save_processor(folder, tokenizer, size, patch)
    return folder


def paint(rows: Tensor, words: Tensor, side: int) -> Tensor:
    """Frames that show embeddings.

    Args:
        rows: [T, n, D], n at most `side * side`; further cells of a frame are grey, which reads as nearly
            zero.
        words: the embedding table [vocabulary, D] that the checkpoint was written with.
        side: as for :func:`write`.

    Returns:
        uint8 [T, H, W, 3]; each row fills `STRIDE` x `STRIDE` patches, so that stock's pooling gives it back.
    """
    frames, count, hidden = rows.shape
    patch, scale = patch_size(hidden), float(words.abs().max())
    cells = torch.zeros(frames, side * side, hidden)
    cells[:, :count] = rows
    numbers = ((cells / scale + 1) / 2 * LEVELS).round().long()
    pixels = torch.full((frames, side * side, 3 * patch * patch), 0, dtype=torch.long)
    pixels[..., 0 : 2 * hidden : 2], pixels[..., 1 : 2 * hidden : 2] = numbers >> 8, numbers & 255
    grid = pixels.view(frames, side, side, 3, patch, patch)
    grid = grid.repeat_interleave(STRIDE, dim=1).repeat_interleave(STRIDE, dim=2)
    # [T, rows of patches, columns, colour, y, x] to [T, rows of patches, y, columns, x, colour]
    return grid.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).to(torch.uint8)


def paint_captions(prompt: Prompt, video: Video, words: Tensor) -> npt.NDArray[np.uint8]:
    """The frames of a video of captions, uint8 [T, H, W, 3], for a checkpoint written with `SIDE`."""
    ids = torch.tensor([prompt.frame(caption) for caption in video.captions])
    line_end = torch.full((FRAMES, SIDE * SIDE - ids.shape[1]), prompt.line_end[0])
    frames: npt.NDArray[np.uint8] = paint(words[torch.cat([ids, line_end], dim=1)], words, SIDE).numpy()
    return frames


def _line_end(tokenizer: Any) -> int:
    ids: list[int] = tokenizer("\n", add_special_tokens=False).input_ids
    return ids[0]


def _language(llava: Any, model: Any, words: Tensor) -> None:
    """The language model's own weights; rows of the new tokens are zero,
    so none of them is ever the most likely.
    """
    llava.model.language_model.load_state_dict(
        {k: v for k, v in model.model.state_dict().items() if not k.startswith("embed_tokens")}, strict=False
    )
    for table, rows in ((llava.model.language_model.embed_tokens, words), (llava.lm_head, model.lm_head.weight)):
        table.weight.zero_()
        table.weight[: len(rows)] = rows


def _tower(model: Any, words: Tensor, patch: int) -> None:
    """The tower that puts the bytes together, and the projector that does nothing."""
    tower, hidden, scale = model.vision_tower, words.shape[1], float(words.abs().max())
    for name, parameter in tower.named_parameters():
        parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    # A pixel p arrives as p / 127.5 - 1; the number is (2 (256 high + low) / LEVELS - 1) * scale.
    kernel = torch.zeros(hidden, 3 * patch * patch)
    for byte, place in ((0, 256.0), (1, 1.0)):
        kernel[torch.arange(hidden), 2 * torch.arange(hidden) + byte] = 2 * place * 127.5 / LEVELS * scale
    embeddings = _one(tower, "patch_embedding")
    embeddings.weight.copy_(kernel.view(hidden, 3, patch, patch))
    embeddings.bias.copy_(kernel.sum(1) - scale)
    for number, linear in enumerate((model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2)):
        linear.weight.copy_(torch.eye(hidden))
        linear.bias.fill_(-FAR if number else FAR)


def _one(module: Any, name: str) -> Any:
    (found,) = [part for path, part in module.named_modules() if path.split(".")[-1] == name]
    return found
