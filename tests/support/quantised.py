"""Checkpoints with a quantised language model, and of each the plain model with the same rounded weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from tests.support.oracle.samples import Sample

Kind = Literal["int4", "int8"]
GROUP = 32
WEIGHTS: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
SCHEMES: dict[Kind, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"weights": {**WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": GROUP}}),
    "int8": (
        "int-quantized",
        {
            "weights": {**WEIGHTS, "num_bits": 8, "strategy": "channel"},
            "input_activations": {**WEIGHTS, "num_bits": 8, "strategy": "token", "dynamic": True},
        },
    ),
}


def quantise(sample: Sample, folder: Path, kind: Kind) -> Sample:
    """The sample in the format of compressed-tensors. `int4` rounds weights; `int8` in vLLM activations too.

    Returns:
        The quantised checkpoint; its `model`, for the oracle, has the rounded weights in float32.
    """
    tensors = load_file(sample.path / "model.safetensors")
    rounded = dict(tensors)
    for name in list(tensors):
        if name.startswith("language_model.model.layers.") and name.endswith("_proj.weight"):
            stored, rounded[name] = (_int4 if kind == "int4" else _int8)(tensors.pop(name))
            tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in stored.items()}
    format_, scheme = SCHEMES[kind]
    stated = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
    }
    config = json.loads((sample.path / "config.json").read_text())
    _write(sample.path, folder / "quantised", tensors, {**config, "quantization_config": stated})
    _write(sample.path, folder / "plain", rounded, config)
    model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(folder / "plain", attn_implementation="eager")
    return Sample(folder / "quantised", model.eval(), sample.processor)


def _write(source: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    values = (groups / scale).round()
    eights = (values + 8).long().view(weight.shape[0], -1, 8)
    packed = sum((eights[..., i] << 4 * i for i in range(8)), torch.zeros_like(eights[..., 0]))
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    stored = {"weight_packed": packed, "weight_scale": scale[..., 0], "weight_shape": torch.tensor(weight.shape)}
    return stored, (values * scale).view_as(weight)


def _int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round()
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale
