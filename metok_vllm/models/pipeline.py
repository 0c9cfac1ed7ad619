"""Rotary positions on their way through a pipeline.

The rank that encodes a video knows first where its tokens stand on several axes. It hands each step's
positions on with the hidden state, and later ranks take them instead of their own. They travel in vLLM's
`IntermediateTensors`, whose tensors all have a step's tokens first (vllm/v1/worker/gpu/model_runner.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.sequence import IntermediateTensors

POSITIONS = "metok_positions"

MakeEmpty = Callable[[int, torch.dtype, torch.device], IntermediateTensors]


def with_room(make_empty: MakeEmpty, axes: int) -> MakeEmpty:
    """The stock model's `make_empty_intermediate_tensors`, with int64 [tokens, axes] for positions."""

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        tensors = make_empty(batch_size, dtype, device).tensors
        return IntermediateTensors(
            {**tensors, POSITIONS: torch.zeros(batch_size, axes, dtype=torch.int64, device=device)}
        )

    return make


def handed_on(tensors: IntermediateTensors, positions: torch.Tensor) -> IntermediateTensors:
    """What a rank that is not the last gives to the next, with the step's positions [axes, tokens]."""
    return IntermediateTensors({**tensors.tensors, POSITIONS: positions.T.contiguous()})


def taken_over(received: IntermediateTensors, positions: torch.Tensor) -> IntermediateTensors:
    """Write received positions over a rank's own, [axes, tokens], in their place, which CUDA graphs know.

    Returns:
        What the stock model takes: all but the positions.
    """
    tensors = dict(received.tensors)
    positions.copy_(tensors.pop(POSITIONS).T)
    return IntermediateTensors(tensors)
