"""The definition of frame vectors and adjacent similarities, in float32 torch."""

from __future__ import annotations

import itertools

import torch


def reference(features: torch.Tensor, cu_frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and result as `event_similarity`. Reads lengths on the host."""
    mean = features.float().mean(1)
    norm = mean.norm(dim=1).clamp_min(1e-12)
    similarity = torch.full((mean.shape[0],), float("inf"), device=features.device)
    bounds = cu_frames.tolist()
    for start, stop in itertools.pairwise(bounds):
        here, after = slice(start, max(stop - 1, start)), slice(min(start + 1, stop), stop)
        similarity[here] = (mean[here] * mean[after]).sum(1) / (norm[here] * norm[after])
    return mean, similarity
