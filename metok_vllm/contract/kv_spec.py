"""The KV cache format of the deep layers, and the three kinds of KV cache group of a METok model.

`DeepAttentionSpec` derives from `AttentionSpec`, not from `FullAttentionSpec`: vLLM would merge the deep
layers into the full-attention group otherwise (vllm/v1/core/kv_cache_utils.py, `is_kv_cache_spec_uniform`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, iter_layer_specs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GroupKind = Literal["every token", "text and retained", "text"]
"""Which tokens own a slot in a group: layers below L1, layers L1 .. L3-1, layers from L3 up.

Images count as text.
"""

EVERY_TOKEN: GroupKind = "every token"
TEXT_AND_RETAINED: GroupKind = "text and retained"
TEXT: GroupKind = "text"

GROUP_KINDS: tuple[GroupKind, ...] = (EVERY_TOKEN, TEXT_AND_RETAINED, TEXT)
DEEP_KINDS: tuple[GroupKind, ...] = (TEXT, TEXT_AND_RETAINED)
"""The kinds of the deep layers' groups.

A kind's index here is its row in the tensors of `worker/slots.py`.
"""


@dataclass(frozen=True, kw_only=True)
class DeepAttentionSpec(AttentionSpec):
    """KV of a deep layer: pruned visual tokens own no slot.

    `retains`: the layer keeps retained visual tokens while decoding (`L1 .. L3-1`). Its group then holds more
    slots than the layers from L3 up, and cannot share their block table.
    """

    retains: bool = False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """A text-only prompt of the longest length owns a slot for every token."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, DeepAttentionSpec) and spec.retains == self.retains for spec in kv_cache_specs.values()
        )


def group_kind(spec: KVCacheSpec) -> GroupKind:
    """Which tokens own a slot in a KV cache group of this format, wrapped by vLLM or its layers' own."""
    layer_spec = next(iter(iter_layer_specs(spec)))
    if not isinstance(layer_spec, DeepAttentionSpec):
        return EVERY_TOKEN
    return TEXT_AND_RETAINED if layer_spec.retains else TEXT
