"""What every METok model adds to its stock class: roles for the layers,
an aligner, stage 1, a model state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.compression import alignment
from metok_vllm.compression.alignment import Alignment
from metok_vllm.compression.pooling import PoolMode
from metok_vllm.compression.stage1 import Recipe, compress_video
from metok_vllm.contract.fields import PIXELS_FIELD, QUESTION_FIELD, WINDOWS_FIELD
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.worker import ops
from metok_vllm.worker.attention import LayerRole, MetokAttention, RunningStep
from metok_vllm.worker.batch import DecoderStack
from metok_vllm.worker.dual_tower import FRAMES_PER_BLOCK, DualTower
from metok_vllm.worker.eager_layers import EagerLayers
from metok_vllm.worker.requests import pack_tags
from metok_vllm.worker.timing import PartTimes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MetokModel:
    """Mixed in before a stock multimodal model;
    the family's class calls `init_metok` at the end of its constructor.
    """

    pool_mode: PoolMode
    decoder_stack: DecoderStack
    metok_aligner: DualTower | None

    # --- what a family states ---

    def video_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tower and projector: `pixels[T, 3, h, w]` to [T, H, W, D]."""
        raise NotImplementedError

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """A video's tokens with METok off, [tokens, D], from features [T, H, W, D]."""
        raise NotImplementedError

    def separator(self) -> torch.Tensor | None:
        """Embedding [D] that follows each event, or None where the model has none."""
        raise NotImplementedError

    # --- start ---

    def init_metok(self, vllm_config: VllmConfig, decoder: Any) -> None:
        """Give the decoder's attention layers their roles and load the aligner."""
        model_config = vllm_config.model_config
        choices = server_choices(model_config.hf_config)
        prune_layers, running = choices.prune_layers, RunningStep()
        for index, layer in enumerate(decoder.layers):
            role = LayerRole(index, len(decoder.layers), prune_layers, running)
            MetokAttention.adopt(layer.self_attn.attn, role)
        times = PartTimes(torch.get_default_device())
        eager = EagerLayers(
            decoder.layers,
            decoder.norm,
            int(vllm_config.scheduler_config.max_num_batched_tokens),
            vllm_config.compilation_config.custom_ops,
        )
        self.decoder_stack = DecoderStack(decoder.layers, decoder.norm, prune_layers, running, times, eager)
        self.metok_aligner = None
        if choices.tower is not None:
            dtype = model_config.dtype
            assert isinstance(dtype, torch.dtype)
            self.metok_aligner = DualTower(choices.tower, dtype, torch.get_default_device())

    def aligner_weights(self) -> set[str]:
        """Names of the parameters that the aligner has already loaded by itself."""
        if self.metok_aligner is None:
            return set()
        return {f"metok_aligner.{name}" for name, _ in self.metok_aligner.named_parameters()}

    @classmethod
    def get_model_state_cls(cls) -> type[Any]:
        from metok_vllm.worker.model_state import MetokModelState

        return MetokModelState

    # --- stage 1 ---

    def embed_video(self, pixels: torch.Tensor, plan: VideoPlan, kwargs: Mapping[str, Any], item: int) -> torch.Tensor:
        """Encode and compress one video.

        Args:
            pixels: [T, 3, h, w].
            plan: the video's plan.
            kwargs: all multimodal fields of the batch, one entry an item each.
            item: which of them is this video's.

        Returns:
            [plan.tokens, D] with METok off, [plan.tokens, D + TAG_CHANNELS] with it on.
        """
        times = self.decoder_stack.times
        if not plan.pruned:
            return self.stock_video(self._features(pixels))
        with times.part("tower"):
            features = self._features(pixels)
        with times.part("stage1"):
            return self._compressed(features, plan, kwargs, item)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.video_features(block) for block in torch.split(pixels, FRAMES_PER_BLOCK)])

    def _compressed(
        self, features: torch.Tensor, plan: VideoPlan, kwargs: Mapping[str, Any], item: int
    ) -> torch.Tensor:
        """Stage 1 on a video's features [T, H, W, D]; [plan.tokens, D + TAG_CHANNELS]."""

        def align(vectors: torch.Tensor, event: torch.Tensor, events: int) -> Alignment:
            if plan.aligner == "none":
                return alignment.none(vectors, event, events)
            return alignment.by_question(self._fit(plan.aligner, vectors, kwargs, item), event, events)

        recipe = Recipe(plan.quota, plan.key_events, plan.key_frames, plan.strides, self.pool_mode)
        video = compress_video(features, recipe, align, self.separator(), ops.STAGE_1)
        choice = video.choice
        tags = pack_tags(video.event, choice.is_key[video.event], video.frame, choice.tier[video.frame])
        return torch.cat([video.tokens, tags.to(video.tokens.dtype)], dim=1)

    def _fit(self, aligner: str, vectors: torch.Tensor, kwargs: Mapping[str, Any], item: int) -> torch.Tensor:
        """How well each frame fits the question, float32 [T]."""
        if aligner == "dual-tower":
            assert self.metok_aligner is not None
            frames = self.metok_aligner.frames(kwargs[PIXELS_FIELD][item])
            return alignment.dual_tower(frames, self.metok_aligner.text(kwargs[WINDOWS_FIELD][item]))
        field = kwargs[QUESTION_FIELD][item]
        ids = async_tensor_h2d(field[1 : 1 + int(field[0])], vectors.device)
        embedding: nn.Module = self.language_model.model.embed_tokens  # type: ignore[attr-defined]
        return alignment.embedding(vectors, embedding(ids))
