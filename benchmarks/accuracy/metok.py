"""METok for the local runner: the package's own pure functions (`metok_vllm.compression`),
and what ablations switch off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from benchmarks.accuracy.method import Entering, Rows, Trace
from benchmarks.accuracy.video import Asked, Checkpoint, Video
from metok_vllm.compression import alignment, events, tiers
from metok_vllm.compression.alignment import Alignment
from metok_vllm.compression.pooling import PoolStyle, tokens_per_frame
from metok_vllm.compression.retention import retain
from metok_vllm.compression.stage1 import Align, FrameChoice, Recipe, choose_frames, compress_video
from metok_vllm.compression.stage2 import EventCounts, survivor_mask
from metok_vllm.contract.kv_layout import chosen_layers
from metok_vllm.contract.settings import MetokSettings


def without_events(frames: int, grid: int) -> MetokSettings:
    """One event, with as many key frames as bring its tokens nearest to the default's:
    the same budget, no events.
    """
    default = MetokSettings()
    each = tokens_per_frame(grid, grid, default.strides, PoolStyle("bilinear"))

    def tokens(settings: MetokSettings) -> int:
        counts = tiers.quota(frames, settings.events, settings.key_events, settings.key_frames)
        return tiers.video_tokens(counts, each, True)

    goal = tokens(default)
    choices = [default.model_copy(update={"events": 1, "key_events": 1, "key_frames": n}) for n in range(frames + 1)]
    return min(choices, key=lambda settings: abs(tokens(settings) - goal))


@dataclass(frozen=True)
class Stage1:
    """Events, alignment, tiers and pooling (docs/method.md section 1).

    `ablation`: "events" makes the video one event of as many tokens, "alignment" replaces every frame's score
        by a random one.
    """

    checkpoint: Checkpoint = field(repr=False)
    settings: MetokSettings
    ablation: Literal["none", "events", "alignment"] = "none"

    @property
    def aligner(self) -> str:
        """The aligner after `auto`."""
        if self.settings.aligner == "auto":
            return "embedding" if self.checkpoint.tower is None else "dual-tower"
        return self.settings.aligner

    @property
    def per_question(self) -> bool:
        return self.aligner != "none" or self.ablation == "alignment"

    def enter(self, video: Video, asked: Asked) -> Entering:
        recipe, align = self._recipe(video), self._aligner(video, asked)
        compressed = compress_video(video.features, recipe, align, video.newline)
        n = len(compressed.tokens)
        return Entering(
            compressed.tokens,
            torch.arange(n),
            n,
            len(video),
            compressed.event,
            compressed.choice.is_key,
            compressed.frame,
        )

    def choose(self, video: Video, asked: Asked) -> FrameChoice:
        """What every frame is pooled with, and why."""
        similarity = events.adjacent_similarity(video.vectors)
        return choose_frames(video.vectors, similarity, self._recipe(video), self._aligner(video, asked))

    def _recipe(self, video: Video) -> Recipe:
        grid, settings = video.features.shape[1], self.settings
        if self.ablation == "events":
            settings = without_events(len(video), grid)
        each = tokens_per_frame(grid, grid, settings.strides, PoolStyle("bilinear"))
        counts = tiers.quota(len(video), settings.events, settings.key_events, settings.key_frames)
        if settings.token_budget is not None:
            counts = tiers.with_budget(counts, each, True, settings.token_budget)
        return Recipe(counts, settings.key_events, settings.key_frames, self.settings.strides, PoolStyle("bilinear"))

    def _aligner(self, video: Video, asked: Asked) -> Align:
        def align(vectors: Tensor, event: Tensor, count: int) -> Alignment:
            if self.ablation == "alignment":
                r = torch.rand(len(video), generator=torch.Generator().manual_seed(asked.seed))
            elif self.aligner == "none":
                return alignment.none(vectors, event, count)
            elif self.aligner == "embedding":
                r = alignment.embedding(vectors, self.checkpoint.embed(asked.query))
            else:
                assert self.checkpoint.tower is not None
                assert video.aligned is not None
                assert asked.windows is not None
                r = alignment.dual_tower(video.aligned, self.checkpoint.tower.text(asked.windows))
            return alignment.by_question(r, event, count)

        return align


@dataclass(frozen=True)
class Stages23:
    """Pruning at L1, L2 and L3, and what decoding may keep (docs/method.md sections 2 to 4.8).

    With `release` off stage 3 is left out: decoding keeps whatever a layer computed. `random_scores` replaces
    the attention.
    """

    settings: MetokSettings
    release: bool = True
    random_scores: bool = False

    @property
    def rows(self) -> Rows:
        return self.settings.score_rows

    @property
    def smoothing_micro(self) -> int:
        return self.settings.frame_smoothing_micro

    def drops_before(self, layers: int) -> dict[int, bool]:
        first, second, third = chosen_layers(layers, self.settings.prune_layers)
        cuts = ((first, True), (second, True), (third, self.settings.final_keep_micro > 0))
        return {layer: scored for layer, scored in cuts if layer < layers}

    def keep(self, cut: int, scores: Tensor, alive: Tensor, entering: Entering, asked: Asked) -> Tensor:
        assert entering.events is not None
        assert entering.is_key is not None
        if self.random_scores:
            scores = torch.rand(len(alive), generator=torch.Generator().manual_seed(asked.seed + cut))
        if cut == 3:
            return retain(scores, self.settings.final_keep_micro)
        counts = EventCounts.of(entering.events, entering.is_key, self.settings.keep_ratio_micro)
        if self.settings.quota == "video":
            counts = counts.over_the_video()
        return survivor_mask(scores, counts, 1 if cut == 1 else 2)

    def held(self, layer: int, trace: Trace, layers: int) -> Tensor:
        first, second, third = chosen_layers(layers, self.settings.prune_layers)
        if self.settings.kv_layers is not None:
            start, end = self.settings.kv_layers
            return trace.alive[layer] if start <= layer < end else trace.alive[layer][:0]
        if layer < first or layer >= third or not self.release:
            return trace.alive[layer]
        mask = retain(trace.scores[second], self.settings.decode_retention_micro)
        return trace.alive[second][mask]
