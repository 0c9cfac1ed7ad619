"""What every process must agree on about one video, fixed before any tensor exists.

The front end works it out from the number of frames and the settings, lays down the placeholder tokens by it, and attaches it
to the video item as one int64 tensor. The scheduler reads it to reserve KV slots, the worker to compress and prune.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch

from metok_vllm.compression.pooling import PoolMode, tokens_per_frame
from metok_vllm.compression.selection import survivor_bounds
from metok_vllm.compression.tiers import TierQuota, quota, video_tokens, with_budget
from metok_vllm.contract.settings import RequestSettings

ALIGNERS = ("dual-tower", "embedding", "none")
"""Aligners a plan can name, by their index in the tensor; "auto" has been resolved by then."""


@dataclass(frozen=True)
class VideoPlan:
    """One video's settings and exact counts. Plain integers throughout; shares in millionths."""

    pruned: int  # 0: METok is off for this video, and the counts below describe stock pooling
    frames: int
    events: int  # min(events, frames)
    key_events: int
    key_frames: int
    stride1: int
    stride2: int
    stride3: int
    n1: int
    n2: int
    n3: int
    tokens: int  # placeholders, separators included
    stock_tokens: int  # what the stock model would take
    keep_ratio: int
    retention: int
    survivors1: int  # most visual tokens that can survive L1
    survivors2: int  # most visual tokens that can survive L2
    aligner: int  # index in ALIGNERS
    report: int

    @property
    def quota(self) -> TierQuota:
        return TierQuota(events=self.events, n1=self.n1, n2=self.n2, n3=self.n3)

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.stride1, self.stride2, self.stride3

    def to_tensor(self) -> torch.Tensor:
        """int64 [number of fields], in the order of the fields."""
        return torch.tensor(astuple(self), dtype=torch.int64)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> VideoPlan:
        """The inverse of `to_tensor`; `tensor` lives on the host."""
        values = tensor.flatten().tolist()
        if len(values) != len(fields(cls)):
            raise ValueError(f"a video plan has {len(fields(cls))} numbers, not {len(values)}")
        return cls(*values)


def plan_video(
    frames: int,
    grid: tuple[int, int],
    mode: PoolMode,
    separators: bool,
    stock_tokens: int,
    settings: RequestSettings | None,
    aligner: str,
) -> VideoPlan:
    """Work out the plan of one video (method.md section 4, exact counts).

    Args:
        frames: frames of the video, at least 1.
        grid: height and width of the tower's patch grid.
        mode: the model's pooling.
        separators: whether a separator token follows each event.
        stock_tokens: tokens the stock model takes for this video.
        settings: the request's settings, or None where METok is off for it.
        aligner: resolved aligner, one of `ALIGNERS`.

    Raises:
        ValueError: one sentence, where the settings cannot be met for this video.
    """
    if settings is None:
        return VideoPlan(0, frames, 1, 0, 0, 2, 2, 2, frames, 0, 0, stock_tokens, stock_tokens, 0, 0, 0, 0, 0, report=0)
    strides = settings.strides
    per_frame = tokens_per_frame(*grid, strides, mode)
    counts = quota(frames, settings.events, settings.key_events, settings.key_frames)
    if settings.token_budget is not None:
        try:
            counts = with_budget(counts, per_frame, separators, settings.token_budget)
        except ValueError as error:
            raise ValueError(f"METok (mm_processor_kwargs): {error}.") from None
    bounds = survivor_bounds(counts, per_frame, separators, settings.key_events, settings.keep_ratio_micro)
    return VideoPlan(
        pruned=1,
        frames=frames,
        events=counts.events,
        key_events=settings.key_events,
        key_frames=settings.key_frames,
        stride1=strides[0],
        stride2=strides[1],
        stride3=strides[2],
        n1=counts.n1,
        n2=counts.n2,
        n3=counts.n3,
        tokens=video_tokens(counts, per_frame, separators),
        stock_tokens=stock_tokens,
        keep_ratio=settings.keep_ratio_micro,
        retention=settings.decode_retention_micro,
        survivors1=bounds[0],
        survivors2=bounds[1],
        aligner=ALIGNERS.index(aligner),
        report=int(settings.report),
    )
