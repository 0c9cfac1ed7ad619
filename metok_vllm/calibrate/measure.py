"""How far a variant is from the stock model, along the stock model's own answer (`contract/forced.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metok_vllm.contract.forced import Step, choice, divergence, is_choice

NEEDS_VIDEO = 0.1
"""Nats. A question whose answer changes by less than this without the video does not need it."""

Z = 1.959964  # of the 95 % interval


@dataclass(frozen=True)
class Sample:
    """One question under one variant. Distances are means over the answer's tokens."""

    kl: float  # nats
    harm: float  # nats, of the tokens that the variant is less sure of than the stock model, the others as 0
    agrees: bool  # whether what the variant would have said is as good at every token (`NEAR_TIE`)


def sample(
    tokens: Sequence[int],
    steps: Sequence[Step],
    variant: Sequence[Step],
    ranks: Sequence[int],
) -> Sample:
    """Compare one answer.

    Where the stock model wavers, a variant may be surer of the very same token. That is a distance, which the
    probe of the horizon counts, but nothing that an answer suffers from.

    Args:
        tokens: the stock model's answer.
        steps: its distribution at each of them.
        variant: the variant's at the same tokens.
        ranks: the place of the stock model's token among the variant's; 1 is the first.
    """
    each = [divergence(ours, theirs) for ours, theirs in zip(steps, variant, strict=True)]
    lost = [not theirs[token] >= ours[token] for token, ours, theirs in zip(tokens, steps, variant, strict=True)]
    harm = math.fsum(distance for distance, is_lost in zip(each, lost, strict=True) if is_lost)
    choices = [choice(*one) for one in zip(tokens, ranks, variant, strict=True)]
    agrees = all(is_choice(ours, one) for ours, one in zip(steps, choices, strict=True))
    return Sample(math.fsum(each) / len(each), harm / len(each), agrees)


def interval(agreeing: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson). It takes the questions as independent of one another."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = agreeing / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
