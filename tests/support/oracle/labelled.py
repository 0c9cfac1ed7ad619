"""What some models have around and beside a frame's visual tokens: text that labels it, extra channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """A model's labels and extra channels; by default it has neither."""

    text: Callable[[int, int], tuple[list[int], list[int]]] = lambda frame, frames: ([], [])
    """Frame and number of frames to token ids before and behind the frame's visual tokens."""

    extra: Callable[[Tensor], Tensor] = lambda features: features[..., :0]
    """Features [..., D] to extra channels [..., levels * D]; level i is added behind layer i."""


PLAIN = Labels()


def around(model: Any, ids: tuple[list[int], list[int]], visual: Tensor) -> list[tuple[Tensor, bool]]:
    """A frame's rows [n, C] and whether they are text: before, the visual tokens [n, C], behind."""

    def rows(tokens: list[int]) -> Tensor:
        embedded = model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long))
        return widen(embedded, visual.shape[1])

    return [(rows(ids[0]), True), (visual, False), (rows(ids[1]), True)]


def widen(rows: Tensor, channels: int) -> Tensor:
    """Rows [n, D] with zeros behind them, [n, channels]."""
    return torch.cat([rows, rows.new_zeros(len(rows), channels - rows.shape[1])], dim=1)


def levels(rows: Tensor, spans: list[tuple[int, int]], items: list[Tensor]) -> list[Tensor]:
    """What is added to a prompt's rows [n, D] behind layer 0, 1, ...: [n, D] each.

    `spans` and `items`: where each video or picture stands, and its rows [tokens, (1 + levels) * D], or
    [tokens, D] where nothing is added to it.
    """
    depth = rows.shape[1]
    found = [torch.zeros_like(rows) for _ in range(max((item.shape[1] for item in items), default=depth) // depth - 1)]
    for (start, stop), item in zip(spans, items, strict=True):
        for number, level in enumerate(found[: item.shape[1] // depth - 1]):
            level[start:stop] = item[:, (1 + number) * depth : (2 + number) * depth]
    return found
