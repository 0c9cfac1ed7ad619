"""The dual tower beside the model's own: frames and question to embeddings
that can be compared (docs/method.md section 1.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FRAMES_PER_BLOCK = 32
"""Frames that go through a tower at once; bounds its activations for long videos."""


class DualTower(nn.Module):
    """A paired image and text tower, SigLIP or CLIP."""

    def __init__(self, tower: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        from transformers import AutoModel

        with torch.device("cpu"):
            model = AutoModel.from_pretrained(tower, dtype=torch.float32)
        self.model = model.to(device=device, dtype=dtype).eval()

    @torch.inference_mode()
    def frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pooled image embedding of every frame: `pixels[T, 3, h, w]` to [T, E]."""
        dtype = next(self.model.parameters()).dtype
        blocks = [
            self._pooled(self.model.get_image_features(block.to(dtype)))
            for block in torch.split(pixels, FRAMES_PER_BLOCK)
        ]
        return torch.cat(blocks)

    @torch.inference_mode()
    def text(self, windows: torch.Tensor) -> torch.Tensor:
        """Text embedding of every window: int64 `windows[W, length]` to [W, E]."""
        return self._pooled(self.model.get_text_features(windows))

    @staticmethod
    def _pooled(features: Any) -> torch.Tensor:
        pooled: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
        return pooled
