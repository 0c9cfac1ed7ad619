"""The labelled family as a METok model, and how a test registers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.llava_onevision import LlavaOnevisionDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from metok_vllm.compression.pooling import pool_frames
from metok_vllm.contract.frame_text import FrameText
from metok_vllm.contract.video_plan import VideoGrid
from metok_vllm.frontend import startup
from metok_vllm.models import registry
from metok_vllm.models.llava_onevision import (
    STOCK_STRIDE,
    STYLE,
    MetokLlavaOnevisionForConditionalGeneration,
    MetokLlavaOnevisionMultiModalProcessor,
    MetokLlavaOnevisionProcessingInfo,
)
from tests.support.labelled.labels import LEVELS, extra_channels, frame_ids

ARCHITECTURE = "METokLabelledForConditionalGeneration"


class LabelledProcessor(MetokLlavaOnevisionMultiModalProcessor):
    """Has text around its frames."""

    def frame_text(self, grid: VideoGrid, fields: Mapping[str, Any], item: int) -> Sequence[FrameText]:
        labels = (frame_ids(frame, grid.frames) for frame in range(grid.frames))
        return [FrameText(tuple(before), tuple(behind)) for before, behind in labels]


@MULTIMODAL_REGISTRY.register_processor(
    LabelledProcessor, info=MetokLlavaOnevisionProcessingInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class MetokLabelled(MetokLlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with labels and extra channels.

    The second half is what a stock model with extra channels does by itself, as Qwen3-VL does in vLLM.
    """

    _extra: torch.Tensor | None = None  # [tokens of the step, LEVELS * D], where it has any

    # --- what a family states ---

    @property
    def depth(self) -> int:
        """Width of the hidden state."""
        return int(self.config.text_config.hidden_size)

    @property
    def extra_channels(self) -> int:
        return LEVELS * self.depth

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        features = super().video_features(fields, item)
        return torch.cat([features, extra_channels(features)], dim=-1)

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        pooled = pool_frames(features, STOCK_STRIDE, STYLE.mode).flatten(0, 1)
        newline = F.pad(self.image_newline[None], (0, self.extra_channels))
        return torch.cat([pooled, newline.to(pooled.dtype)])

    def stock_frame_tokens(self, features: torch.Tensor) -> int:
        return pool_frames(features[:1], STOCK_STRIDE, STYLE.mode).shape[1]

    @contextmanager
    def deepstack(self, num_tokens: int) -> Iterator[Sequence[torch.Tensor]]:
        yield self._take_levels(num_tokens)

    # --- what the stock model does ---

    def embed_multimodal(self, **kwargs: object) -> Any:
        # Pictures have no extra channels of their own.
        return tuple(
            F.pad(output, (0, self.extra_channels)) if output.shape[1] == self.depth else output
            for output in super().embed_multimodal(**kwargs)
        )

    def embed_input_ids(  # type: ignore[override]
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> torch.Tensor:
        embeddings = list(multimodal_embeddings or ())
        own = [embedding[:, : self.depth] for embedding in embeddings]
        embedded: torch.Tensor = super().embed_input_ids(input_ids, own, is_multimodal=is_multimodal)
        if embeddings:
            self._extra = embedded.new_zeros(embedded.shape[0], self.extra_channels)
            self._extra[is_multimodal] = torch.cat([embedding[:, self.depth :] for embedding in embeddings])
        return embedded

    def _take_levels(self, num_tokens: int) -> Sequence[torch.Tensor]:
        extra, self._extra = self._extra, None
        if extra is None:
            return ()
        return F.pad(extra, (0, 0, 0, num_tokens - extra.shape[0])).split(self.depth, dim=1)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        metok_step: Any = None,
        **kwargs: object,
    ) -> Any:
        if metok_step is not None or self._extra is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, metok_step, **kwargs)
        assert inputs_embeds is not None
        body: Any = self.language_model.model
        levels = self._take_levels(inputs_embeds.shape[0])
        hidden, residual = inputs_embeds, None
        for number, layer in enumerate(body.layers):
            hidden, residual = layer(positions, hidden, residual)
            if number < len(levels):
                hidden = hidden + levels[number]
        return body.norm(hidden, residual)[0]


@contextmanager
def registered() -> Iterator[None]:
    """Every LLaVA-OneVision checkpoint is this family's while it lasts."""
    entry = registry.SupportedModel(
        stock="LlavaOnevisionForConditionalGeneration",
        metok=ARCHITECTURE,
        module="",  # its class is there already
        model_types=("llava_onevision",),
        about="a family of these tests",
        levels=lambda hf_config: LEVELS,
    )
    with pytest.MonkeyPatch.context() as patch:
        both = (entry, *registry.SUPPORTED)
        for module in (registry, startup):
            patch.setattr(module, "SUPPORTED", both)
        patch.setitem(MODELS_CONFIG_MAP, ARCHITECTURE, startup.MetokConfig)
        ModelRegistry.register_model(ARCHITECTURE, MetokLabelled)
        try:
            yield
        finally:
            del ModelRegistry.models[ARCHITECTURE]
