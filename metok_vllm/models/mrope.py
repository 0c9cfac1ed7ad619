"""Rotary positions with three axes for models whose videos are grids and nothing else, as Qwen2-VL's are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.contract.fields import PLAN_FIELD
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.worker.rotary import VideoAxes

AXES = 3
"""Time, height and width."""


class Place(NamedTuple):
    """One picture or video among the positions of a prompt that nobody has pruned."""

    offset: int  # of its first token in the prompt
    length: int  # its tokens in the prompt
    first: int  # its first position, on every axis
    extent: int  # positions that it takes on the longest axis; the next token stands behind them
    times: NDArray[np.int64]  # [T], of each frame from `first` on
    height: int  # of the tower's merged grid
    width: int
    plan: VideoPlan | None  # of a compressed video


def frame_times(frames: int, factor: float) -> NDArray[np.int64]:
    """Position in time of each frame as stock vLLM has it: rounded down, frame by frame."""
    times: NDArray[np.int64] = (np.arange(frames) * factor).astype(np.int64)
    return times


def extent(times: NDArray[np.int64], height: int, width: int) -> int:
    """Positions that a grid takes on its longest axis."""
    return max(int(times[-1]) + 1, height, width)


class MropePositions:
    """Mixed in before a stock model that has `iter_mm_grid_thw`.

    A compressed video takes as many positions as it would untouched, so the text behind it stands where it
    would, and so does the answer.
    """

    rotary_axes = AXES

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """As stock; a compressed video's tokens all have its first position until its tags are read."""
        places = list(self._places(mm_features))
        if not any(place.plan for place in places):
            stock: tuple[torch.Tensor, int] = super().get_mrope_input_positions(  # type: ignore[misc]  # a mixin
                input_tokens, mm_features
            )
            return stock
        parts: list[NDArray[np.int64]] = []
        token = position = 0
        for place in places:
            parts.append(_text(position, place.offset - token))
            if place.plan is not None:
                parts.append(np.full((AXES, place.length), place.first))
            else:
                grid = np.indices((len(place.times), place.height, place.width)).reshape(AXES, -1)
                grid[0] = place.times[grid[0]]
                parts.append(grid + place.first)
            token, position = place.offset + place.length, place.first + place.extent
        behind = len(input_tokens) - token
        parts.append(_text(position, behind))
        return torch.from_numpy(np.concatenate(parts, axis=1)), position + behind - len(input_tokens)

    def video_axes(self, features: Sequence[Any], device: torch.device) -> tuple[VideoAxes, ...]:
        """The compressed videos of a prompt, in its order."""
        return tuple(
            VideoAxes(
                first=place.first,
                times=async_tensor_h2d(place.times, device),
                height=place.height,
                width=place.width,
                strides=place.plan.strides,
            )
            for place in self._places(features)
            if place.plan is not None
        )

    def _places(self, features: Sequence[Any]) -> Iterator[Place]:
        """Every picture and video, in the prompt's order."""
        token = position = 0
        ordered = sorted(features, key=lambda feature: feature.mm_position.offset)
        grids = self.iter_mm_grid_thw(ordered)  # type: ignore[attr-defined]  # the stock model's
        for feature, (offset, frames, height, width, factor) in zip(ordered, grids, strict=True):
            position += offset - token
            times, plan = frame_times(frames, factor), None
            if feature.modality == "video":
                plan = VideoPlan.from_tensor(feature.data[PLAN_FIELD].data)
            place = Place(
                offset=offset,
                length=feature.mm_position.length,
                first=position,
                extent=extent(times, height, width),
                times=times,
                height=height,
                width=width,
                plan=plan if plan is not None and plan.compressed else None,
            )
            yield place
            token, position = offset + place.length, position + place.extent


def _text(first: int, length: int) -> NDArray[np.int64]:
    """Positions of text, [AXES, length]: the same on all axes."""
    return np.broadcast_to(np.arange(first, first + length), (AXES, length))
