"""One definition of "the best by score", shared by every choice of the method.

Higher score = chosen first. Ties go to the lowest index, NaN ranks after everything else (as minus infinity
would), and 0.0 equals -0.0. All functions work on the device of their inputs and never wait for it.
"""

import torch
from torch import Tensor


def best_first(scores: Tensor) -> Tensor:
    """Indices of `scores[n]` from best to worst, int64 [n]."""
    comparable = torch.where(scores.isnan(), float("-inf"), scores)
    return torch.argsort(comparable, descending=True, stable=True)


def top(scores: Tensor, count: int) -> Tensor:
    """Mask, bool [n], of the `min(count, n)` best of `scores[n]`."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.index_fill_(0, best_first(scores)[:count], True)


def best_first_by_group(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Indices of `scores[n]` ordered by `group_ids[n]` (int64, any values), best to worst in each group."""
    order = best_first(scores)
    return order[torch.argsort(group_ids[order], stable=True)]


def place_in_group(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Place of every element among those of its own group: 0 for the best, int64 [n].

    `group_ids` is int64 [n]; its values need not be sorted, dense or contiguous.
    """
    order = best_first_by_group(scores, group_ids)
    groups = group_ids[order]
    place = torch.arange(order.shape[0], device=order.device) - torch.searchsorted(groups, groups)
    return torch.empty_like(place).scatter_(0, order, place)


def true_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` true elements of `mask[n]`, int64 [count].

    `nonzero` would have to ask the device how many there are; here the caller knows. With fewer than `count`
    true elements the rest of the result is meaningless, so `count` must be exact.
    """
    return torch.argsort((~mask).to(torch.uint8), stable=True)[:count]
