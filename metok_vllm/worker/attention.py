"""A decoder's attention layer: its KV format, and what it does while a pruned step runs through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec

from metok_vllm.compression.selection import KVLayers, PruneLayers
from metok_vllm.contract.kv_layout import block_size, layer_kind
from metok_vllm.contract.kv_spec import EVERY_TOKEN, RELEASED, SHALLOW_KINDS, DeepAttentionSpec, GroupKind
from metok_vllm.worker.dense_attention import DenseAttention

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from metok_vllm.worker.step import PrunedStep


@dataclass
class RunningStep:
    """The pruned step that is running through the layers, if any.

    One object, shared by all layers of a model.
    """

    step: PrunedStep | None = None

    @contextmanager
    def set_to(self, step: PrunedStep) -> Iterator[None]:
        """The layers hand their queries, keys and values to `step` inside the ``with`` block."""
        self.step = step
        try:
            yield
        finally:
            self.step = None


@dataclass(frozen=True)
class LayerRole:
    """Where a layer stands relative to the pruning layers and the window `kv_layers`."""

    index: int
    num_layers: int
    prune_layers: PruneLayers
    running: RunningStep
    window: KVLayers | None = None

    @cached_property
    def kind(self) -> GroupKind:
        """Which tokens own a KV slot."""
        return layer_kind(self.index, self.prune_layers, self.window)


class MetokAttention(Attention):
    """vLLM's `Attention`, with a KV format without pruned tokens from L1 up, and outside `kv_layers`.

    Without a pruned step it is the stock layer, so the compiled model and CUDA graphs see no difference.
    """

    metok: LayerRole
    dense: DenseAttention

    @classmethod
    def adopt(cls, attention: nn.Module, role: LayerRole) -> MetokAttention:
        """Give an attention layer of our own model its role.

        The model builds its layers itself, deep inside. Changing the class of the built layer keeps its
        parameters, its backend and its registration under its name, and touches no other model.

        Raises:
            TypeError: the layer is of another class than vLLM's `Attention`.
            ValueError: it attends in a way that METok cannot, in one sentence.
        """
        if type(attention) is not Attention:
            raise TypeError(f"METok works on vLLM's Attention layers, not on {type(attention).__name__}")
        dense = DenseAttention.of(attention)
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.metok = role
        attention.dense = dense
        return attention

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if type(spec) is not FullAttentionSpec:
            raise ValueError(f"METok cannot prune a layer with the cache format {type(spec).__name__}.")
        role = self.metok
        size = block_size(vllm_config.cache_config, role.num_layers, role.prune_layers, role.kind, role.window)
        if role.kind == EVERY_TOKEN:
            return replace(spec, block_size=size)
        return DeepAttentionSpec(
            block_size=size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            kind=role.kind,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        step = self.metok.running.step
        if step is None:
            return super().forward(query, key, value, output_shape, output_dtype)
        step.capture(self.metok.index, query, key)
        if self.metok.kind not in SHALLOW_KINDS:
            return step.attend(self, query, key, value)
        attended = super().forward(query, key, value, output_shape, output_dtype)
        if self.metok.kind == RELEASED:
            step.move_text(self, key, value)  # now that it is read, the visual tokens' KV may go
        return attended
