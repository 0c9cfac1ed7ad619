"""Tiny Qwen3.5 checkpoints, dense and with experts, and requests for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from metok_vllm.demo.qwen3_5_checkpoint import Qwen3_5Kind, build_qwen3_5_checkpoint
from tests.support.oracle.qwen3_5 import LAYOUT
from tests.support.oracle.qwen3_samples import Qwen3Sample


def load_qwen3_5(folder: Path, kind: Qwen3_5Kind, **shape: Any) -> Qwen3Sample:
    """Build a checkpoint with `build_qwen3_5_checkpoint(folder, kind, **shape)` and load it."""
    path = build_qwen3_5_checkpoint(folder, kind, **shape)
    which: Any = Qwen3_5MoeForConditionalGeneration if kind == "qwen3.5-moe" else Qwen3_5ForConditionalGeneration
    model = which.from_pretrained(path, attn_implementation="eager").eval()
    model.layout = LAYOUT
    return Qwen3Sample(path, model, AutoProcessor.from_pretrained(path), kind)
