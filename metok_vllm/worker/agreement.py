"""One choice for all tensor-parallel ranks.

Each rank encodes and compresses every video for itself. Their features are equal but for rounding, and where
two frames or events are nearly equal a bit decides which one is kept finely, or where an event ends. The
numbers of survivors follow from that. Ranks that disagree would run deep layers of different lengths, and the
next collective would never end. So rank 0 decides.

The tokens' values are each rank's own, as in stock vLLM: they decide no length. The scores of stage 2 are
averaged over the ranks (`pruning_scores.py`).
"""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group

from metok_vllm.compression.stage1 import FrameChoice


def agreed(choice: FrameChoice) -> FrameChoice:
    """Rank 0's choice of the frames of one video, on every rank of the tensor-parallel group.

    All ranks must call this for the same videos in the same order. They do: every rank encodes the items of
    the same scheduler output, and whether a video is compressed is in its plan. NCCL broadcasts on the device
    and the host does not wait; gloo, on a CPU, knows no other way. With one rank nothing happens.

    Args:
        choice: this rank's own.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return choice
    frames, events = choice.event.shape[0], choice.is_key.shape[0]
    together = torch.cat([choice.event, choice.tier, choice.is_key.to(torch.int64)])
    event, tier, is_key = group.broadcast(together).split([frames, frames, events])
    return FrameChoice(event, is_key.to(torch.bool), tier)
