"""Stage 1 as one function: a video's features to the tokens that enter
the language model (docs/method.md section 1).

The engine, the accuracy benchmark and the witness all run this. They differ in the aligner that they pass, in
whether the two heavy operations are plain torch or kernels, and in whether others compress the same video
beside them. Nothing here waits for the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import alignment, events, tiers
from .alignment import Alignment
from .pooling import PooledVideo, PoolStyle, Strides, pool_video
from .tiers import TierQuota

Align = Callable[[Tensor, Tensor, int], Alignment]
"""An aligner: frame vectors [T, D], event of each frame int64 [T] and number of events to an `Alignment`."""


@dataclass(frozen=True)
class Recipe:
    """What decides stage 1 of one video, beside its features and the aligner."""

    quota: TierQuota
    key_events: int
    key_frames: int  # an event
    strides: Strides
    style: PoolStyle


class FrameChoice(NamedTuple):
    """What stage 1 has decided about T frames."""

    event: Tensor  # int64 [T]
    is_key: Tensor  # bool [events], the key events
    tier: Tensor  # int64 [T], 0 the finest


def alone(choice: FrameChoice) -> FrameChoice:
    """The choice of somebody who has nobody to agree with."""
    return choice


@dataclass(frozen=True)
class Operations:
    """What an engine may put in the place of plain torch in one process."""

    similarity: Callable[[Tensor], tuple[Tensor, Tensor]]  # `events.similarity`; it reads every feature
    pool: Callable[..., PooledVideo]  # `pooling.pool_video`; it reads every feature
    agree: Callable[[FrameChoice], FrameChoice] = alone  # one choice for all who compress the same video


TORCH = Operations(events.similarity, pool_video)


class CompressedVideo(NamedTuple):
    """A video's n tokens after stage 1, in time order, and where each one comes from."""

    tokens: Tensor  # [n, D], type of the features
    event: Tensor  # int64 [n]
    frame: Tensor  # int64 [n]; a separator belongs to the frame before it
    choice: FrameChoice


def choose_frames(vectors: Tensor, similarity: Tensor, recipe: Recipe, align: Align) -> FrameChoice:
    """Events, key events and the tier of each frame (sections 1.2 to 1.5).

    Args:
        vectors: [T, D], the mean token of each frame.
        similarity: float [T - 1], of each frame with the next.
        recipe: its quota is for T frames.
        align: the aligner.
    """
    quota = recipe.quota
    event = events.segment(similarity, quota.events)
    aligned = align(vectors, event, quota.events)
    is_key = alignment.key_events(aligned.event_scores, recipe.key_events)
    return FrameChoice(event, is_key, tiers.assign(event, aligned.r, is_key, recipe.key_frames, quota))


def compress_video(
    features: Tensor,
    recipe: Recipe,
    align: Align,
    separator: Tensor | None,
    operations: Operations = TORCH,
    extra_channels: int = 0,
) -> CompressedVideo:
    """Cut into events, align, choose tiers, pool.

    Args:
        features: [T, H, W, D], what the vision tower and projector give. Extra channels stand behind its own.
        recipe: its quota is for T frames.
        align: the aligner.
        separator: [D], placed as the recipe's style says; None where that has none.
        operations: what reads the features, and how ranks agree.
        extra_channels: how many of the D are extra. They are pooled with the others and decide nothing.

    Returns:
        Exactly `tiers.video_tokens(...)` tokens.

    Raises:
        ValueError: the quota is for another number of frames.
    """
    own = features[..., : features.shape[-1] - extra_channels]
    vectors, similarity = operations.similarity(own.flatten(1, 2))
    choice = operations.agree(choose_frames(vectors, similarity, recipe, align))
    pooled = operations.pool(features, choice.tier, recipe.strides, recipe.quota, recipe.style, separator, choice.event)
    return CompressedVideo(pooled.tokens, pooled.token_event, pooled.token_frame, choice)
