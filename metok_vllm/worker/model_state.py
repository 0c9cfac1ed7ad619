"""Worker-side state of a METok model in Model Runner V2: attention metadata by kind of group, and the pruned steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from metok_vllm.worker.batch import PrefillRow, PrunedBatch
from metok_vllm.worker.memory import MemoryReserve
from metok_vllm.worker.report import Reports
from metok_vllm.worker.requests import PrunedRequests, VideoTags
from metok_vllm.worker.slots import KINDS, PrunedGroup, SlotRanks, pruned_groups, slots_of, token_rows
from metok_vllm.worker.step import PrunedStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup


class MetokModelState(DefaultModelState):
    """Adds to the stock state: which requests are pruned, and where their tokens lie in the pruned groups."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.pruned = PrunedRequests(device)
        stack: Any = model.decoder_stack
        self.reports = Reports(vllm_config, stack.times)
        self._index: dict[str, int] = {}
        self.ranks = SlotRanks(self.max_num_reqs, device)
        self._step: PrunedStep | None = None
        self._reserve = MemoryReserve(vllm_config, device)

    # --- start ---

    def dummy_inputs_embeds(self, num_tokens: int) -> torch.Tensor:
        self._reserve.hold()
        return super().dummy_inputs_embeds(num_tokens)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._reserve.release()

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Full graphs for decodes only: a graph of a mixed batch would be replayed in place of a pruned step."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "METok"

    # --- requests ---

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.pruned.add(new_req_data)
        self._index[new_req_data.req_id] = req_index
        self.ranks.reset(req_index)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._index.pop(req_id, None)
        self.pruned.remove(req_id)

    # --- embeddings ---

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> torch.Tensor:
        """As in the stock state, with the tag channels taken off the encoder's output."""
        self.execute_mm_encoder(scheduled_encoder_inputs)
        self._read_tags(input_batch)
        # The stock state calls the base class here, past any override, so its whole method is replaced.
        embeds, is_mm_embed = self.gather_mm_embeddings(input_batch)
        inputs_embeds = self.encoder_runner.get_inputs_embeds(
            input_batch.input_ids[: input_batch.num_tokens], embeds, is_mm_embed
        )
        return inputs_embeds[: input_batch.num_tokens_after_padding]

    def gather_mm_embeddings(
        self, input_batch: InputBatch, draft_lookahead: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        embeds, is_mm_embed = ModelState.gather_mm_embeddings(self, input_batch, draft_lookahead)
        return [embed[:, : self.inputs_embeds_size] for embed in embeds], is_mm_embed

    def _read_tags(self, input_batch: InputBatch) -> None:
        """Keep the tags of every pruned video that this step reaches for the first time."""
        for i, req_id in enumerate(input_batch.req_ids):
            request = self.pruned.get(req_id)
            if request is None or request.result is not None:
                continue
            end = int(input_batch.num_computed_tokens_np[i] + input_batch.num_scheduled_tokens[i])
            features = {f.mm_position.offset: f for f in self.encoder_cache.mm_features[req_id]}
            for video, span in enumerate(request.spans):
                if request.tags[video] is None and span.start < end:
                    output = self.encoder_cache.encoder_outputs[features[span.start].identifier]
                    request.tags[video] = VideoTags.unpack(output[:, self.inputs_embeds_size :])

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
        groups = pruned_groups(kv_cache_config)
        kinds = {group.index: group.retains for group in groups}

        def stock(kind: bool | None) -> dict[str, Any]:
            # build_attn_metadata skips a KV cache group without attention groups.
            chosen = [layers if kinds.get(i) == kind else [] for i, layers in enumerate(attn_groups)]
            return super(MetokModelState, self).prepare_attn(
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                chosen,
                kv_cache_config,
                for_capture,
                ubatch_idx,
                model_specific_attn_metadata,
            )

        rows = self._prefill_rows(input_batch)
        self._step = None
        metadata = stock(None)
        if rows:
            batch = self._pruned_batch(rows, input_batch, block_tables, groups)
            if batch.num_others:
                metadata |= self._others_metadata(
                    rows, input_batch, block_tables, batch, groups, attn_groups, kv_cache_config
                )
            stack: Any = self.model.decoder_stack
            self._step = PrunedStep(stack, batch)
            return metadata

        if any(req_id in self.pruned.by_id for req_id in input_batch.req_ids):
            self.ranks.write(input_batch, block_tables, slot_mappings, groups)
        else:
            self.ranks.unshifted(input_batch.seq_lens)
        seq_lens = input_batch.seq_lens
        for kind in KINDS:
            input_batch.seq_lens = self.ranks.seq_lens[int(kind)][: seq_lens.shape[0]]
            try:
                metadata |= stock(kind)
            finally:
                input_batch.seq_lens = seq_lens
        return metadata

    def _prefill_rows(self, input_batch: InputBatch) -> list[PrefillRow]:
        """The rows of pruned requests whose prompt is not complete before this step."""
        rows = []
        for i, req_id in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
            request = self.pruned.get(req_id)
            if request is None:
                continue
            computed = int(input_batch.num_computed_tokens_np[i])
            if computed < request.prompt_len:
                start = int(input_batch.query_start_loc_np[i])
                length = int(input_batch.num_scheduled_tokens[i])
                if computed + length > request.prompt_len:
                    raise RuntimeError(f"METok: a chunk of {req_id} crosses the end of its prompt")
                rows.append(PrefillRow(request, i, start, length, computed))
        return rows

    def _pruned_batch(
        self,
        rows: Sequence[PrefillRow],
        input_batch: InputBatch,
        block_tables: Sequence[torch.Tensor],
        groups: Sequence[PrunedGroup],
    ) -> PrunedBatch:
        of_others = np.ones(input_batch.num_tokens, dtype=bool)
        for row in rows:
            of_others[row.tokens] = False
        others = torch.from_numpy(np.flatnonzero(of_others))
        batch_rows = token_rows(input_batch)[others].to(self.device)
        index = others.to(self.device)
        shift = self.ranks.shift[:, input_batch.idx_mapping]
        slots, tables = {}, {}
        for group in groups:
            ranks = input_batch.positions[index] - shift[int(group.retains)][batch_rows]
            group_slots = slots_of(block_tables[group.index], batch_rows, ranks, group.block_size)
            for name in group.layer_names:
                slots[name] = group_slots
                tables[name] = block_tables[group.index]
        return PrunedBatch(rows, input_batch.num_tokens, index, slots, tables, groups[0].block_size)

    def _others_metadata(
        self,
        rows: Sequence[PrefillRow],
        input_batch: InputBatch,
        block_tables: Sequence[torch.Tensor],
        batch: PrunedBatch,
        groups: Sequence[PrunedGroup],
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
    ) -> dict[str, Any]:
        """Metadata of the layers from L1 up for the requests that are not being pruned in this step."""
        pruned = {row.batch_row for row in rows}
        keep = np.array([i for i in range(input_batch.num_reqs) if i not in pruned])
        index = torch.from_numpy(keep).to(self.device)
        counts = input_batch.num_scheduled_tokens[keep]
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        bounds = input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(keep)]
        tables, slot_mappings = list(block_tables), [batch.others] * len(block_tables)
        for group in groups:
            tables[group.index] = block_tables[group.index][index]
            slot_mappings[group.index] = batch.others_slots[group.layer_names[0]]
        kinds = {group.index: group.retains for group in groups}
        metadata: dict[str, Any] = {}
        for kind in KINDS:
            shift = self.ranks.shift[int(kind)][input_batch.idx_mapping[index]]
            metadata |= build_attn_metadata(
                attn_groups=[layers if kinds.get(i) == kind else [] for i, layers in enumerate(attn_groups)],
                num_reqs=len(keep),
                num_tokens=batch.num_others,
                query_start_loc_gpu=starts.to(self.device),
                query_start_loc_cpu=starts,
                max_query_len=int(counts.max()),
                seq_lens=input_batch.seq_lens[index] - shift,
                max_seq_len=int(bounds.max()),
                block_tables=tables,
                slot_mappings=slot_mappings,  # type: ignore[arg-type]  # indexed by group, as a tensor would be
                kv_cache_config=kv_cache_config,
                seq_lens_cpu_upper_bound=bounds,
                positions=input_batch.positions[batch.others],
                is_prefilling=torch.from_numpy(input_batch.is_prefilling_np[keep]),
                req_idx=input_batch.idx_mapping_np[keep],
            )
        return metadata

    # --- the forward pass ---

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        if self._step is not None:
            inputs["metok_step"] = self._step
        return inputs

    def postprocess_state(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_computed_tokens: torch.Tensor | None = None
    ) -> None:
        """After a pruned step: from here on its complete prompts are ranked by their shift."""
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        step, self._step = self._step, None
        if step is None:
            return
        for row in step.batch.rows:
            request = row.request
            if not row.ends or request.result is None or self.pruned.get(request.req_id) is not request:
                continue
            index = self._index[request.req_id]
            self.ranks.complete(index, request.spans[0].start, request.visual, request.result.retained)
            assert self.encoder_cache is not None
            self.reports.add(request, self.encoder_cache.mm_features[request.req_id])
            request.tags = [None] * len(request.tags)
