"""The definition of the gather, by torch indexing."""

from __future__ import annotations

import torch


def _take(source: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    inside = (index >= 0) & (index < source.shape[axis])
    if source.shape[axis] == 0:
        shape = list(source.shape)
        shape[axis] = index.shape[0]
        return source.new_zeros(shape)
    taken = source.index_select(axis, torch.where(inside, index, 0).long())
    inside = inside if axis == source.dim() - 1 else inside.unsqueeze(-1)
    return torch.where(inside, taken, torch.zeros((), dtype=source.dtype, device=source.device))


def reference(
    index: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments and result as `gather_rows`. Copies, so exact in any dtype."""
    return _take(hidden, index, 0), _take(residual, index, 0), _take(positions, index, positions.dim() - 1)
