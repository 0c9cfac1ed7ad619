"""What a request costs with and without METok: the arithmetic behind any claim (docs/method.md section 5).

Counted: the LLM's decoder layers. Not counted: the vision tower, the output head, and the scoring of stage 2
(about one attention row for each text row after the video, at two layers).
"""

from dataclasses import dataclass
from typing import Literal

from .retention import retained_count
from .selection import KVLayers, PruneLayers, keep_count
from .tiers import TokensPerFrame, expected_event_sizes

Attention = Literal["none", "causal", "full"]
"""How attention FLOPs are counted: not at all, half the square (what is needed), or the full square."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of an LLM that its cost depends on."""

    layers: int
    hidden: int
    intermediate: int  # width of the gated MLP
    heads: int
    kv_heads: int
    head_dim: int

    def linear_flops(self, tokens: int) -> int:
        """One layer's projections and gated MLP: `2n(2h^2 + 2hc + 3hm)` if the heads span the hidden size."""
        projections = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return 2 * tokens * (projections + 3 * self.hidden * self.intermediate)

    def attention_flops(self, tokens: int, attention: Attention) -> int:
        """One layer's `Q K^T` and `P V`: `4 n^2 h` in full, half of it causal."""
        full = 4 * tokens * tokens * self.heads * self.head_dim
        return {"none": 0, "causal": full // 2, "full": full}[attention]

    def layer_flops(self, tokens: int, attention: Attention) -> int:
        return self.linear_flops(tokens) + self.attention_flops(tokens, attention)

    def kv_bytes(self, element_bytes: int) -> int:
        """KV cache of one token in one layer, in bytes."""
        return 2 * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of a request (all its videos, separators included) along its way."""

    stock: int  # what the model takes without METok
    encoded: int  # after stage 1
    after_l1: int
    after_l2: int
    retained: int = 0  # with KV in layers L1 .. L3-1 while decoding
    after_l3: int = 0  # in the layers from L3 up, with KV there

    def __post_init__(self) -> None:
        least = min(self.retained, self.after_l3)
        most = max(self.retained, self.after_l3)
        if not self.encoded >= self.after_l1 >= self.after_l2 >= most >= least >= 0 or self.stock < 0:
            raise ValueError(f"visual tokens only ever get fewer, unlike {self!r}")


@dataclass(frozen=True)
class Cost:
    """An amount (FLOPs or bytes), and the part of it that is there because of the visual tokens."""

    total: int
    visual: int

    def saved(self, stock: "Cost") -> float:
        """Share of the stock total that is no longer spent, text included; 0.8 = 80 % fewer."""
        return 1 - self.total / stock.total if stock.total else 0.0

    def saved_visual(self, stock: "Cost") -> float:
        """The same for the visual part alone; 0 where there is nothing visual."""
        return 1 - self.visual / stock.visual if stock.visual else 0.0


@dataclass(frozen=True)
class RequestAccount:
    """Prefill FLOPs and decode-time KV bytes of one request, stock and with METok."""

    prefill_flops_stock: Cost
    prefill_flops: Cost
    kv_bytes_stock: Cost
    kv_bytes: Cost


def account(
    shape: ModelShape,
    layers: PruneLayers,
    text: int,
    visual: VisualTokens,
    attention: Attention = "causal",
    kv_element_bytes: int = 2,
    window: KVLayers | None = None,
) -> RequestAccount:
    """Cost of a request of `text` text tokens (image tokens count as text) and the given visual tokens.

    KV is what the request holds when decoding starts: with the window `kv_layers` what is alive in each
    of its layers, whatever `visual` says of retained tokens. The visual part of a cost is the cost less
    that of the same request without any visual token.
    """
    first, second, third = layers
    # Visual tokens (computed in prefill, kept in the cache) of each run of layers, and its number of layers.
    runs = [
        (first, visual.encoded, visual.encoded),
        (second - first, visual.after_l1, visual.retained),
        (third - second, visual.after_l2, visual.retained),
        (shape.layers - third, visual.after_l3, visual.after_l3),
    ]
    if window is not None:
        computed = [count for run, count, _ in runs for _ in range(run)]
        runs = [(1, count, count if window[0] <= i < window[1] else 0) for i, count in enumerate(computed)]
    stock = [(shape.layers, visual.stock, visual.stock)]

    def flops(runs: list[tuple[int, int, int]]) -> Cost:
        total = sum(count * shape.layer_flops(text + computed, attention) for count, computed, _ in runs)
        return Cost(total, total - shape.layers * shape.layer_flops(text, attention))

    def kv(runs: list[tuple[int, int, int]]) -> Cost:
        each = shape.kv_bytes(kv_element_bytes)
        kept = sum(count * kept for count, _, kept in runs)
        return Cost(each * (kept + shape.layers * text), each * kept)

    return RequestAccount(flops(stock), flops(runs), kv(stock), kv(runs))


def expected_visual_tokens(
    frames: int,
    events: int,
    key_events: int,
    key_frames: int,
    tokens_per_frame: TokensPerFrame,
    separators: bool,
    ratio_micro: int,
    stock: int,
    delta_micro: int = 0,
) -> VisualTokens:
    """Visual tokens of one video whose events have equal length, as far as its frames divide evenly.

    The operating point of any figure that is stated for `frames` alone. `stock` is the model's own number of
    visual tokens for that video; the other arguments are those of `tiers.quota`, `tiers.video_tokens`,
    `selection.keep_count` and `retention.retained_count`.
    """
    t1, t2, t3 = tokens_per_frame
    encoded = after_l1 = after_l2 = 0
    for event, size in enumerate(expected_event_sizes(frames, events)):
        key = event < key_events
        finer, coarser = (t1, t2) if key else (t2, t3)
        best = min(key_frames, size)
        length = best * finer + (size - best) * coarser + (1 if separators else 0)
        kept_1 = keep_count(length, ratio_micro, key, 1)
        encoded += length
        after_l1 += kept_1
        after_l2 += keep_count(kept_1, ratio_micro, key, 2)
    return VisualTokens(stock, encoded, after_l1, after_l2, retained_count(after_l2, delta_micro))
