"""The attention layer from L1 - 1 up: its KV format, and what it does while a video prompt is being pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec

from metok_vllm.compression.selection import PruneLayers
from metok_vllm.scheduler.kv_manager import PrunedAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


class AttentionSink(Protocol):
    """What a pruned step does with the rotated queries, keys and values of one layer.

    `attend` replaces the layer's attention and cache update; `capture` only looks at them.
    """

    def capture(self, index: int, query: torch.Tensor, key: torch.Tensor) -> None: ...

    def attend(
        self, layer: MetokAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass
class LayerRole:
    """Where a layer stands relative to the pruning layers, and the pruned step that is running through it, if any."""

    index: int
    prune_layers: PruneLayers
    step: AttentionSink | None = None

    @property
    def owns_every_token(self) -> bool:
        return self.index < self.prune_layers[0]

    @property
    def retains(self) -> bool:
        return self.prune_layers[0] <= self.index < self.prune_layers[2]


class MetokAttention(Attention):
    """vLLM's `Attention`, with a KV format without pruned tokens from L1 up.

    Without a pruned step it is the stock layer, so the compiled model and CUDA graphs see no difference.
    """

    metok: LayerRole

    @classmethod
    def adopt(cls, attention: nn.Module, role: LayerRole) -> MetokAttention:
        """Give an attention layer of our own model its role.

        The model builds its layers itself, deep inside; changing the class of the built layer keeps its parameters, its
        backend and its registration under its name, and touches no other model.
        """
        if type(attention) is not Attention:
            raise TypeError(f"METok works on vLLM's Attention layers, not on {type(attention).__name__}")
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.metok = role
        return attention

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if self.metok.owns_every_token or spec is None:
            return spec
        if type(spec) is not FullAttentionSpec:
            raise ValueError(f"METok cannot prune a layer with the cache format {type(spec).__name__}.")
        return PrunedAttentionSpec(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            retains=self.metok.retains,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        step = self.metok.step
        if step is None:
            return super().forward(query, key, value, output_shape, output_dtype)
        step.capture(self.metok.index, query, key)
        if self.metok.owns_every_token:
            return super().forward(query, key, value, output_shape, output_dtype)
        return step.attend(self, query, key, value)
