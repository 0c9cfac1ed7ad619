"""Pruning by attention inside the language model, without events: FastV (arXiv 2403.06764).

After the first `layer` layers, the visual tokens that the prompt's last token attends to most (mean over
heads, in the layer just run) stay; the others leave all later layers, and their keys and values with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from benchmarks.accuracy.method import Entering, PaperBudget, Rows, Trace
from benchmarks.accuracy.video import Asked
from metok_vllm.compression.ordering import top


@dataclass(frozen=True)
class AttentionPruning:
    """Keeps a `share` of the visual tokens, or as many as give a budget's tokens.

    A budget of point `average` is met on average over all layers, one of point `entering` in the layers after
    the pruning.
    """

    layer: int
    share: float | None = None
    budget: PaperBudget | None = None
    rows: Rows = "last"
    smoothing_micro: ClassVar[int] = 0

    def drops_before(self, layers: int) -> dict[int, bool]:
        return {self.layer: True}

    def count(self, tokens: int, frames: int) -> int:
        """Tokens left of `tokens`."""
        if self.share is not None:
            return round(self.share * tokens)
        assert self.budget is not None
        wanted: float = self.budget(frames)
        if self.budget.point == "average":
            layers = self.budget.layers
            wanted = (layers * wanted - self.layer * tokens) / (layers - self.layer)
        return min(max(round(wanted), 1), tokens)

    def keep(self, cut: int, scores: Tensor, alive: Tensor, entering: Entering, asked: Asked) -> Tensor:
        return top(scores, self.count(len(alive), entering.frames))

    def held(self, layer: int, trace: Trace, layers: int) -> Tensor:
        return trace.alive[layer]
