"""How far a variant's distribution is from the stock model's, along the stock model's own answer.

The answer is teacher-forced: the variant is told the stock model's tokens one by one and says what it would
have thought of each. So one changed word does not make all words behind it incomparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEAR_TIE = 0.1
"""Nats. Where the stock model's own two best tokens are nearer than this, either is as good an answer."""

KL_LIMIT = 0.2
"""Nats. An answer that is farther than this from the stock model's is not left as it was."""

NEEDS_VIDEO = 0.1
"""Nats. A question whose answer changes by less than this without the video does not need it."""

Z = 1.959964  # of the 95 % interval


def divergence(stock: Mapping[int, float], variant: Mapping[int, float]) -> float:
    """KL(stock || variant) of one token, over the tokens that both state and one bucket for all others.

    Merging tokens into a bucket can only lower it, so this never exceeds the true divergence.

    Args:
        stock: log-probability by token id, the most probable ones.
        variant: the same of the variant; may state others too.
    """
    shared = [token for token in stock if token in variant]
    total = sum(math.exp(stock[t]) * (stock[t] - max(variant[t], _LEAST)) for t in shared)
    rest_stock = max(0.0, 1.0 - math.fsum(math.exp(stock[t]) for t in shared))
    rest_variant = max(0.0, 1.0 - math.fsum(math.exp(variant[t]) for t in shared))
    if rest_stock > _ROUNDING:
        total += rest_stock * (math.log(rest_stock) - math.log(max(rest_variant, math.exp(_LEAST))))
    return max(0.0, total)


_LEAST = -50.0  # a log-probability of -inf counts as this
_ROUNDING = 1e-6  # what float32 log-probabilities do not add up to


def is_near_tie(stock: Mapping[int, float]) -> bool:
    """Whether the stock model itself wavers between its two best tokens."""
    best = sorted(stock.values(), reverse=True)[:2]
    return len(best) == 2 and best[0] - best[1] < NEAR_TIE


@dataclass(frozen=True)
class Sample:
    """One question under one variant. Distances are means over the answer's tokens."""

    kl: float  # nats
    harm: float  # nats, of the tokens that the variant is less sure of than the stock model, the others as 0
    agrees: bool  # whether every token is the one that the variant would have said, near-ties aside


def sample(
    tokens: Sequence[int],
    steps: Sequence[Mapping[int, float]],
    variant: Sequence[Mapping[int, float]],
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
    lost = [theirs[token] < ours[token] for token, ours, theirs in zip(tokens, steps, variant, strict=True)]
    harm = math.fsum(distance for distance, is_lost in zip(each, lost, strict=True) if is_lost)
    agrees = all(rank == 1 or is_near_tie(ours) for rank, ours in zip(ranks, steps, strict=True))
    return Sample(math.fsum(each) / len(each), harm / len(each), agrees)


def interval(agreeing: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson). It takes the questions as independent of one another."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = agreeing / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
