"""Rotary positions between the ranks of a pipeline."""

from __future__ import annotations

import torch
from vllm.sequence import IntermediateTensors

from metok_vllm.models.pipeline import POSITIONS, handed_on, taken_over, with_room


def test_the_next_rank_takes_the_positions_over_in_place() -> None:
    sent = torch.arange(15).view(3, 5)
    given = handed_on(IntermediateTensors({"hidden_states": torch.ones(5, 2)}), sent)
    assert given[POSITIONS].shape == (5, 3)
    assert given[POSITIONS].is_contiguous()
    room = with_room(lambda tokens, dtype, device: IntermediateTensors({"hidden_states": torch.zeros(tokens, 2)}), 3)
    buffers = room(8, torch.float32, torch.device("cpu"))
    # As vLLM does it (vllm/v1/worker/gpu/model_runner.py): into its own buffers, by their names.
    received = IntermediateTensors({name: rows[:5].copy_(given[name]) for name, rows in buffers.tensors.items()})
    own = torch.zeros(3, 9, dtype=torch.int64)
    left = taken_over(received, own[:, :5])
    assert torch.equal(own[:, :5], sent)
    assert not own[:, 5:].any()
    assert set(left.tensors) == {"hidden_states"}
    assert POSITIONS in received.tensors, "vLLM's buffers keep what it copies into"
