"""How a layer attends inside a prompt that is being pruned: densely, causally, without the cache.

Decided once, when the layer gets its role, from the backend that vLLM gave the layer: an operator who chose
one, or a version of flash attention, gets the same for pruned prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionType

from metok_vllm.contract.attention_backends import AttentionBackend, refused_backend

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


FLASH_VERSIONS = (2, 3)


@dataclass(frozen=True)
class DenseAttention:
    """What `ops.causal_attention` runs for a layer."""

    backend: AttentionBackend
    flash_version: int | None = None  # of vLLM's flash attention, 2 or 3; None with every other backend

    @classmethod
    def of(cls, attention: Attention) -> DenseAttention:
        """By the backend of a layer that vLLM has built.

        Raises:
            ValueError: METok cannot attend as this layer does, in one sentence.
        """
        name: Any = attention.get_attn_backend().get_name()
        if sentence := refused_backend(name, why=", which vLLM chose for this device and KV cache"):
            raise ValueError(sentence)
        if kinds := ", ".join(_more_than_causal(attention)):
            raise ValueError(f"METok prunes plain causal attention alone, but {attention.layer_name} has {kinds}.")
        if name != "FLASH_ATTN":
            return cls(name)
        impl: Any = attention.impl
        if impl.vllm_flash_attn_version is None:
            raise ValueError(
                f"METok needs flash attention for heads of {attention.head_size} on this device, and vLLM has none: "
                "use TRITON_ATTN in --attention-backend, or remove the version from --attention-config."
            )
        if impl.vllm_flash_attn_version not in FLASH_VERSIONS:
            # Version 4 compiles by a prompt's length and whether it is alone, so in live traffic. For some
            # heads it reads blocks of one size only.
            raise ValueError(
                f"METok does not support version {impl.vllm_flash_attn_version} of flash attention: "
                "use TRITON_ATTN in --attention-backend."
            )
        return cls(name, impl.vllm_flash_attn_version)


def _more_than_causal(attention: Attention) -> Iterator[str]:
    """What a layer's attention has that METok's dense attention and its scores would leave out."""
    impl: Any = attention.impl
    if attention.attn_type != AttentionType.DECODER:
        yield "no causal mask"
    if attention.sliding_window is not None:
        yield "a sliding window"
    if attention.has_sink:
        yield "attention sinks"
    if impl.alibi_slopes is not None:
        yield "ALiBi"
    if impl.logits_soft_cap:
        yield "a soft cap on its logits"
    if attention.head_size_v != attention.head_size:
        yield "values of another width than its keys"
    if attention.kv_sharing_target_layer_name is not None:
        yield "another layer's KV"
