"""Worker-side state of a METok model in Model Runner V2:
attention metadata by kind of group, and the pruned steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch

from metok_vllm.contract.kv_layout import BlockShape, padding
from metok_vllm.contract.kv_spec import EVERY_TOKEN, SHALLOW_KINDS, SHIFTED_KINDS, GroupKind, group_kind
from metok_vllm.log import metok_logger
from metok_vllm.worker.attn_metadata import Groups, once_a_kind, others_metadata, prompt_chunks, pruned_batch
from metok_vllm.worker.encoded_state import EncodedModelState
from metok_vllm.worker.memory import MemoryReserve
from metok_vllm.worker.slots import DeepSlots
from metok_vllm.worker.step import PrunedStep
from metok_vllm.worker.warm_up import ModelShapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup


logger = metok_logger(__name__)


def say_groups(kv_cache_config: KVCacheConfig) -> None:
    """One line at start: how many KV cache groups decoding pays for, and what their blocks waste."""
    groups = [
        (group_kind(group.kv_cache_spec), BlockShape(len(group.layer_names), group.kv_cache_spec.block_size))
        for group in kv_cache_config.kv_cache_groups
    ]
    if get_tensor_model_parallel_rank() == 0:
        logger.info(
            "METok: %d KV cache groups (%s), %.1f %% padding",
            len(groups),
            "; ".join(f"{shape.layers} layers for {kind}, blocks of {shape.tokens} tokens" for kind, shape in groups),
            100 * float(padding([shape for _, shape in groups])),
        )


class MetokModelState(EncodedModelState):
    """Adds to what stage 1 needs: the pruned steps, and where their tokens lie in the deep groups."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.deep_slots = DeepSlots(self.max_num_reqs, device)
        self._step: PrunedStep | None = None
        self._kinds: tuple[GroupKind, ...] = ()  # of the KV cache's groups
        self._reserve = MemoryReserve(vllm_config, device)

    # --- start ---

    def dummy_inputs_embeds(self, num_tokens: int) -> torch.Tensor:
        self._reserve.hold()
        return super().dummy_inputs_embeds(num_tokens)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        self.deep_slots.bind(kv_cache_config, block_tables)
        self._kinds = tuple(dict.fromkeys(group_kind(g.kv_cache_spec) for g in kv_cache_config.kv_cache_groups))
        self._reserve.release()
        if self.warm_up is None:
            say_groups(kv_cache_config)
        super().initialize_kv_cache(kv_cache_config, block_tables)

    def _shapes(self) -> ModelShapes:
        return ModelShapes.of(self.model)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Full graphs for decodes only: a graph of a mixed batch would
        be replayed in place of a pruned step.
        """
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "METok"

    # --- requests ---

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.deep_slots.reset(req_index)

    # --- attention metadata ---

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        model_specific_attn_metadata: Any = None,
    ) -> dict[str, Any]:
        deep_batch = copy(input_batch)  # of every decode step: `dataclasses.replace` takes five times as long

        def build(kind: GroupKind, to_build: Groups) -> dict[str, Any]:
            batch = input_batch
            if kind != EVERY_TOKEN:
                batch = deep_batch
                batch.seq_lens = self.deep_slots.seq_lens[SHIFTED_KINDS.index(kind)][: input_batch.seq_lens.shape[0]]
            return super(MetokModelState, self).prepare_attn(
                batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                to_build,
                kv_cache_config,
                for_capture,
                ubatch_idx,
                model_specific_attn_metadata,
            )

        def metadata_of(kinds: Sequence[GroupKind]) -> dict[str, Any]:
            return once_a_kind(attn_groups, kv_cache_config, kinds, block_tables, slot_mappings, build, ubatch_idx)

        chunks = prompt_chunks(input_batch, self.pruned)
        self._step = None
        if chunks:
            # First: it writes the lengths and slots of released groups.
            batch = pruned_batch(chunks, input_batch, slot_mappings, self.deep_slots)
            metadata = metadata_of([kind for kind in self._kinds if kind in SHALLOW_KINDS])
            if batch.num_others:
                metadata |= others_metadata(
                    batch, input_batch, block_tables, attn_groups, kv_cache_config, self.deep_slots
                )
            stack: Any = self.model.decoder_stack
            self._step = PrunedStep(stack, batch)
            return metadata

        if any(req_id in self.pruned.by_id for req_id in input_batch.req_ids):
            self.deep_slots.write(input_batch, slot_mappings)
        else:
            self.deep_slots.unshifted(input_batch.seq_lens)
        return metadata_of(self._kinds)

    # --- the forward pass ---

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        if self._step is not None:
            inputs["metok_step"] = self._step
        return inputs

    def postprocess_state(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_computed_tokens: torch.Tensor | None = None
    ) -> None:
        """After a pruned step: from here on the slots of its complete prompts follow from their shift."""
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        step, self._step = self._step, None
        if step is None:
            return
        for chunk in step.batch.chunks:
            request = chunk.request
            if not chunk.completes or request.result is None or self.pruned.get(request.req_id) is not request:
                continue
            index = self._index[request.req_id]
            self.deep_slots.complete(index, request.text_tokens, request.result)
            self.reports.add(request)
            request.tags = [None] * len(request.tags)
