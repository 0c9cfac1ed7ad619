"""What every process must agree on about one video, fixed before any tensor exists.

The front end works it out from the number of frames and the settings. It lays down the placeholder tokens by
it, and attaches it to the video item as one int64 tensor. The scheduler reserves KV slots by it, the worker
compresses and prunes by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from metok_vllm.compression.pooling import PoolStyle, Strides, tokens_per_frame
from metok_vllm.compression.selection import survivor_bounds
from metok_vllm.compression.tiers import TierQuota, quota, video_tokens, with_budget
from metok_vllm.contract.advice import settings_place
from metok_vllm.contract.settings import RequestSettings

ALIGNERS = ("dual-tower", "embedding", "none")
"""Aligners that a plan can name; "auto" has been resolved by then."""

_TRIPLES = ("strides", "frames_per_tier")
_BOOLEANS = ("compressed", "pruned", "whole_video", "report")


class VideoGrid(NamedTuple):
    """What the tower makes of a video."""

    frames: int  # or what takes their place in the model, such as pairs of frames
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """One video's settings and exact counts; shares in millionths."""

    compressed: bool  # False: METok is off for this video, and the counts below are stock's
    pruned: bool  # whether the stages inside the language model follow stage 1
    frames: int
    events: int  # min(events, frames)
    key_events: int
    key_frames: int
    strides: Strides  # of tiers 0, 1, 2
    frames_per_tier: tuple[int, int, int]
    tokens: int  # placeholders, separators and the frames' text included
    text_tokens: int  # of them text, which labels the frames; no other count knows of it
    stock_tokens: int  # visual tokens that the stock model would take
    keep_ratio_micro: int
    whole_video: bool  # whether L1 and L2 keep the best of the whole video, or of each event
    smoothing_micro: int
    retention_micro: int
    final_micro: int
    most_after_l1: int  # visual tokens that can survive L1, an upper bound
    most_after_l2: int  # and L2
    aligner: str  # one of ALIGNERS
    report: bool  # whether the client has asked for a report

    @classmethod
    def unpruned(cls, frames: int, stock_tokens: int, text_tokens: int = 0) -> VideoPlan:
        """The plan of a video with METok off."""
        return cls(
            compressed=False,
            pruned=False,
            frames=frames,
            events=1,
            key_events=0,
            key_frames=0,
            strides=(1, 1, 1),  # not looked at
            frames_per_tier=(frames, 0, 0),
            tokens=stock_tokens + text_tokens,
            text_tokens=text_tokens,
            stock_tokens=stock_tokens,
            keep_ratio_micro=0,
            whole_video=False,
            smoothing_micro=0,
            retention_micro=0,
            final_micro=0,
            most_after_l1=0,
            most_after_l2=0,
            aligner="none",
            report=False,
        )

    @property
    def visual_tokens(self) -> int:
        """Placeholders that are not text: what is scored and pruned."""
        return self.tokens - self.text_tokens

    @property
    def quota(self) -> TierQuota:
        return TierQuota(self.events, *self.frames_per_tier)

    def to_tensor(self) -> torch.Tensor:
        """int64 [numbers], field after field."""
        return torch.tensor(list(self._numbers()), dtype=torch.int64)

    def _numbers(self) -> Iterator[int]:
        for name, value in vars(self).items():
            if name in _TRIPLES:
                yield from value
            else:
                yield ALIGNERS.index(value) if name == "aligner" else int(value)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> VideoPlan:
        """The inverse of `to_tensor`; `tensor` lives on the host.

        Raises:
            ValueError: it has not as many numbers as a plan, or they do not go together.
        """
        values = tensor.flatten().tolist()
        names = [field.name for field in fields(cls)]
        expected = len(names) + 2 * len(_TRIPLES)
        if len(values) != expected:
            raise ValueError(f"a video plan has {expected} numbers, not {len(values)}")
        numbers = iter(values)
        plan: dict[str, Any] = {
            name: (next(numbers), next(numbers), next(numbers)) if name in _TRIPLES else next(numbers) for name in names
        }
        if not 0 <= plan["aligner"] < len(ALIGNERS):
            raise ValueError(f"there is no aligner {plan['aligner']}")
        plan |= {name: bool(plan[name]) for name in _BOOLEANS} | {"aligner": ALIGNERS[plan["aligner"]]}
        read = cls(**plan)
        read._check()
        return read

    def _check(self) -> None:
        """Raise ValueError where the counts contradict one another."""
        millionths = (self.keep_ratio_micro, self.smoothing_micro, self.retention_micro, self.final_micro)
        holds = (
            1 <= self.events <= self.frames
            and self.key_events >= 0
            and self.key_frames >= 0
            and all(stride >= 1 for stride in self.strides)
            and all(frames >= 0 for frames in self.frames_per_tier)
            and sum(self.frames_per_tier) == self.frames
            and self.pruned <= self.compressed
            and 0 <= self.text_tokens < self.tokens
            and self.stock_tokens >= 1
            and 0 <= self.most_after_l2 <= self.most_after_l1 <= self.visual_tokens
            and all(0 <= share <= 1_000_000 for share in millionths)
        )
        if not holds:
            raise ValueError("its counts contradict one another")


def plan_video(
    grid: VideoGrid,
    style: PoolStyle,
    stock_tokens: int,
    settings: RequestSettings | None,
    aligner: str,
    text_tokens: int = 0,
) -> VideoPlan:
    """Work out the plan of one video (docs/method.md section 4, exact counts).

    Args:
        grid: the video's; at least 1 frame.
        style: the model's pooling.
        stock_tokens: visual tokens that the stock model takes for this video.
        settings: the request's settings, or None where METok is off for it.
        aligner: resolved aligner, one of `ALIGNERS`.
        text_tokens: text inside the video's placeholders, METok on or off. No budget counts it.

    Raises:
        ValueError: one sentence, where the settings cannot be met for this video.
    """
    frames, height, width = grid
    if settings is None:
        return VideoPlan.unpruned(frames, stock_tokens, text_tokens)
    if aligner not in ALIGNERS:
        raise ValueError(f"METok: there is no aligner {aligner!r}; there are {', '.join(ALIGNERS)}.")
    per_frame, separators = tokens_per_frame(height, width, settings.strides, style), style.separators == "event"
    counts = quota(frames, settings.events, settings.key_events, settings.key_frames)
    if settings.token_budget is not None:
        try:
            counts = with_budget(counts, per_frame, separators, settings.token_budget)
        except ValueError as error:
            raise ValueError(f"METok ({settings_place()}): {error}.") from None
    bounds = survivor_bounds(counts, per_frame, separators, settings.key_events, settings.keep_ratio_micro)
    return VideoPlan(
        compressed=True,
        pruned=settings.stages == 3,
        frames=frames,
        events=counts.events,
        key_events=settings.key_events,
        key_frames=settings.key_frames,
        strides=settings.strides,
        frames_per_tier=counts.counts(),
        tokens=video_tokens(counts, per_frame, separators) + text_tokens,
        text_tokens=text_tokens,
        stock_tokens=stock_tokens,
        keep_ratio_micro=settings.keep_ratio_micro,
        whole_video=settings.quota == "video",
        smoothing_micro=settings.frame_smoothing_micro,
        retention_micro=settings.decode_retention_micro,
        final_micro=settings.final_keep_micro,
        most_after_l1=bounds[0],
        most_after_l2=bounds[1],
        aligner=aligner,
        report=settings.report,
    )
