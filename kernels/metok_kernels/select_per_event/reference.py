"""The definition of the selection: a stable sort of each event, highest first."""

from __future__ import annotations

import torch


def reference(scores: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor, total: int) -> torch.Tensor:
    """Same arguments and result as `select_per_event`. Reads on the host."""
    comparable = torch.where(scores.isnan(), float("-inf"), scores.float())
    chosen, start = [torch.empty(0, dtype=torch.int64, device=scores.device)], 0
    for length, wanted in zip(lengths.tolist(), keep.tolist(), strict=True):
        order = torch.sort(comparable[start : start + length], descending=True, stable=True).indices
        chosen.append(order[: max(wanted, 0)].sort().values + start)
        start += length
    packed = torch.cat(chosen)[:total]
    index = torch.full((total,), -1, dtype=torch.int64, device=scores.device)
    index[: packed.shape[0]] = packed
    return index
