"""The definition of the scores, in float32 torch; it builds the rows x keys matrix."""

from __future__ import annotations

import torch


def reference(
    q: torch.Tensor, keys: torch.Tensor, row_keys: torch.Tensor, visual: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Same arguments and result as `text_to_visual_scores`; every index in `visual` must be a key's."""
    if q.shape[0] == 0 or visual.shape[0] == 0:
        return torch.zeros(visual.shape[0], dtype=torch.float32, device=q.device)
    known = keys.float().repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    logits = torch.einsum("rhd,khd->hrk", q.float(), known) * scale
    hidden = torch.arange(known.shape[0], device=q.device)[None, :] >= row_keys[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights.mean((0, 1))[visual.long()]
