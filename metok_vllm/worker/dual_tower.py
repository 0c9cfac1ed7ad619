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
    """A paired image and text tower, SigLIP or CLIP.

    Args:
        tower: folder or hub name of the checkpoint; the files of a folder have been looked through at start
            (`frontend/aligner_files.py`).

    Raises:
        ValueError: its weights cannot be loaded, or are not all there.
    """

    def __init__(self, tower: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        from transformers import AutoModel

        try:
            with torch.device("cpu"):
                model, found = AutoModel.from_pretrained(
                    tower, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
                )
        except Exception as error:  # transformers raises whatever its parsers meet
            said = " ".join(str(error).split())
            raise ValueError(f"METok: the aligner {tower} cannot be loaded: {said:.200}.") from error
        if found["missing_keys"]:  # transformers would go on with random numbers in their place
            name = min(found["missing_keys"])
            raise ValueError(f"METok: the aligner {tower} cannot be loaded: its weights have no {name}.")
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
