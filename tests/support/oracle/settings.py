"""The oracle's settings and the arithmetic that needs no tensor (docs/method.md 1.5, 2, 3 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

AlignerMode = Literal["embedding", "none", "dual-tower"]


@dataclass(frozen=True)
class OracleSettings:
    """One request's METok settings, with the engine's names and defaults; `off` is the plain model."""

    events: int = 5
    key_events: int = 3
    key_frames: int = 6
    strides: tuple[int, int, int] = (2, 4, 8)  # of the tower's grid, for the three classes of frames
    prune_layers: tuple[int, int, int] | None = None  # None: from the model's depth
    keep_ratio: float = 0.76
    decode_retention: float = 0.0
    quota: Literal["event", "video"] = "event"
    score_rows: Literal["text", "question"] = "text"
    frame_smoothing: float = 0.0
    final_keep: float = 0.0
    kv_layers: tuple[int, int] | None = None  # 4.8: the layers [a, b) that keep visual KV while decoding
    token_budget: int | None = None  # visual tokens of one video, separators included
    aligner: AlignerMode = "embedding"
    stages: Literal[1, 3] = 3  # 1: sections 2 and 3 do not happen
    off: bool = False


def exact(share: float) -> Fraction:
    """The decimal that `share` prints as, to six decimals: 0.07 is 7/100, not the binary number near it."""
    return Fraction(round(Decimal(str(share)) * 10**6), 10**6)


def prune_layers(settings: OracleSettings, layers: int) -> tuple[int, int, int]:
    """Section 2: the 0-based layers L1 < L2 < L3 before which tokens are dropped (`layers`: never)."""
    if settings.prune_layers is None:
        first = max(1, round(Fraction(3 * layers, 28)))
        second = max(first + 1, round(Fraction(10 * layers, 28)))
        third = max(second + 1, round(Fraction(19 * layers, 28)))
    else:
        first, second, third = settings.prune_layers
    if not 1 <= first < second < third <= layers:
        raise ValueError(f"no pruning layers 1 <= {first} < {second} < {third} <= {layers}")
    return first, second, third


def keep_count(settings: OracleSettings, length: int, is_key: bool, stage: int) -> int:
    """Section 2: of an event's `length` tokens left, how many stay at L1 (`stage` 1) or L2 (`stage` 2)."""
    if is_key:
        return math.ceil(exact(settings.keep_ratio) * length)
    return math.ceil(exact(settings.keep_ratio) * length / 2) if stage == 1 else 0


def retained_count(settings: OracleSettings, survivors: int) -> int:
    """Section 4: of a request's `survivors` of L2, how many keep KV in layers L1 .. L3-1 while decoding."""
    return math.ceil(exact(settings.decode_retention) * survivors)


def final_count(settings: OracleSettings, survivors: int) -> int:
    """4.7: of a request's `survivors` of L2, how many pass L3."""
    return math.ceil(exact(settings.final_keep) * survivors)


def frame_tokens(side: int | tuple[int, int], stride: int, newline: str = "event") -> int:
    """Tokens of one frame of `side` x `side` (or height x width) patches, pooled with `stride`, rounded up.

    With `newline` "row" each pooled row has one more.
    """
    height, width = side if isinstance(side, tuple) else (side, side)
    return math.ceil(height / stride) * (math.ceil(width / stride) + (newline == "row"))


def quotas(
    settings: OracleSettings, frames: int, side: int | tuple[int, int], newline: str = "event"
) -> tuple[int, int, int]:
    """Section 4: how many of the `frames` frames get each of the three strides, the token budget respected.

    Raises ValueError for a budget that even the coarsest stride on every frame exceeds.
    """
    events = min(settings.events, frames)
    sizes = [frames // events + (1 if i < frames % events else 0) for i in range(events)]
    first = second = 0
    for i, size in enumerate(sizes):
        key_frames = min(settings.key_frames, size)
        if i < min(settings.key_events, events):
            first += key_frames
            second += size - key_frames
        else:
            second += key_frames
    third = frames - first - second
    if settings.token_budget is None:
        return first, second, third

    costs = [frame_tokens(side, stride, newline) for stride in settings.strides]
    follows = events if newline == "event" else 0
    if settings.token_budget < frames * costs[2] + follows:
        raise ValueError(f"token_budget {settings.token_budget} is below {frames * costs[2] + follows}")
    for steps in range(2 * frames + 1):  # fewest single steps of one frame; among equals, most from s1 to s2
        for one in range(min(steps, first), -1, -1):
            two = steps - one
            counts = (first - one, second + one - two, third + two)
            tokens = sum(n * cost for n, cost in zip(counts, costs, strict=True)) + follows
            if counts[1] >= 0 and tokens <= settings.token_budget:
                return counts
    raise AssertionError("every frame at the coarsest stride fits")
