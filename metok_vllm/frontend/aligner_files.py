"""A dual tower's checkpoint, looked through before anything is loaded.

All that a video's request or a worker would meet only later is met here, in the process that the operator
started: the files, the sizes in the config, and what tokenizer and image processor make of an example.
Code in the folder (`auto_map`) is never run, with vLLM's ``--trust-remote-code`` neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metok_vllm.frontend.aligner_inputs import AlignerProcessor, reading
from metok_vllm.frontend.weight_files import tensor_shapes

TOWERS = ("siglip", "clip")
"""`model_type` of the towers that can align."""


def check_aligner(tower: str) -> None:
    """Refuse a dual tower that cannot work.

    Args:
        tower: a folder, or a name on the Hugging Face hub. Of a name the weights are not looked at: the
            worker gets them.

    Raises:
        ValueError: in one sentence that names the file or the part that is at fault.
    """
    is_local = os.path.lexists(tower)
    if is_local and not os.path.isdir(tower):
        broken = os.path.islink(tower) and not os.path.exists(tower)
        what = "a broken link" if broken else "a file"
        raise ValueError(f"METok: the aligner {tower} is {what}; it must be a folder with a SigLIP or CLIP checkpoint.")
    config = _config(tower)
    parameters = _parameters(tower, config)
    if is_local:
        _check_weights(tower, parameters)
    _check_inputs(tower, config)


def _config(tower: str) -> Any:
    from transformers import AutoConfig

    with reading(tower, "config.json"):
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    if config.model_type not in TOWERS:
        raise ValueError(
            f"METok: the aligner {tower} is a {config.model_type} model; it must be one of {', '.join(TOWERS)}."
        )
    return config


def _parameters(tower: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the config asks for; building on the device `meta` allocates nothing."""
    from transformers import AutoModel

    with reading(tower, "config.json"):
        vision, text = config.vision_config, config.text_config
        if vision.image_size < vision.patch_size or vision.image_size // vision.patch_size > 1024:
            raise ValueError(f"image_size {vision.image_size} does not fit patch_size {vision.patch_size}")
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        # SigLIP compares the two towers as they are; CLIP projects both to the same size.
        image, question = vision.hidden_size, getattr(text, "projection_size", vision.hidden_size)
        if config.model_type == "siglip" and image != question:
            raise ValueError(f"its images come out in {image} dimensions and its texts in {question}")
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_weights(tower: str, parameters: dict[str, tuple[int, ...]]) -> None:
    with reading(tower, "weights"):
        held = tensor_shapes(Path(tower))
        if not held.keys() & parameters.keys():
            return  # names of an older layout, which transformers may know; what is missing the worker finds
        for name, shape in parameters.items():
            if name not in held:
                raise ValueError(f"{name} is missing")
            if held[name] != shape:
                raise ValueError(f"{name} has the shape {list(held[name])}, and config.json asks for {list(shape)}")


def _check_inputs(tower: str, config: Any) -> None:
    """One frame and one question, as requests bring them."""
    processor = AlignerProcessor(tower)
    with reading(tower, "tokenizer"):
        ids = processor.windows("A dog runs after a ball.")
        if processor.reads_nothing("A dog runs after a ball."):
            raise ValueError("it knows no word of a question; its vocabulary is missing")
        if int(ids.max()) >= config.text_config.vocab_size:
            raise ValueError(
                f"it gives ids up to {int(ids.max())}, and config.json has {config.text_config.vocab_size}"
            )
    with reading(tower, "preprocessor_config.json"):
        made = tuple(processor.pixels(np.zeros((1, 48, 64, 3), dtype=np.uint8)).shape)
        side = config.vision_config.image_size
        if made != (1, config.vision_config.num_channels, side, side):
            raise ValueError(
                f"it makes frames of {made[-1]} x {made[-2]} pixels, and config.json takes {side} x {side}"
            )
