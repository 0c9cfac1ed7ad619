"""vLLM's own pruning of videos, EVS and VidCom2 (`--video-pruning-method`), at a rate for a number of tokens.

Both drop visual tokens before the language model, so all its layers have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TITLES = {"evs": "EVS", "vidcom2": "VidCom2"}
"""By vLLM's `video_pruning_method`."""

DECIMALS = 6
"""Of a rate: enough to tell apart the counts of a video of half a million tokens."""


@dataclass(frozen=True)
class Pruning:
    """One of vLLM's methods at one rate."""

    method: str
    rate: float  # the share that is dropped, vLLM's `video_pruning_rate`
    wanted: float  # visual tokens of a video that the rate is for
    tokens: int  # those that vLLM's own function says are left

    @property
    def options(self) -> dict[str, str | float]:
        """Keyword arguments of `vllm.LLM`."""
        return {"video_pruning_method": self.method, "video_pruning_rate": self.rate}


def vllm_count(method: str) -> Callable[[int, int, float], int]:
    """vLLM's function of (tokens a grid, grids, rate) that says how many visual tokens a video keeps."""
    if method == "vidcom2":
        from vllm.multimodal.video_prune.vidcom2 import compute_retained_tokens_count as vidcom2

        return vidcom2
    from vllm.multimodal.video_prune.evs import compute_retained_tokens_count as evs

    return evs


def nearest(method: str, wanted: float, per_step: int, steps: int) -> Pruning:
    """The rate at which vLLM leaves nearest to `wanted` visual tokens of `steps` grids of `per_step` each.

    EVS never leaves fewer than the first grid has, VidCom2 never fewer than one a grid.

    Raises:
        ValueError: nothing would be dropped, or nothing left.
    """
    total = per_step * steps
    if not 0.5 <= wanted < total - 0.5:
        raise ValueError(f"{TITLES[method]} cannot leave {wanted:g} tokens of a video of {total}")
    # vLLM rounds down what is left: half a token more, and a rate's last digit cannot cost one.
    rate = round(1 - (round(wanted) + 0.5) / total, DECIMALS)
    return Pruning(method, rate, wanted, vllm_count(method)(per_step, steps, rate))
