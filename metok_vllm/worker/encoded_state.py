"""Worker-side state of a model whose videos stage 1 compresses: what its encoder gives has tags behind the
embeddings, and says where the tokens stand on several rotary axes.

A server of stage 1 alone runs this; `model_state.py` adds the pruning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from metok_vllm.contract.spans import VideoSpan, compressed_spans
from metok_vllm.worker.report import Reports
from metok_vllm.worker.requests import PrunedRequests, VideoTags
from metok_vllm.worker.rotary import VideoAxes
from metok_vllm.worker.warm_up import ModelShapes, WarmUp, warm_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.states import RequestState


class EncodedModelState(DefaultModelState):
    """Adds to the stock state: tags are taken off the encoder's output, and read where they are needed."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        parts: Any = model.decoder_stack
        self.reports = Reports(vllm_config, parts.times)
        self.pruned = PrunedRequests(device)
        """Requests that the stages inside the language model prune; none where they do not run."""
        self.unplaced: dict[str, list[tuple[VideoSpan, VideoAxes]]] = {}
        """Videos of all other requests, in their order, whose tokens still have no rotary positions."""
        self._index: dict[str, int] = {}
        # Of what the encoder gives; behind these channels are a compressed video's tags. The extra ones are
        # the stock model's to read.
        self._encoded_width = self.inputs_embeds_size + int(model.extra_channels)  # type: ignore[arg-type]
        self.warm_up: WarmUp | None = None

    # --- start ---

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        if self.warm_up is None:  # vLLM may come twice: it measures the memory of CUDA graphs first
            self.warm_up = warm_up(self._shapes(), self.device)

    def _shapes(self) -> ModelShapes:
        dtype: Any = self.model_config.dtype
        return ModelShapes.of_stage_1(self.model, self.inputs_embeds_size, dtype)

    # --- requests ---

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._index[new_req_data.req_id] = req_index
        request = self.pruned.add(new_req_data)
        if self.rope_state is None or not get_pp_group().is_first_rank:
            return  # later ranks of a pipeline are handed each step's positions (`models/pipeline.py`)
        spans = compressed_spans(new_req_data.mm_features)
        if not spans:
            return
        video_axes: Any = self.model.video_axes
        axes = video_axes(new_req_data.mm_features, self.device)
        if request is not None:
            request.axes = axes
        else:  # what the prefix cache has needs none
            computed = new_req_data.num_computed_tokens
            waiting = [(span, of_video) for span, of_video in zip(spans, axes, strict=True) if span.end > computed]
            self.unplaced[new_req_data.req_id] = waiting

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
        """Keep the tags of every pruned video that this step reaches for the first time, and place the tokens
        of every compressed one.
        """
        for i, req_id in enumerate(input_batch.req_ids):
            request, unplaced = self.pruned.get(req_id), self.unplaced.get(req_id)
            if not unplaced and (request is None or request.result is not None):
                continue
            end = int(input_batch.num_computed_tokens_np[i] + input_batch.num_scheduled_tokens[i])
            while unplaced and unplaced[0][0].start < end:
                span, axes = unplaced.pop(0)
                self._place(req_id, span, axes.positions(self._tags(req_id, span)))
            if request is None:
                continue
            for video, span in enumerate(request.spans):
                if request.tags[video] is None and span.start < end:
                    request.tags[video] = tags = self._tags(req_id, span)
                    if self.rope_state is not None:
                        self._place(req_id, span, request.axes[video].positions(tags))

    def _tags(self, req_id: str, span: VideoSpan) -> VideoTags:
        """Of a video that has been encoded."""
        (feature,) = (one for one in self.encoder_cache.mm_features[req_id] if one.mm_position.offset == span.start)
        output = self.encoder_cache.encoder_outputs[feature.identifier]
        return VideoTags.unpack(output[:, self._encoded_width :], span.plan.text_tokens)

    def _place(self, req_id: str, span: VideoSpan, positions: torch.Tensor) -> None:
        """Write the rotary positions of a video's tokens, int64 [axes, tokens], in the place of those that
        vLLM got for them when the request came. This step reads them after this (`prepare_inputs`).
        """
        rope: Any = self.rope_state
        row = rope.num_dims * self._index[req_id]
        rope.prefill_positions.gpu[row : row + rope.num_dims, span.start : span.end].copy_(positions)
