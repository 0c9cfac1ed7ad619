"""Shares with intervals, and paired differences: one resampling of the videos serves every method and kind.

Questions about one video are not independent, so the bootstrap draws videos, not questions (a cluster
bootstrap, percentile intervals). Two methods are compared on the same questions and in the same draws. Where
every question went the same way, no draw differs and the bootstrap knows no width: there the interval reaches
as far as Wilson's for one question a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Verdicts = npt.NDArray[np.bool_]
DRAWS = 4000
LEVEL = 0.95
Z = 1.96  # of that level


@dataclass(frozen=True)
class Share:
    """Right answers among `n`; the interval is None where one video says all there is."""

    n: int
    accuracy: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """A method against another on the same questions; positive where the method is better."""

    difference: float
    low: float | None
    high: float | None
    won: int  # right where the other is wrong
    lost: int  # wrong where the other is right


class Bootstrap:
    """Draws of the videos that `video_of` names, one entry a question."""

    def __init__(self, video_of: Sequence[int], draws: int = DRAWS, seed: int = 0) -> None:
        self.video_of = np.asarray(video_of, dtype=np.int64)
        self.videos = int(self.video_of.max()) + 1 if len(self.video_of) else 0
        rng = np.random.default_rng(seed)
        # How often each video is drawn: [draws, videos].
        self.weights = rng.multinomial(self.videos, np.full(self.videos, 1 / max(self.videos, 1)), size=draws)

    def share(self, right: Verdicts, chosen: Verdicts) -> Share:
        """Share of `right` among the `chosen` questions (both bool [questions])."""
        n = int(chosen.sum())
        if n == 0:
            raise ValueError("a share of no question")
        low, high = self._interval(right.astype(np.float64), chosen)
        if low is not None and high is not None and low == high:
            low, high = max(0.0, low - self._doubt(chosen)), min(1.0, high + self._doubt(chosen))
        return Share(n, float(right[chosen].mean()), low, high)

    def difference(self, right: Verdicts, other: Verdicts, chosen: Verdicts) -> Difference:
        """`right` minus `other` among the `chosen` questions, paired by question."""
        gap = right.astype(np.float64) - other.astype(np.float64)
        low, high = self._interval(gap, chosen)
        if low is not None and high is not None and low == high:
            low, high = max(-1.0, low - self._doubt(chosen)), min(1.0, high + self._doubt(chosen))
        won = int((right & ~other & chosen).sum())
        lost = int((other & ~right & chosen).sum())
        return Difference(float(gap[chosen].mean()), low, high, won, lost)

    def _doubt(self, chosen: Verdicts) -> float:
        """Upper end of Wilson's interval of a share of 0 among as many questions as there are videos."""
        videos = len(np.unique(self.video_of[chosen]))
        return Z**2 / (videos + Z**2)

    def _interval(self, values: npt.NDArray[np.float64], chosen: Verdicts) -> tuple[float | None, float | None]:
        counts = np.bincount(self.video_of[chosen], minlength=self.videos)
        if int((counts > 0).sum()) < 2:
            return None, None
        sums = np.bincount(self.video_of[chosen], weights=values[chosen], minlength=self.videos)
        drawn = self.weights @ counts
        means = (self.weights @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def is_right(text: str, answer: str) -> bool:
    """Exact match, blanks at either end aside."""
    return text.strip() == answer.strip()


def compare(
    boot: Bootstrap, right: Verdicts, stock: Verdicts | None, slices: dict[str, Verdicts]
) -> dict[str, dict[str, Any]]:
    """Share and, where there is a stock run, paired difference for each slice of the questions;
    empty slices are left out.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, chosen in slices.items():
        if not chosen.any():
            continue
        row: dict[str, Any] = asdict(boot.share(right, chosen))
        if stock is not None:
            row["to_stock"] = asdict(boot.difference(right, stock, chosen))
        table[name] = row
    return table
