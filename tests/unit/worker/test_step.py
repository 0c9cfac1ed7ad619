"""What a pruned step tells vLLM's layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context

from metok_vllm.worker.attention import RunningStep
from metok_vllm.worker.batch import DecoderStack, PrunedBatch
from metok_vllm.worker.decoder import Decoder
from metok_vllm.worker.eager_layers import EagerLayers
from metok_vllm.worker.requests import ChunkState
from metok_vllm.worker.step import PrunedStep
from metok_vllm.worker.timing import PartTimes


class Layer(nn.Module):
    """Notes the mark of padding rows that experts would find."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, positions: Any, hidden: torch.Tensor, residual: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(get_forward_context().is_padding)
        return hidden, hidden if residual is None else residual


def pruned_step(tokens: int, seen: list[Any]) -> PrunedStep:
    layers = [Layer(seen) for _ in range(4)]
    for layer in layers:
        layer.mlp = nn.Identity()
    decoder = Decoder(SimpleNamespace(layers=layers, norm=nn.Identity()))
    times = PartTimes(torch.device("cpu"))
    stack = DecoderStack(decoder, times, (1, 2, 3), RunningStep(), EagerLayers(decoder, tokens, ()))
    return PrunedStep(
        stack, PrunedBatch([], tokens, torch.arange(tokens), {}, {}, torch.empty(2, 0, dtype=torch.int64), ())
    )


def test_experts_find_no_mark_of_other_rows() -> None:
    """The mark is of the padded batch, and there are more or fewer rows from L1 up."""
    seen: list[Any] = []
    running: Any = pruned_step(3, seen)
    running._at_l1 = lambda *_: (torch.zeros(9, 2), torch.zeros(9, 2), torch.arange(9))  # rows of earlier chunks
    running._gather = lambda _: None
    running.stack.decoder.norm.forward = lambda hidden, residual: (hidden, residual)
    context = ForwardContext({}, {}, {}, is_padding=torch.tensor([False, False, False, True]))
    with override_forward_context(context):
        running.run(torch.arange(4), torch.zeros(4, 2))
    assert seen == [None] * 4


def test_where_each_prompt_starts() -> None:
    running: Any = pruned_step(0, [])
    for sizes in ([7, 1, 12], [5, 1, 12]):
        running.survivors = [SimpleNamespace(size=size) for size in sizes]
        running._rows_changed()
        assert running._starts.dtype == torch.int32
        assert running._starts.tolist() == [0, sizes[0], sizes[0] + 1, sizes[0] + 13]


def test_rotary_positions_of_a_deferred_prompt_are_those_of_its_chunks() -> None:
    """Not the tokens' places in the prompt: they may have several axes, and any values."""
    running: Any = pruned_step(2, [])  # two tokens of other requests
    chunks = [torch.tensor([[5, 5, 5], [0, 1, 2], [9, 8, 7]]), torch.tensor([[6, 6], [3, 4], [1, 1]])]
    own = [torch.randn(5, 4), torch.randn(5, 4)]
    states = [
        ChunkState(own[0][:3], own[1][:3], torch.empty(0, 2), torch.zeros(3, 2), chunks[0]),
        ChunkState(own[0][3:], own[1][3:], torch.empty(0, 2), torch.zeros(2, 2), chunks[1]),
    ]
    request = SimpleNamespace(chunks=states[:1], prompt_len=5)
    running._state = lambda *_: states[1]
    whole = running._whole_state(SimpleNamespace(request=request), None, None, None)
    assert torch.equal(whole.positions, torch.cat(chunks, dim=1))
    running.survivors = [SimpleNamespace(positions=torch.tensor([0, 2, 4]))]
    others = torch.tensor([[70, 71, 99], [80, 81, 99], [90, 91, 99]])
    hidden, _, positions = running._gather_states([whole], others, torch.zeros(3, 4), torch.zeros(3, 4))
    assert positions.tolist() == [[70, 71, 5, 5, 6], [80, 81, 0, 2, 4], [90, 91, 9, 7, 1]]
    assert torch.equal(hidden[2:], own[0][[0, 2, 4]])
