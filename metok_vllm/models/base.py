"""What every METok model adds to its stock class: roles for the layers, an aligner, stage 1, a state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.compression import alignment
from metok_vllm.compression.alignment import Alignment
from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.compression.stage1 import Recipe, compress_video
from metok_vllm.contract.fields import PIXELS_FIELD, PLAN_FIELD, QUESTION_FIELD, WINDOWS_FIELD
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.worker import ops
from metok_vllm.worker.attention import LayerRole, MetokAttention, RunningStep
from metok_vllm.worker.batch import DecoderStack
from metok_vllm.worker.decoder import Decoder
from metok_vllm.worker.dual_tower import FRAMES_PER_BLOCK, DualTower
from metok_vllm.worker.eager_layers import EagerLayers
from metok_vllm.worker.requests import pack_tags
from metok_vllm.worker.timing import PartTimes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MetokModel:
    """Mixed in before a stock multimodal model: extends its constructor, embedding, forward pass and loading.

    What a family states comes first. `docs/adding-a-model.md` goes through it.
    """

    pool_style: PoolStyle
    decoder_stack: DecoderStack
    metok_aligner: DualTower | None

    # --- what a family states ---

    def decoder(self) -> Decoder:
        """The language model's layers and embeddings."""
        return Decoder(self.language_model.model)  # type: ignore[attr-defined]

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        """Tower and projector, for every frame of a video: [T, H, W, D].

        Args:
            fields: all multimodal fields of the batch, one entry an item each.
            item: which of them is this video's.
        """
        raise NotImplementedError

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """A video's tokens with METok off, [tokens, D], from features [T, H, W, D]."""
        raise NotImplementedError

    def separator(self) -> torch.Tensor | None:
        """Embedding [D] that follows what `pool_style` says, or None where the model has none."""
        raise NotImplementedError

    # --- start ---

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # a mixin
        self._init_metok(vllm_config)

    def _init_metok(self, vllm_config: VllmConfig) -> None:
        """Give the decoder's attention layers their roles and load the aligner."""
        model_config, decoder = vllm_config.model_config, self.decoder()
        choices = server_choices(model_config.hf_config)
        prune_layers, running = choices.prune_layers, RunningStep()
        for index in range(len(decoder.layers)):
            role = LayerRole(index, len(decoder.layers), prune_layers, running)
            MetokAttention.adopt(decoder.attention(index), role)
        times = PartTimes(torch.get_default_device())
        eager = EagerLayers(
            decoder,
            int(vllm_config.scheduler_config.max_num_batched_tokens),
            vllm_config.compilation_config.custom_ops,
        )
        self.decoder_stack = DecoderStack(decoder, prune_layers, running, times, eager)
        self.metok_aligner = None
        if choices.tower is not None:
            dtype = model_config.dtype
            assert isinstance(dtype, torch.dtype)
            self.metok_aligner = DualTower(choices.tower, dtype, torch.get_default_device())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As stock; the aligner has loaded its own by itself."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        if self.metok_aligner is None:
            return loaded
        return loaded | {f"metok_aligner.{name}" for name, _ in self.metok_aligner.named_parameters()}

    @classmethod
    def get_model_state_cls(cls) -> type[Any]:
        from metok_vllm.worker.model_state import MetokModelState

        return MetokModelState

    # --- one batch ---

    def embed_multimodal(self, **kwargs: object) -> Any:
        plans: Any = kwargs.get(PLAN_FIELD)
        if plans is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return tuple(self.embed_video(VideoPlan.from_tensor(plan), kwargs, i) for i, plan in enumerate(plans))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        metok_step: Any = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if metok_step is not None:
            assert inputs_embeds is not None
            output: torch.Tensor = metok_step.run(positions, inputs_embeds)
            return output
        stock: Any = super()
        hidden: torch.Tensor = stock.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        return hidden

    # --- stage 1 ---

    def embed_video(self, plan: VideoPlan, kwargs: Mapping[str, Any], item: int) -> torch.Tensor:
        """Encode and compress one video.

        Args:
            plan: the video's plan.
            kwargs: all multimodal fields of the batch, one entry an item each.
            item: which of them is this video's.

        Returns:
            [plan.tokens, D] with METok off, [plan.tokens, D + TAG_CHANNELS] with it on.
        """
        times = self.decoder_stack.times
        if not plan.pruned:
            return self.stock_video(self.video_features(kwargs, item))
        with times.part("tower"):
            features = self.video_features(kwargs, item)
        with times.part("stage1"):
            return self._compressed(features, plan, kwargs, item)

    def _compressed(
        self, features: torch.Tensor, plan: VideoPlan, kwargs: Mapping[str, Any], item: int
    ) -> torch.Tensor:
        """Stage 1 on a video's features [T, H, W, D]; [plan.tokens, D + TAG_CHANNELS]."""

        def align(vectors: torch.Tensor, event: torch.Tensor, events: int) -> Alignment:
            if plan.aligner == "none":
                return alignment.none(vectors, event, events)
            return alignment.by_question(self._fit(plan.aligner, vectors, kwargs, item), event, events)

        recipe = Recipe(plan.quota, plan.key_events, plan.key_frames, plan.strides, self.pool_style)
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
        return alignment.embedding(vectors, self.decoder_stack.decoder.embed(ids))


def in_blocks(tower: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What `tower` makes of `pixels` [T, ...], some frames at a time, which bounds its memory."""
    return torch.cat([tower(block) for block in torch.split(pixels, FRAMES_PER_BLOCK)])
