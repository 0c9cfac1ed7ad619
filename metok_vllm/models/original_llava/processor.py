"""The processor of an original-format checkpoint, which is published without a preprocessor_config.json."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on (transformers `OPENAI_CLIP_MEAN`, `OPENAI_CLIP_STD`)."""


def build_processor(config: Any, tokenizer: Any) -> LlavaOnevisionProcessor:
    """Frames and tiles to pixels as the authors' own processors do.

    CLIP: the shortest edge to the tower's size, bicubic, then the centre. SigLIP: squeezed to a square,
    bicubic. Tiles of pictures already have the tower's size. transformers resizes with torchvision here, the
    authors with PIL, so single values of pixels differ by a rounding.

    Args:
        config: from `read_config`, with the ids of the placeholders.
        tokenizer: the checkpoint's.
    """
    vision = config.vision_config
    side = int(vision.image_size)
    square = {"height": side, "width": side}
    frames: dict[str, Any] = {"size": square}
    tones: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if isinstance(vision, CLIPVisionConfig):
        frames = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        tones = {"image_mean": MEAN, "image_std": DEVIATION}
    processor: Any = LlavaOnevisionProcessor
    return processor(  # type: ignore[no-any-return]
        image_processor=LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=config.image_grid_pinpoints, **tones
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**frames, **tones),
        num_image_tokens=(side // int(vision.patch_size)) ** 2,
        vision_feature_select_strategy="full",  # the tokens above have no class token among them
        chat_template=tokenizer.chat_template,
    )
