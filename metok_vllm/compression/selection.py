"""Which visual tokens survive each pruning layer of the LLM (docs/method.md section 2).

Counts exist twice, equal by test: as Python integers, for the scheduler, and as tensors, for the device.
"""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from .ordering import place_in_group
from .ratios import MICRO, ceil_share, check_micro
from .tiers import TierQuota, TokensPerFrame, video_tokens

PruneLayers = tuple[int, int, int]
"""`L1 < L2 < L3`: pruning happens just before each of these layers runs; layers count from 0."""

KVLayers = tuple[int, int]
"""`[a, b)`: the layers in which decoding keeps what is alive of the visual tokens; layers count from 0."""

PruningLayer = Literal[1, 2, 3]
"""One of the three pruning layers: 1 for L1, 2 for L2, 3 for L3."""

REFERENCE_DEPTH = 28
REFERENCE_LAYERS = (3, 10, 19)


def prune_layers(num_layers: int, override: tuple[int, int, int] | None = None) -> PruneLayers:
    """Pruning layers of an LLM with `num_layers` layers: the paper's, scaled, or the given ones.

    Raises:
        ValueError: the model has fewer than 3 layers, or the override is not
            `1 <= L1 < L2 < L3 <= num_layers`.
    """
    if override is not None:
        first, second, third = override
        if not 1 <= first < second < third <= num_layers:
            raise ValueError(
                f"prune_layers must be three increasing numbers from 1 to the model's {num_layers} layers, "
                f"not {list(override)}"
            )
        return first, second, third
    scaled = [round(Fraction(num_layers * layer, REFERENCE_DEPTH)) for layer in REFERENCE_LAYERS]
    first = max(1, scaled[0])
    second = max(first + 1, scaled[1])
    third = max(second + 1, scaled[2])
    if third > num_layers:
        raise ValueError(f"a model needs at least 3 layers for three pruning layers, not {num_layers}")
    return first, second, third


def _divisor(is_key: bool, pruning_layer: PruningLayer) -> int | None:
    """What an event's share `ratio * length` is divided by at a pruning layer; None where nothing is kept."""
    if pruning_layer not in (1, 2, 3):
        raise ValueError(f"there are pruning layers 1, 2 and 3, not {pruning_layer!r}")
    if pruning_layer == 3 or (pruning_layer == 2 and not is_key):
        return None
    return 1 if is_key else 2


def keep_count(length: int, ratio_micro: int, is_key: bool, pruning_layer: PruningLayer) -> int:
    """Tokens that an event of `length` tokens keeps at a pruning layer,
    exactly (`ratios.to_micro` gives the ratio).

    Key event: `ceil(ratio * length)` at L1 and L2; other event: `ceil(ratio * length / 2)` at L1 and 0 at L2;
    nothing at L3. `length` is the event's length just before that layer.
    """
    divisor = _divisor(is_key, pruning_layer)
    return 0 if divisor is None else ceil_share(length, ratio_micro, divisor)


def keep_counts(event_lengths: Tensor, is_key: Tensor, ratio_micro: int, pruning_layer: PruningLayer) -> Tensor:
    """`keep_count` of every event: `event_lengths` int64 [e], `is_key` bool [e] to int64 [e]."""
    check_micro(ratio_micro)

    def counts(divisor: int | None) -> Tensor:
        if divisor is None:
            return torch.zeros_like(event_lengths)
        denominator = MICRO * divisor
        return (ratio_micro * event_lengths + (denominator - 1)) // denominator

    return torch.where(is_key, counts(_divisor(True, pruning_layer)), counts(_divisor(False, pruning_layer)))


def select_per_event(scores: Tensor, event_ids: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts[event]` tokens with the highest scores in every event.

    Args:
        scores: float [n], one for each of the video's tokens still alive, in prompt order.
        event_ids: int64 [n].
        counts: int64 [e], at most the event's length each (`keep_counts`).

    Returns:
        bool [n]. Ties keep the lower index. NaN is chosen last, but chosen where the count asks for it: the
        number kept never depends on the scores, because slots were reserved for it. Never waits for the GPU.
    """
    return place_in_group(scores, event_ids) < counts[event_ids]


def survivor_bounds(
    quota: TierQuota, tokens_per_frame: TokensPerFrame, separators: bool, key_events: int, ratio_micro: int
) -> tuple[int, int]:
    """Most visual tokens of one video that can survive L1, and L2, whatever its content.

    How long each event is depends on the content. So these are upper bounds to reserve memory by, not exact
    maxima. They assume the worst case: every event that is not key has a single frame, one of the coarsest.
    Each event's share is rounded up by as much as its ratio allows.

    Args:
        quota: the video's.
        tokens_per_frame: tokens of a frame in each tier.
        separators: whether one follows each event.
        key_events: the setting; all events where there are fewer.
        ratio_micro: `keep_ratio` in millionths.

    Returns:
        (bound after L1, bound after L2); nothing survives L3.
    """
    check_micro(ratio_micro)
    total = video_tokens(quota, tokens_per_frame, separators)
    key = min(key_events, quota.events)
    others = quota.events - key
    in_others = _fewest_tokens(quota, tokens_per_frame, others) + (others if separators else 0)
    in_key = total - in_others if key else 0
    in_others = total - in_key

    ratio = Fraction(ratio_micro, MICRO)
    after_1 = int(_share_bound(in_key, key, ratio) + _share_bound(in_others, others, ratio / 2))
    after_1_in_key = min(int(_share_bound(in_key, key, ratio)), in_key)
    after_2 = int(_share_bound(after_1_in_key, key, ratio))
    return min(after_1, total), min(after_2, after_1_in_key)


def _fewest_tokens(quota: TierQuota, tokens_per_frame: TokensPerFrame, frames: int) -> int:
    """Tokens of the `frames` cheapest frames of a video."""
    tokens = 0
    for count, each in zip(reversed(quota.counts()), reversed(tokens_per_frame), strict=True):
        taken = min(frames, count)
        tokens += taken * each
        frames -= taken
    return tokens


def _share_bound(tokens: int, events: int, ratio: Fraction) -> Fraction:
    """No less than the sum of `ceil(ratio * length)` over `events` events of `tokens` tokens together.

    With the ratio in lowest terms, rounding up adds at most `1 - 1/denominator`.
    """
    return ratio * tokens + events * (1 - Fraction(1, ratio.denominator))
