"""Checks and launch of `select_per_event`."""

from __future__ import annotations

import torch

from metok_kernels.checks import INDEX, expect, require
from metok_kernels.launch import Launch
from metok_kernels.select_per_event.kernel import select_kernel

BLOCK = 2048
"""Keys that one program holds in registers, 8 a thread. One size for events of any length: a size for each
would be a variant for each."""


def prepare(scores: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor, total: int) -> tuple[Launch, torch.Tensor]:
    """Check the arguments of `select_per_event`; returns its launch and the indices it fills."""
    device = scores.device
    expect("scores", scores, (None,), (torch.float32,), device)
    expect("lengths", lengths, (None,), INDEX, device)
    events = lengths.shape[0]
    expect("keep", keep, (events,), INDEX, device)
    require(total >= 0, "total must not be negative")
    index = torch.empty(total, dtype=torch.int64, device=device)
    launch = Launch(
        select_kernel,
        (events + 1, 1, 1),
        {
            "p_score": scores, "p_length": lengths, "p_keep": keep, "p_index": index,
            "num_events": events, "size": total,
        },
        {"BLOCK": BLOCK, "BLOCK_E": 1024},
        num_warps=8,
    )  # fmt: skip
    return launch, index


def select_per_event(scores: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor, total: int) -> torch.Tensor:
    """Choose the `keep[e]` highest-scored tokens of each event, ties to the lowest index
    (docs/method.md section 2).

    Deterministic, exact, and without a host read. Events of several videos or requests go into one call.

    Args:
        scores: [tokens] float32, event after event; higher = kept. NaN counts as minus infinity and -0.0 as
            0.0, so NaN is chosen last, but chosen where `keep` asks for it.
        lengths: [events] int, tokens of each event; an event may be empty. They sum up to `tokens`.
        keep: [events] int; taken as 0 below 0 and as the event's length above it.
        total: rows of the result, the sum of `keep` as the host knows it. More are cut off.

    Returns:
        [total] int64, ascending indices into `scores`, event after event, then -1 to the end.

    Raises TypeError or ValueError for wrong dtypes, shapes or devices.
    Cost: reads 4 bytes a token (again from L1/L2: 3 times, or 34 where an event exceeds 2048 tokens), writes
    8 bytes a row of the result. No FLOPs.
    """
    launch, index = prepare(scores, lengths, keep, total)
    launch.run()
    return index
