"""The KV cache format of layers in which pruned tokens own no slot while decoding, and the kinds of KV cache
group of a METok model.

`DeepAttentionSpec` derives from `AttentionSpec`, not from `FullAttentionSpec`: vLLM would merge the deep
layers into the full-attention group otherwise (`is_kv_cache_spec_uniform`, in vllm/v1/core/kv_cache_utils.py,
in vLLM 0.33 in kv_cache_planning.py beside it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, iter_layer_specs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GroupKind = Literal[
    "every token",
    "text and retained",
    "text",
    "every token, then text",
    "text and survivors of L1",
    "text and survivors of L2",
]
"""Which tokens own a slot in a group. Images count as text. Which layer is of which kind:
`contract/kv_layout.py: layer_kind`.
"""

EVERY_TOKEN: GroupKind = "every token"
TEXT_AND_RETAINED: GroupKind = "text and retained"
TEXT: GroupKind = "text"
RELEASED: GroupKind = "every token, then text"
"""Below L1 and outside the window `kv_layers`: visual tokens lose their slots when the prompt is complete."""
AFTER_L1: GroupKind = "text and survivors of L1"
AFTER_L2: GroupKind = "text and survivors of L2"

PLAIN_KINDS: tuple[GroupKind, ...] = (EVERY_TOKEN, TEXT_AND_RETAINED, TEXT)
"""The kinds of a server without `kv_layers`."""

WINDOW_KINDS: tuple[GroupKind, ...] = (EVERY_TOKEN, RELEASED, AFTER_L1, AFTER_L2, TEXT)
"""The kinds of a server with it."""

GROUP_KINDS: tuple[GroupKind, ...] = (EVERY_TOKEN, RELEASED, AFTER_L1, AFTER_L2, TEXT_AND_RETAINED, TEXT)
SHALLOW_KINDS: tuple[GroupKind, ...] = (EVERY_TOKEN, RELEASED)
"""The kinds of the layers below L1, which run on every token of a pruned step."""

DEEP_KINDS: tuple[GroupKind, ...] = (TEXT, TEXT_AND_RETAINED, AFTER_L1, AFTER_L2)
"""The kinds of the layers from L1 up."""

SHIFTED_KINDS: tuple[GroupKind, ...] = (*DEEP_KINDS, RELEASED)
"""The kinds in which a visual token may own no slot, and what comes behind the prompt is shifted.

A kind's index here is its row in the tensors of `worker/slots.py`.
"""


@dataclass(frozen=True, kw_only=True)
class DeepAttentionSpec(AttentionSpec):
    """KV of a layer in which visual tokens may own no slot while decoding: of the deep ones, and with
    `kv_layers` of shallow ones outside the window.

    `kind`: one of `SHIFTED_KINDS`. Groups of different kinds hold different numbers of slots, and cannot
    share a block table.
    """

    kind: GroupKind = TEXT

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """A text-only prompt of the longest length owns a slot for every token."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, DeepAttentionSpec) and spec.kind == self.kind for spec in kv_cache_specs.values())


def group_kind(spec: KVCacheSpec) -> GroupKind:
    """Which tokens own a slot in a KV cache group of this format, wrapped by vLLM or its layers' own."""
    layer_spec = next(iter(iter_layer_specs(spec)))
    return layer_spec.kind if isinstance(layer_spec, DeepAttentionSpec) else EVERY_TOKEN
