"""What every METok model adds to its stock class: roles for the layers, an aligner, stage 1, a state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.model_executor.models.interfaces import is_hybrid
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.compression import alignment
from metok_vllm.compression.alignment import Alignment
from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.compression.stage1 import Recipe, compress_video
from metok_vllm.compression.text_layout import TextLayout, last_of_events, lay_text
from metok_vllm.contract.fields import FRAME_TEXT_FIELD, PIXELS_FIELD, PLAN_FIELD, QUESTION_FIELD, WINDOWS_FIELD
from metok_vllm.contract.frame_text import of_field
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.models.pipeline import handed_on, taken_over, with_room
from metok_vllm.worker import ops
from metok_vllm.worker.attention import LayerRole, MetokAttention, RunningStep
from metok_vllm.worker.batch import DecoderStack, ModelParts
from metok_vllm.worker.decoder import Decoder
from metok_vllm.worker.dual_tower import FRAMES_PER_BLOCK, DualTower
from metok_vllm.worker.eager_layers import EagerLayers
from metok_vllm.worker.requests import pack_tags
from metok_vllm.worker.rotary import VideoAxes
from metok_vllm.worker.timing import PartTimes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MetokModel:
    """Mixed in before a stock multimodal model: extends its constructor, embedding, forward pass and loading.

    What a family states comes first. `docs/adding-a-model.md` goes through it.
    """

    pool_style: PoolStyle
    decoder_stack: ModelParts  # a `DecoderStack` unless the server has stage 1 alone
    metok_aligner: DualTower | None

    # --- what a family states ---

    def decoder(self) -> Decoder:
        """The language model's layers and embeddings."""
        return Decoder(self.language_model.model)  # type: ignore[attr-defined]

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        """Tower and projector, for every frame of a video: [T, H, W, D + extra_channels].

        Args:
            fields: all multimodal fields of the batch, one entry an item each.
            item: which of them is this video's.
        """
        raise NotImplementedError

    def stock_video(self, features: torch.Tensor) -> torch.Tensor:
        """A video's visual tokens with METok off, [tokens, D + extra_channels].

        Args:
            features: what `video_features` gives.
        """
        raise NotImplementedError

    def stock_frame_tokens(self, features: torch.Tensor) -> int:
        """Visual tokens of one frame in `stock_video`; needed where frames have text.

        Tokens behind the last frame's are separators, and stand behind its text too. By default the stock
        model keeps the tower's grid.
        """
        return features.shape[1] * features.shape[2]

    @property
    def extra_channels(self) -> int:
        """Channels of the tower behind the D that the hidden state has: D for each level of `deepstack`."""
        return 0

    def separator(self) -> torch.Tensor | None:
        """Embedding [D] that follows what `pool_style` says, or None where the model has none."""
        raise NotImplementedError

    rotary_axes = 1
    """Axes of a token's rotary position; with more than one `video_axes` is needed (`models/mrope.py`)."""

    def video_axes(self, features: Sequence[Any], device: torch.device) -> Sequence[VideoAxes]:
        """Where the pruned videos of a prompt stand on several rotary axes, in the prompt's order.

        Args:
            features: the request's multimodal items.
            device: for what is looked at when the tiers are known.
        """
        raise NotImplementedError

    @contextmanager
    def deepstack(self, num_tokens: int) -> Iterator[Sequence[torch.Tensor]]:
        """What a pruned step adds to its rows behind layer 0, 1, ...: [num_tokens, D] for each level.

        Needed where the tower has extra channels. The stock model's `embed_input_ids` gets them with the
        embeddings of the step and keeps what they come to for its own forward pass, which does not run then:
        here it is handed over, and behind the step forgotten. Zero for rows without extra channels.

        Args:
            num_tokens: rows of the step, padded.
        """
        yield ()

    # --- start ---

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # a mixin
        self._init_metok(vllm_config)

    def _init_metok(self, vllm_config: VllmConfig) -> None:
        """Give the decoder's attention layers their roles, where any of them prunes, and load the aligner."""
        model_config, decoder = vllm_config.model_config, self.decoder()
        choices = server_choices(model_config.hf_config)
        times = PartTimes(torch.get_default_device())
        if choices.prune_layers is None:
            self.decoder_stack = ModelParts(decoder, times)
        else:
            running = RunningStep()
            for index in range(len(decoder.layers)):
                role = LayerRole(index, len(decoder.layers), choices.prune_layers, running, choices.window)
                MetokAttention.adopt(decoder.attention(index), role)
            eager = EagerLayers(
                decoder,
                int(vllm_config.scheduler_config.max_num_batched_tokens),
                vllm_config.compilation_config.custom_ops,
            )
            self.decoder_stack = DecoderStack(decoder, times, choices.prune_layers, running, eager)
        if self.rotary_axes > 1 and vllm_config.parallel_config.pipeline_parallel_size > 1:
            stock: Any = self
            stock.make_empty_intermediate_tensors = with_room(stock.make_empty_intermediate_tensors, self.rotary_axes)
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

    def get_model_state_cls(self) -> type[Any]:
        """vLLM asks the model itself (vllm/v1/worker/gpu/model_states/__init__.py)."""
        if is_hybrid(self):
            from metok_vllm.worker.hybrid_state import HybridEncodedModelState

            return HybridEncodedModelState
        from metok_vllm.worker.encoded_state import EncodedModelState
        from metok_vllm.worker.model_state import MetokModelState

        return MetokModelState if isinstance(self.decoder_stack, DecoderStack) else EncodedModelState

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
            with self.deepstack(inputs_embeds.shape[0]) as levels:
                output: torch.Tensor = metok_step.run(positions, inputs_embeds, levels)
            return output
        if intermediate_tensors is not None and self.rotary_axes > 1:
            intermediate_tensors = taken_over(intermediate_tensors, positions)
        stock: Any = super()
        given: torch.Tensor | IntermediateTensors = stock.forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        if isinstance(given, IntermediateTensors) and self.rotary_axes > 1:
            return handed_on(given, positions)
        return given

    # --- stage 1 ---

    def embed_video(self, plan: VideoPlan, kwargs: Mapping[str, Any], item: int) -> torch.Tensor:
        """Encode and compress one video.

        Args:
            plan: the video's plan.
            kwargs: all multimodal fields of the batch, one entry an item each.
            item: which of them is this video's.

        Returns:
            [plan.tokens, D + extra_channels] with METok off, and TAG_CHANNELS more with it on. Separators and
            text have zeros in the extra channels.
        """
        times = self.decoder_stack.times
        if not plan.compressed:
            return self._stock(plan, kwargs, item)
        with times.part("tower"):
            features = self.video_features(kwargs, item)
        with times.part("stage1"):
            return self._compressed(features, plan, kwargs, item)

    def _stock(self, plan: VideoPlan, kwargs: Mapping[str, Any], item: int) -> torch.Tensor:
        features = self.video_features(kwargs, item)
        tokens = self.stock_video(features)
        if not plan.text_tokens:
            return tokens
        place = torch.arange(tokens.shape[0], device=tokens.device)
        frame = place // self.stock_frame_tokens(features)
        closes = frame >= plan.frames
        return self._with_text(tokens, frame.clamp(max=plan.frames - 1), closes, plan, kwargs, item)[0]

    def _with_text(
        self,
        tokens: torch.Tensor,
        frame: torch.Tensor,
        closes: torch.Tensor,
        plan: VideoPlan,
        kwargs: Mapping[str, Any],
        item: int,
    ) -> tuple[torch.Tensor, TextLayout]:
        """Visual tokens [n, C] with the frames' text around them, [plan.tokens, C].

        Args:
            tokens: the video's, METok on or off.
            frame: as `lay_text` takes it.
            closes: likewise.
            plan: the video's.
            kwargs: all multimodal fields of the batch.
            item: which of them is this video's.
        """
        field = async_tensor_h2d(kwargs[FRAME_TEXT_FIELD][item].flatten(), tokens.device)
        before, behind, ids = of_field(field, plan.frames)
        layout = lay_text(frame, closes, before, behind, plan.text_tokens)
        return layout.filled(tokens, self.decoder_stack.decoder.embed(ids)), layout

    def _compressed(
        self, features: torch.Tensor, plan: VideoPlan, kwargs: Mapping[str, Any], item: int
    ) -> torch.Tensor:
        """Stage 1 on a video's features; [plan.tokens, channels + TAG_CHANNELS]."""

        def align(vectors: torch.Tensor, event: torch.Tensor, events: int) -> Alignment:
            if plan.aligner == "none":
                return alignment.none(vectors, event, events)
            return alignment.by_question(self._fit(plan.aligner, vectors, kwargs, item), event, events)

        recipe = Recipe(plan.quota, plan.key_events, plan.key_frames, plan.strides, self.pool_style)
        separator = self.separator()
        if separator is not None and self.extra_channels:
            separator = F.pad(separator, (0, self.extra_channels))
        video = compress_video(features, recipe, align, separator, ops.STAGE_1, self.extra_channels)
        choice, tokens, event, frame, is_text = video.choice, video.tokens, video.event, video.frame, None
        if plan.text_tokens:
            of_events = self.pool_style.separators == "event"
            closes = last_of_events(event) if of_events else torch.zeros_like(event, dtype=torch.bool)
            tokens, layout = self._with_text(tokens, frame, closes, plan, kwargs, item)
            frame, is_text = layout.frame, layout.is_text
            event = choice.event[frame]
        tags = pack_tags(event, choice.is_key[event], frame, choice.tier[frame], is_text)
        return torch.cat([tokens, tags.to(tokens.dtype)], dim=1)

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
