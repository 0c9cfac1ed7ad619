"""The definition of the selection: a stable sort of each event, highest first."""

from __future__ import annotations

import torch


def reference(
    scores: torch.Tensor,
    cu_events: torch.Tensor,
    keep: torch.Tensor,
    *,
    max_length: int = 0,
    capacity: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and result as `select_per_event`; `max_length` is not used. Reads on the host."""
    capacity = scores.shape[0] if capacity is None else capacity
    bounds = cu_events.tolist()
    chosen, counts = [], [0]
    for event, wanted in enumerate(keep.tolist()):
        start, stop = bounds[event], bounds[event + 1]
        order = torch.sort(scores[start:stop].float(), descending=True, stable=True).indices
        best = order[: max(wanted, 0)].sort().values + start
        chosen.append(best)
        counts.append(counts[-1] + best.shape[0])
    packed = torch.cat([torch.empty(0, dtype=torch.int64, device=scores.device), *chosen])[:capacity]
    index = torch.full((capacity,), -1, dtype=torch.int64, device=scores.device)
    index[: packed.shape[0]] = packed
    return index, torch.tensor(counts, dtype=torch.int32, device=scores.device)
