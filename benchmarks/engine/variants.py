"""What is compared: stock vLLM, stock vLLM with fewer frames, and METok's two presets,
all on the same frames and prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metok_vllm.compression.pooling import PoolStyle, tokens_per_frame
from metok_vllm.compression.tiers import quota, video_tokens
from metok_vllm.contract.settings import MetokSettings

PREFILL_STEP = 1024

NOT_IN_THE_RUN = {
    "EVS (--video-pruning-method evs)": "does not apply: vLLM 0.32 has it for Qwen2.5-VL, Qwen3-VL, Qwen3.5, "
    "Nemotron-Nano-VL and Compass only",
    "VidCom2 (--video-pruning-method vidcom2)": "does not apply: vLLM 0.32 has it for the Qwen3-VL family only",
}


@dataclass(frozen=True)
class Variant:
    """One way to serve the requests."""

    name: str
    label: str
    frames: int
    metok: dict[str, Any] | None  # the server's METok settings; None is stock vLLM


def stock_tokens(frames: int, grid: int) -> int:
    """Visual tokens of a video in stock LLaVA-OneVision: each frame pooled by 2, one separator at the end."""
    side = -(-grid // 2)
    return frames * side * side + 1


def metok_tokens(frames: int, grid: int) -> int:
    """Visual tokens that METok's first stage leaves with its defaults (docs/method.md section 4)."""
    defaults = MetokSettings()
    tiers = quota(frames, defaults.events, defaults.key_events, defaults.key_frames)
    per_frame = tokens_per_frame(grid, grid, defaults.strides, PoolStyle("bilinear"))
    return video_tokens(tiers, per_frame, separators=True)


def frames_at_equal_tokens(frames: int, grid: int) -> int:
    """Frames with which stock vLLM takes nearest to the visual tokens
    that METok's first stage leaves of `frames`.

    That is the baseline's most generous reading: METok goes on to prune inside the language model.
    """
    target = metok_tokens(frames, grid)
    return min(range(1, frames + 1), key=lambda n: abs(stock_tokens(n, grid) - target))


def variants(frames: int, grid: int, names: list[str] | None = None) -> list[Variant]:
    """All variants, or those named, in the order in which they are to run.

    Raises:
        ValueError: a name is unknown.
    """
    fewer = frames_at_equal_tokens(frames, grid)
    known = [
        Variant("stock", "stock vLLM", frames, None),
        Variant("fewer-frames", f"stock vLLM, {fewer} frames", fewer, None),
        Variant("metok-paper", "METok, paper", frames, {"preset": "paper"}),
        Variant("metok-balanced", "METok, balanced", frames, {"preset": "balanced"}),
    ]
    unknown = set(names or ()) - {variant.name for variant in known}
    if unknown:
        raise ValueError(
            f"unknown variant {', '.join(sorted(unknown))}; there are {', '.join(variant.name for variant in known)}"
        )
    by_name = {variant.name: variant for variant in known}
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


def prefill_budget(frames: int, grid: int, text: int) -> int:
    """Tokens a step, the same for all variants: enough for stock's whole prompt,
    so that nobody's prompt is cut in two.
    """
    prompt = stock_tokens(frames, grid) + text + 256
    return max(8192, -(-prompt // PREFILL_STEP) * PREFILL_STEP)
