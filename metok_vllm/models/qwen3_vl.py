"""Qwen3-VL with METok's three stages.

Beside what it shares with Qwen2.5-VL, each pair of frames stands in text that says when it is, and the tower
adds to its tokens once more behind the language model's first layers (deepstack). vLLM's model is
vllm/model_executor/models/qwen3_vl.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.contract.extents import TABLE_FACTOR
from metok_vllm.contract.fields import FRAME_TEXT_FIELD
from metok_vllm.contract.frame_text import FrameText, of_field, text_tokens
from metok_vllm.contract.video_plan import VideoGrid
from metok_vllm.frontend.item_kwargs import SCOPE, frames_of
from metok_vllm.models.mrope import Frames, PrunedPositions, compressed_plan, frames_in_text, grid_frames
from metok_vllm.models.qwen2_5_vl import QwenProcessing, QwenTower
from metok_vllm.models.qwen_requests import ALLOWED, check_timed

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def frame_labels(timestamps: Iterable[float], tokenizer: Any, hf_config: Any) -> list[FrameText]:
    """The text around each pair of frames, by vLLM's own function, which tokenises a pair by itself.

    Args:
        timestamps: seconds, one a pair.
        tokenizer: the model's.
        hf_config: the model's.
    """
    ids = {
        name: getattr(hf_config, name) for name in ("vision_start_token_id", "vision_end_token_id", "video_token_id")
    }
    written = (
        Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[0], timestamps=[float(seconds)], tokenizer=tokenizer, **ids
        ).full
        for seconds in timestamps
    )
    # "<0.3 seconds>", vision_start | vision_end
    return [FrameText(tuple(text[:-1]), tuple(text[-1:])) for text in written]


class MetokQwen3VLMultiModalProcessor(QwenProcessing, Qwen3VLMultiModalProcessor):
    """Lays down as many placeholders as stage 1 will leave, and the text of the frames among them.

    METok off, text and placeholders are the stock processor's.
    """

    stock_lays_text = True

    def frame_text(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Sequence[FrameText]:
        return frame_labels(fields["timestamps"][item], self.info.get_tokenizer(), self.info.get_hf_config())

    def aligner_frames(self, videos: Any, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Any:
        """The first of each pair; where transformers samples from them, those in the middle of its pairs."""
        frames = frames_of(videos, item)
        if -(-len(frames) // self._pair) == grid.frames:
            return frames[:: self._pair]
        rate = videos.get(item)[1]["fps"]
        # All frames are there (`check_timed`), and the middle of two may lie half a frame behind one.
        return frames[[int(float(seconds) * rate + 0.25) for seconds in fields["timestamps"][item]]]

    def video_extent(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> float | None:
        return text_tokens(self.frame_text(grid, fields, item)) + grid.frames * max(grid.height, grid.width)

    def check_kwargs(self, kwargs: Mapping[str, object]) -> None:
        super().check_kwargs(kwargs)
        if kwargs.get("fps") is not None and kwargs.get("num_frames") is not None:
            raise ValueError("METok (mm_processor_kwargs): this model takes 'fps' or 'num_frames', not both.")

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        scoped: Any = hf_kwargs.get(SCOPE) or {}
        stated = {name: value for name, value in {**scoped, **hf_kwargs}.items() if name in ALLOWED}
        processor = self.info.get_hf_processor().video_processor
        check_timed(mm_items.get("video"), stated, (processor.min_frames, processor.max_frames))
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)


class Qwen3Model(PrunedPositions, QwenTower):
    """The stock model; a video goes through stage 1, a step that prunes through the pruned step."""

    def _init_metok(self, vllm_config: VllmConfig) -> None:
        """With a longer table of rotary positions: pruned videos keep those of the tokens that they lose.

        So does vLLM for its own pruning (`mrope_positions_factor`, which knows of that alone).
        """
        text = vllm_config.model_config.hf_text_config
        for layer in self.decoder().layers:
            # Not every layer attends (Qwen3.5), and those of other pipeline ranks are not here.
            attention: Any = getattr(layer, "self_attn", None)
            if attention is None:
                continue
            attention.rotary_emb = get_rope(
                attention.head_dim,
                max_position=text.max_position_embeddings,
                rope_parameters=text.rope_parameters,
                dual_chunk_attention_config=attention.dual_chunk_attention_config,
                mrope_positions_factor=TABLE_FACTOR,
            )
        super()._init_metok(vllm_config)

    # --- positions ---

    def frames_of_items(self, features: Sequence[Any]) -> Iterator[Frames]:
        """Each pair of frames stands among the text as a picture does."""
        stock: Any = self
        merge = int(stock.config.vision_config.spatial_merge_size)
        for feature in features:
            pairs, rows, columns = feature.data[f"{feature.modality}_grid_thw"].data.flatten().tolist()
            if feature.modality == "image":
                yield grid_frames(np.zeros(pairs, dtype=np.int64), rows // merge, columns // merge)
            else:
                yield frames_in_text(*self._text_around(feature), rows // merge, columns // merge)

    def _text_around(self, feature: Any) -> tuple[list[int], list[int]]:
        """How much text stands before and behind each pair of a video, as the front end has laid it."""
        plan = compressed_plan(feature)
        if plan is not None:
            laid = of_field(feature.data[FRAME_TEXT_FIELD].data.flatten(), plan.frames)
            return laid.before.tolist(), laid.behind.tolist()
        stock: Any = self
        texts = frame_labels(feature.data["timestamps"].data, stock._tokenizer, stock.config)
        return [len(text.before) for text in texts], [len(text.behind) for text in texts]

    # --- deepstack ---

    @property
    def extra_channels(self) -> int:
        stock: Any = self
        return int(stock.multiscale_dim)

    @contextmanager
    def deepstack(self, num_tokens: int) -> Iterator[Sequence[torch.Tensor]]:
        stock: Any = self
        # Text alone leaves nothing there.
        filled = getattr(stock, "deepstack_input_embeds_num_tokens", 0)
        levels = stock._get_deepstack_input_embeds(num_tokens) if filled else None
        try:
            yield () if levels is None else [levels[f"deepstack_input_embeds_{i}"] for i in range(len(levels))]
        finally:
            stock._clear_deepstack_input_embeds(num_tokens)


@MULTIMODAL_REGISTRY.register_processor(
    MetokQwen3VLMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class MetokQwen3VLForConditionalGeneration(Qwen3Model, Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""
