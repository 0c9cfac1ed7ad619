"""Checks and launch of `select_per_event`."""

from __future__ import annotations

import torch

from metok_kernels.checks import INDEX, expect, require
from metok_kernels.launch import Launch, power_of_two
from metok_kernels.select_per_event.kernel import select_kernel

LARGEST_BLOCK = 4096
"""Keys that one program holds in registers: 8 a thread."""


def prepare(
    scores: torch.Tensor,
    cu_events: torch.Tensor,
    keep: torch.Tensor,
    *,
    max_length: int,
    capacity: int | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Check the arguments of `select_per_event`; returns its launch, the indices and the counts it fills."""
    device = scores.device
    expect("scores", scores, (None,), (torch.float32,), device)
    expect("keep", keep, (None,), INDEX, device)
    events = keep.shape[0]
    expect("cu_events", cu_events, (events + 1,), INDEX, device)
    require(max_length >= 0, "max_length must not be negative")
    require(capacity is None or capacity >= 0, "capacity must not be negative")
    size = scores.shape[0] if capacity is None else capacity
    index = torch.empty(size, dtype=torch.int64, device=device)
    cu_kept = torch.empty(events + 1, dtype=torch.int32, device=device)
    block = min(max(power_of_two(max_length), 128), LARGEST_BLOCK)
    launch = Launch(
        select_kernel,
        (events + 1, 1, 1),
        {
            "p_score": scores, "p_cu_events": cu_events, "p_keep": keep,
            "p_index": index, "p_cu_kept": cu_kept, "num_events": events, "capacity": size,
        },
        {"BLOCK": block, "BLOCK_E": 1024},
        num_warps=min(max(block // 256, 4), 16),
    )  # fmt: skip
    return launch, index, cu_kept


def select_per_event(
    scores: torch.Tensor,
    cu_events: torch.Tensor,
    keep: torch.Tensor,
    *,
    max_length: int,
    capacity: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `keep[e]` highest-scored tokens of each event,
    ties to the lowest index (docs/method.md section 2).

    Deterministic, exact, and without a host read: how many were chosen stays on the device, in the second
    result. Events of several videos or requests go into one call. A run of tokens that is always kept (text
    between videos) may be passed as an event with `keep` >= its length: the result then is the survivors in
    order.

    Args:
        scores: [tokens] float32, higher = kept. NaN counts as above infinity, so that counts stay exact.
        cu_events: [events + 1] int, cumulative lengths; an event may be empty.
        keep: [events] int; taken as 0 below 0 and as the event's length above it.
        max_length: host guess of the longest event, for the block size: it changes speed, never the result.
        capacity: rows of the first result, `tokens` by default; a known bound on what is kept saves memory.

    Returns:
        index: [capacity] int64, indices into `scores`, ascending, event after event, then -1 to the end.
        cu_kept: [events + 1] int32, cumulative counts: `cu_events` of the next pruning layer.

    Cost: reads 4 bytes a token (again from L1/L2: 3 times, or 34 where an event exceeds the block of at most
    4096 tokens), writes 8 bytes a row of `capacity`. No FLOPs.
    """
    launch, index, cu_kept = prepare(scores, cu_events, keep, max_length=max_length, capacity=capacity)
    launch.run()
    return index, cu_kept
