"""What a method is to the local runner: which visual tokens enter the language model, and which stay where.

A `Reducer` decides before the language model, a `Policy` inside it. Indices of visual tokens count from 0
among those that entered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from benchmarks.accuracy.video import Asked, Video
from metok_vllm.compression.accounting import expected_visual_tokens
from metok_vllm.compression.pooling import PoolStyle, tokens_per_frame
from metok_vllm.compression.selection import prune_layers
from metok_vllm.compression.tiers import quota, video_tokens
from metok_vllm.contract.settings import MetokSettings

Rows = Literal["text", "question", "last"]
"""Whose attention scores the visual tokens: all text after the video, the question's, or the last token."""
Positions = Literal["kept", "compact"]
"""Whether tokens keep the positions they had among all of the video's, or are numbered anew without gaps."""
Point = Literal["entering", "average", "kv"]


@dataclass(frozen=True)
class Entering:
    """The visual tokens that enter the language model."""

    rows: Tensor  # [n, D]
    offsets: Tensor  # int64 [n], rising: position of each, from the first visual position on
    span: int  # positions that the video takes
    frames: int  # of the video before anything was left out
    events: Tensor | None = None  # int64 [n], METok's event of each
    is_key: Tensor | None = None  # bool [events], METok's key events
    frame: Tensor | None = None  # int64 [n], METok's frame of each


@dataclass
class Trace:
    """What became of the visual tokens of one prompt."""

    entering: Entering
    alive: list[Tensor] = field(default_factory=list)  # for each layer, the visual tokens computed in it
    scores: dict[int, Tensor] = field(default_factory=dict)  # for each pruning layer, its survivors' scores


class Reducer(Protocol):
    """Chooses what enters."""

    @property
    def per_question(self) -> bool: ...

    def enter(self, video: Video, asked: Asked) -> Entering: ...


class Policy(Protocol):
    """Chooses what stays inside. Layers count from 0."""

    @property
    def rows(self) -> Rows: ...

    @property
    def smoothing_micro(self) -> int:
        """Share of its frame's mean in a token's score, in millionths."""

    def drops_before(self, layers: int) -> dict[int, bool]:
        """The layers before which tokens are dropped, and whether that takes scores."""

    def keep(self, cut: int, scores: Tensor, alive: Tensor, entering: Entering, asked: Asked) -> Tensor:
        """Mask, bool [alive], of the tokens that stay at the `cut`-th dropping layer (from 1).

        `scores` is float32 [alive], higher where a token is looked at more; zeros where the layer takes none.
        """

    def held(self, layer: int, trace: Trace, layers: int) -> Tensor:
        """The visual tokens whose keys and values `layer` keeps while decoding,
        int64, among those computed there.
        """


@dataclass(frozen=True)
class Dense:
    """Nothing is dropped inside the language model."""

    rows: Rows = "last"
    smoothing_micro: ClassVar[int] = 0

    def drops_before(self, layers: int) -> dict[int, bool]:
        return {}

    def keep(self, cut: int, scores: Tensor, alive: Tensor, entering: Entering, asked: Asked) -> Tensor:
        raise AssertionError("nothing is dropped")

    def held(self, layer: int, trace: Trace, layers: int) -> Tensor:
        return trace.alive[layer]


@dataclass(frozen=True)
class DropFrom:
    """The probe: no visual token from a layer on,
    in prefill (and so while decoding) or while decoding alone.
    """

    layer: int
    decoding_only: bool = False
    rows: Rows = "last"
    smoothing_micro: ClassVar[int] = 0

    def drops_before(self, layers: int) -> dict[int, bool]:
        return {} if self.decoding_only or self.layer >= layers else {self.layer: False}

    def keep(self, cut: int, scores: Tensor, alive: Tensor, entering: Entering, asked: Asked) -> Tensor:
        return torch.zeros(len(alive), dtype=torch.bool)

    def held(self, layer: int, trace: Trace, layers: int) -> Tensor:
        return trace.alive[layer] if layer < self.layer else trace.alive[layer][:0]


@dataclass(frozen=True)
class PaperBudget:
    """The visual tokens of METok's `paper` preset for a video of so many frames:
    what baselines are matched to.

    `entering` the language model (exact), on `average` over its layers in prefill (exact for events of equal
    length), or whose `kv` its layers hold on average while decoding (exact).
    """

    grid: int
    layers: int
    point: Point

    def __call__(self, frames: int) -> int:
        """Tokens, separators included."""
        s = MetokSettings()
        each = tokens_per_frame(self.grid, self.grid, s.strides, PoolStyle("bilinear"))
        entering = video_tokens(quota(frames, s.events, s.key_events, s.key_frames), each, True)
        if self.point == "entering":
            return entering
        first, second, third = prune_layers(self.layers)
        if self.point == "kv":  # decode_retention 0: all that entered, in the layers before the first that drops
            return max(1, round(first * entering / self.layers))
        n = expected_visual_tokens(
            frames, s.events, s.key_events, s.key_frames, each, True, s.keep_ratio_micro, stock=0
        )
        total = first * n.encoded + (second - first) * n.after_l1 + (third - second) * n.after_l2
        return round(total / self.layers)


def subset(video: Video, tokens: Tensor, index: Tensor | None = None, positions: Positions = "compact") -> Entering:
    """The tokens `index` (rising; None: all) of a video's `tokens` [N, D],
    and the separator that ends a video.
    """
    if index is None:
        index = torch.arange(len(tokens))
    rows = torch.cat([tokens[index], video.newline[None]])
    if positions == "compact":
        return Entering(rows, torch.arange(len(rows)), len(rows), len(video))
    return Entering(rows, torch.cat([index, torch.tensor([len(tokens)])]), len(tokens) + 1, len(video))
