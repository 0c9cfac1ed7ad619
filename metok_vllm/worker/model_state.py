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
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from metok_vllm.contract.kv_layout import BlockShape, padding
from metok_vllm.contract.kv_spec import DEEP_KINDS, EVERY_TOKEN, GROUP_KINDS, GroupKind, group_kind
from metok_vllm.contract.spans import VideoSpan, compressed_spans
from metok_vllm.log import metok_logger
from metok_vllm.worker.attn_metadata import Groups, once_a_kind, others_metadata, prompt_chunks, pruned_batch
from metok_vllm.worker.memory import MemoryReserve
from metok_vllm.worker.report import Reports
from metok_vllm.worker.requests import PrunedRequests, VideoTags
from metok_vllm.worker.rotary import VideoAxes
from metok_vllm.worker.slots import DeepSlots
from metok_vllm.worker.step import PrunedStep
from metok_vllm.worker.warm_up import ModelShapes, WarmUp, warm_up

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


class MetokModelState(DefaultModelState):
    """Adds to the stock state: which requests are pruned, and where their tokens lie in the deep groups."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.pruned = PrunedRequests(device)
        # Videos of requests that stage 1 alone compresses, whose tokens still have no rotary positions.
        self.unplaced: dict[str, list[tuple[VideoSpan, VideoAxes]]] = {}
        stack: Any = model.decoder_stack
        self.reports = Reports(vllm_config, stack.times)
        self._index: dict[str, int] = {}
        self.deep_slots = DeepSlots(self.max_num_reqs, device)
        self._step: PrunedStep | None = None
        self._reserve = MemoryReserve(vllm_config, device)
        # Of what the encoder gives; behind these channels are a pruned video's tags. The extra ones are the
        # stock model's to read.
        self._encoded_width = self.inputs_embeds_size + int(model.extra_channels)  # type: ignore[arg-type]
        self.warm_up: WarmUp | None = None

    # --- start ---

    def dummy_inputs_embeds(self, num_tokens: int) -> torch.Tensor:
        self._reserve.hold()
        return super().dummy_inputs_embeds(num_tokens)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.deep_slots.bind(kv_cache_config, block_tables)
        self._reserve.release()
        if self.warm_up is None:  # vLLM may come twice: it measures the memory of CUDA graphs first
            say_groups(kv_cache_config)
            self.warm_up = warm_up(ModelShapes.of(self.model), self.device)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Full graphs for decodes only: a graph of a mixed batch would
        be replayed in place of a pruned step.
        """
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "METok"

    # --- requests ---

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        request = self.pruned.add(new_req_data)
        if self.rope_state is not None and (spans := compressed_spans(new_req_data.mm_features)):
            video_axes: Any = self.model.video_axes
            axes = video_axes(new_req_data.mm_features, self.device)
            if request is not None:
                request.axes = axes
            else:  # what the prefix cache has needs none
                computed = new_req_data.num_computed_tokens
                waiting = [(span, of_video) for span, of_video in zip(spans, axes, strict=True) if span.end > computed]
                self.unplaced[new_req_data.req_id] = waiting
        self._index[new_req_data.req_id] = req_index
        self.deep_slots.reset(req_index)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._index.pop(req_id, None)
        self.pruned.remove(req_id)
        self.unplaced.pop(req_id, None)

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
        return [embed[:, : self._encoded_width] for embed in embeds], is_mm_embed

    def _read_tags(self, input_batch: InputBatch) -> None:
        """Keep the tags of every pruned video that this step reaches for the first time, and place the tokens of
        every compressed one.
        """
        for i, req_id in enumerate(input_batch.req_ids):
            request, unplaced = self.pruned.get(req_id), self.unplaced.get(req_id)
            if (request is None or request.result is not None) and not unplaced:
                continue
            end = int(input_batch.num_computed_tokens_np[i] + input_batch.num_scheduled_tokens[i])
            if request is None:
                assert unplaced is not None
                while unplaced and unplaced[0][0].start < end:
                    span, axes = unplaced.pop(0)
                    self._place(self._index[req_id], span, axes.positions(self._tags(req_id, span)))
                continue
            for video, span in enumerate(request.spans):
                if request.tags[video] is None and span.start < end:
                    request.tags[video] = tags = self._tags(req_id, span)
                    if self.rope_state is not None:
                        self._place(self._index[req_id], span, request.axes[video].positions(tags))

    def _tags(self, req_id: str, span: VideoSpan) -> VideoTags:
        (feature,) = (one for one in self.encoder_cache.mm_features[req_id] if one.mm_position.offset == span.start)
        output = self.encoder_cache.encoder_outputs[feature.identifier]
        return VideoTags.unpack(output[:, self._encoded_width :], span.plan.text_tokens)

    def _place(self, req_index: int, span: VideoSpan, positions: torch.Tensor) -> None:
        """Write the rotary positions of a video's tokens, int64 [axes, tokens], in the place of those that
        vLLM got for them when the request came. This step reads them after this (`prepare_inputs`).
        """
        rope: Any = self.rope_state
        row = rope.num_dims * req_index
        rope.prefill_positions.gpu[row : row + rope.num_dims, span.start : span.end].copy_(positions)

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
                batch.seq_lens = self.deep_slots.seq_lens[DEEP_KINDS.index(kind)][: input_batch.seq_lens.shape[0]]
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
            metadata = metadata_of([EVERY_TOKEN])
            batch = pruned_batch(chunks, input_batch, slot_mappings, self.deep_slots)
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
        return metadata_of(GROUP_KINDS)

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
            result = request.result
            self.deep_slots.complete(index, request.visual_tokens, result.retained, result.after_l3)
            self.reports.add(request)
            request.tags = [None] * len(request.tags)
