"""Several training processes side by side (``torchrun``), or one alone:
their gradients are averaged on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Meet the other processes, where there are any."""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def stop() -> None:
    """Part in order: a process that just ends can bring the others down."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace float32 tensors by their mean over the processes, in one exchange."""
    if WORLD == 1:
        return
    parts = list(tensors)
    flat = torch.cat([t.detach().flatten().cpu() for t in parts])
    dist.all_reduce(flat)
    flat /= WORLD
    for part, mean in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
        part.detach().copy_(mean.view_as(part))


def share(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the first process."""
    if WORLD > 1:
        for tensor in tensors:
            copy = tensor.detach().cpu()
            dist.broadcast(copy, 0)
            tensor.detach().copy_(copy)
