"""What a pruned step is told: the layers it runs, and where each request's tokens stand in the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metok_vllm.compression.selection import PruneLayers
from metok_vllm.worker.attention import RunningStep
from metok_vllm.worker.decoder import Decoder
from metok_vllm.worker.eager_layers import EagerLayers
from metok_vllm.worker.requests import PrunedRequest
from metok_vllm.worker.timing import PartTimes


@dataclass(frozen=True)
class ModelParts:
    """What stage 1 needs of a model beside its tower."""

    decoder: Decoder
    times: PartTimes


@dataclass(frozen=True)
class DecoderStack(ModelParts):
    """The language model's layers as a pruned step runs them."""

    prune_layers: PruneLayers
    running: RunningStep  # where the layers find the step that runs through them
    eager: EagerLayers  # what the layers' modules do inside such a step

    @property
    def scoring_layers(self) -> tuple[int, int]:
        """The layers whose attention L1 and L2 choose by: those right before them."""
        first, second, _ = self.prune_layers
        return first - 1, second - 1

    @property
    def final_scoring_layer(self) -> int:
        """The layer whose attention L3 chooses by, where `final_keep` lets visual tokens pass it."""
        return self.prune_layers[2] - 1

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's layers."""
        return self.decoder.layers

    def attention(self, index: int) -> Any:
        """The attention of a layer."""
        return self.decoder.attention(index)


@dataclass(frozen=True)
class PromptChunk:
    """The tokens of one pruned prompt that this step computes: one run of rows in the batch."""

    request: PrunedRequest
    batch_index: int  # of the request in the batch
    start: int  # row of its first token in the batch
    length: int
    computed: int  # position of that token in the prompt

    @property
    def completes(self) -> bool:
        """Whether the prompt is complete with this step."""
        return self.computed + self.length == self.request.prompt_len

    @property
    def rows(self) -> slice:
        """Its rows in the batch."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class PrunedBatch:
    """What the step needs to know of the batch; built by `attn_metadata.py`, which sees the block tables."""

    chunks: Sequence[PromptChunk]
    num_tokens: int
    others: torch.Tensor  # int64 [No], row of every token of the other requests
    others_slots: Mapping[str, torch.Tensor]  # name of a deep layer -> int64 [No]
    group_rows: Mapping[str, int]  # name of a layer of `SHIFTED_KINDS` -> its group's row in the slots below
    text_slots: torch.Tensor  # int64 [groups, text of all prompts that are complete with this step]
    kept_slots: Sequence[torch.Tensor]  # of each of those prompts, int64 [groups, most visual tokens that it keeps]
    keeps_survivors: bool = False  # whether the window `kv_layers` has layers from L1 up, which keep all that is alive

    @property
    def num_others(self) -> int:
        return self.others.shape[0]
