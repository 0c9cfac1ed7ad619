"""What the benchmark knows of a model family: its tokens, its prompt, vLLM's own prunings for it.

All of it follows from a config and a frame's size; no engine is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from metok_vllm.compression.accounting import VisualTokens, expected_visual_tokens
from metok_vllm.compression.pooling import PoolStyle, tokens_per_frame
from metok_vllm.contract.settings import MetokSettings
from metok_vllm.models.registry import family_of

Grid = tuple[int, int]
"""Rows and columns of what the tower gives for a frame, or for a pair of frames."""

QWEN_TURN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Family:
    """A model family that the benchmark can run."""

    title: str
    model_type: str  # in config.json
    architecture: str  # vLLM's name
    style: PoolStyle  # of METok's stage 1
    turn: str  # a chat turn with one video, and {question}
    frames_at_once: int = 1  # that the tower makes one grid of
    merge: int = 1  # patches on a side of what the tower makes one token of
    stock_separators: int = 0  # that the stock model puts behind a video
    frame: Grid = (0, 0)  # height and width in pixels; 0: what the config says
    tiny_frame: Grid = (0, 0)  # the same for the tiny model
    timed: bool = False  # whether a video must say when its frames are
    most_label: int = 0  # tokens of the text that labels what the tower takes at once, at the most
    pruning: tuple[str, ...] = ()  # vLLM's `video_pruning_method`s for it

    @property
    def strides(self) -> tuple[int, int, int]:
        """METok's; the finest is how the stock model pools every frame."""
        known = family_of([self.architecture])
        assert known is not None, f"METok serves no {self.architecture}"
        return known.strides

    def steps(self, frames: int) -> int:
        """Grids that the tower gives for so many frames."""
        return -(-frames // self.frames_at_once)

    def tokens_per_step(self, grid: Grid) -> int:
        """Visual tokens of one grid in the stock model."""
        return tokens_per_frame(*grid, self.strides, self.style)[0]

    def stock_tokens(self, frames: int, grid: Grid) -> int:
        """Visual tokens of a video in the stock model."""
        return self.steps(frames) * self.tokens_per_step(grid) + self.stock_separators

    def expected(self, frames: int, grid: Grid) -> VisualTokens:
        """Visual tokens of a video with METok's preset `paper`.

        `encoded` is exact. What passes L1 and L2 depends on how long the video's events are; here they have
        equal lengths.
        """
        preset = MetokSettings()
        return expected_visual_tokens(
            self.steps(frames), preset.events, preset.key_events, preset.key_frames,
            tokens_per_frame(*grid, self.strides, self.style), self.style.separators == "event",
            preset.keep_ratio_micro, self.stock_tokens(frames, grid), preset.decode_retention_micro,
        )  # fmt: skip


LLAVA_ONEVISION = Family(
    title="LLaVA-OneVision",
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    style=PoolStyle("bilinear"),
    turn="<|im_start|>user <video>\n{question}<|im_end|><|im_start|>assistant\n",
    stock_separators=1,
)

QWEN2_5_VL = Family(
    title="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    style=PoolStyle("average", "none"),
    turn=QWEN_TURN,
    frames_at_once=2,
    merge=2,
    frame=(252, 448),  # 9 x 16 tokens
    tiny_frame=(112, 196),  # 4 x 7
    timed=True,
    pruning=("evs",),
)

QWEN3_VL = Family(
    title="Qwen3-VL",
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    style=PoolStyle("average", "none"),
    turn=QWEN_TURN,
    frames_at_once=2,
    merge=2,
    frame=(288, 512),  # 9 x 16 tokens
    tiny_frame=(128, 224),  # 4 x 7
    timed=True,
    most_label=24,
    pruning=("evs", "vidcom2"),
)

FAMILIES = (LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL)


def by_model_type(model_type: str | None) -> Family:
    """The family of a config's `model_type`.

    Raises:
        ValueError: the benchmark has no such family.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    titles = ", ".join(family.title for family in FAMILIES)
    raise ValueError(f"the benchmark is for models of {titles}, not {model_type!r}")


def mean_over_layers(tokens: VisualTokens, prune_layers: tuple[int, int, int], layers: int) -> float:
    """Visual tokens that a layer computes on average in prefill; `prune_layers` are METok's L1, L2, L3."""
    first, second, third = prune_layers
    total = first * tokens.encoded + (second - first) * tokens.after_l1 + (third - second) * tokens.after_l2
    return (total + (layers - third) * tokens.after_l3) / layers
