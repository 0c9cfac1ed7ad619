"""The definition of frame vectors and adjacent similarities, in float32 torch."""

from __future__ import annotations

import torch


def reference(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Same argument and result as `event_similarity`."""
    mean = features.float().mean(1)
    norm = mean.norm(dim=1).clamp_min(1e-12)
    return mean, (mean[:-1] * mean[1:]).sum(1) / (norm[:-1] * norm[1:])
