"""Which kind of KV a layer has, and how many tokens a KV block holds, by kind, so that each kind needs one KV
cache group.

vLLM gives every group blocks of the same bytes, and decoding pays for each group: blocks to allocate, a
block table, slots, attention metadata. With one block size for all layers it makes groups of as many layers
as the smallest kind has (`_get_kv_cache_groups_uniform_page_size` in vllm/v1/core): ten for
28 layers pruned at 3, 10, 19. With block sizes in the inverse ratio of the layer counts one group a kind is
enough (`_get_packed_kv_cache_groups`). That needs a physical layout with the blocks outermost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from metok_vllm.compression.selection import KVLayers, PruneLayers, prune_layers
from metok_vllm.contract.kv_spec import (
    AFTER_L1,
    AFTER_L2,
    EVERY_TOKEN,
    GROUP_KINDS,
    PLAIN_KINDS,
    RELEASED,
    TEXT,
    TEXT_AND_RETAINED,
    WINDOW_KINDS,
    GroupKind,
)

if TYPE_CHECKING:
    from vllm.config import CacheConfig

LARGEST_MULTIPLE = 10
"""Most that the least common multiple of the block sizes may be, in blocks of `--block-size` tokens.

vLLM finds prefixes in the cache by that multiple of tokens.
"""


def layer_kind(index: int, layers: PruneLayers, window: KVLayers | None) -> GroupKind:
    """Which tokens own a KV slot in layer `index` of a model that is pruned before `layers`.

    Args:
        index: of the layer, from 0.
        layers: L1, L2, L3.
        window: the setting `kv_layers`: where decoding keeps what is alive of the visual tokens.
    """
    first, second, third = layers
    if window is None:
        return EVERY_TOKEN if index < first else TEXT_AND_RETAINED if index < third else TEXT
    inside = window[0] <= index < window[1]
    if index < first:
        return EVERY_TOKEN if inside else RELEASED
    if not inside or index >= third:
        return TEXT
    return AFTER_L1 if index < second else AFTER_L2


def layers_by_kind(num_layers: int, layers: PruneLayers, window: KVLayers | None = None) -> dict[GroupKind, int]:
    """How many layers of each kind a model has that is pruned before `layers`; `window` is `kv_layers`."""
    kinds = [layer_kind(index, layers, window) for index in range(num_layers)]
    return {kind: kinds.count(kind) for kind in (PLAIN_KINDS if window is None else WINDOW_KINDS)}


@dataclass(frozen=True)
class BlockShape:
    """A KV cache group's blocks: how many layers share one, and for how many tokens."""

    layers: int
    tokens: int

    @property
    def area(self) -> int:
        """Bytes of a block, in units of one token's KV in one layer."""
        return self.layers * self.tokens


def padding(shapes: Sequence[BlockShape]) -> Fraction:
    """What a token that owns a slot in every layer takes beyond its own KV, as a share of it.

    Blocks of all groups are as large as the largest.
    """
    widest = max(shape.area for shape in shapes)
    own = sum(shape.layers for shape in shapes)
    return sum((Fraction(widest, shape.tokens) for shape in shapes), Fraction(0)) / own - 1


def block_multiples(counts: dict[GroupKind, int]) -> dict[GroupKind, int]:
    """Block size of each kind, in blocks of `--block-size` tokens, for one group a kind.

    The choice with the least padding, a text token's and a pruned one's (which owns slots in the first kind
    of layers only: below L1) added up; among equals the one with the smallest least common multiple.

    Args:
        counts: layers of each kind; a kind without layers has no group and gets 1.
    """
    kinds = [kind for kind in GROUP_KINDS if counts.get(kind)]
    sides = _best_sides(tuple(counts[kind] for kind in kinds))
    return {**dict.fromkeys(counts, 1), **dict(zip(kinds, sides, strict=True))}


@lru_cache
def _best_sides(counts: tuple[int, ...]) -> tuple[int, ...]:
    def cost(sides: tuple[int, ...]) -> tuple[Fraction, int, int]:
        shapes = [BlockShape(count, side) for count, side in zip(counts, sides, strict=True)]
        pruned = Fraction(max(shape.area for shape in shapes), shapes[0].area) - 1
        return padding(shapes) + pruned, math.lcm(*sides), sum(sides)

    every = itertools.product(range(1, LARGEST_MULTIPLE + 1), repeat=len(counts))
    return min((sides for sides in every if math.lcm(*sides) <= LARGEST_MULTIPLE), key=cost)


def divides_evenly(counts: Sequence[int]) -> bool:
    """Whether one group a kind needs no padding, within `LARGEST_MULTIPLE`."""
    whole = math.lcm(*counts)
    return math.lcm(*(whole // count for count in counts)) <= LARGEST_MULTIPLE


def block_size(
    cache_config: CacheConfig, num_layers: int, layers: PruneLayers, kind: GroupKind, window: KVLayers | None = None
) -> int:
    """Tokens a block in a kind of layer.

    Where an operator has chosen another layout than METok's (`VLLM_KV_CACHE_LAYOUT`), all kinds have vLLM's
    block size, and the groups are as many as vLLM then makes. vLLM resolves that layout later than it asks
    for block sizes.
    """
    size = int(cache_config.block_size)
    if cache_config.kv_cache_layout is None or not cache_config.get_resolved_kv_cache_layout().is_block_outermost:
        return size
    return size * block_multiples(layers_by_kind(num_layers, layers, window))[kind]


def check_window(num_layers: int, layers: PruneLayers, window: KVLayers | None) -> None:
    """Check the setting `kv_layers` for a model of `num_layers` layers that is pruned before `layers`.

    Raises:
        ValueError: the window reaches beyond the model, or no visual token is left in it.
    """
    if window is None:
        return
    if window[1] > num_layers:
        raise ValueError(f"kv_layers must end at the model's {num_layers} layers or before, not {list(window)}")
    if window[0] >= layers[2]:
        raise ValueError(
            f"kv_layers must start below the last of prune_layers, {layers[2]}, from where on no visual token is "
            f"left, not {list(window)}"
        )


def chosen_layers(num_layers: int, wanted: PruneLayers | Literal["cheap"] | None) -> PruneLayers:
    """The setting `prune_layers` for a model of `num_layers` layers.

    Raises:
        ValueError: the model has fewer than 3 layers, or not the layers that are wanted.
    """
    return cheap_layers(num_layers) if wanted == "cheap" else prune_layers(num_layers, wanted)


def cheap_layers(num_layers: int) -> PruneLayers:
    """The pruning layers nearest to the paper's scaled ones whose three groups have no padding.

    L2 stays: the layers on its two sides share a kind. "Nearest" is the sum of both distances; among equals
    the later ones, which prune less.

    Raises:
        ValueError: the model has fewer than 3 layers.
    """
    scaled = prune_layers(num_layers)
    first, second, third = scaled
    candidates = [
        (l1, second, l3)
        for l1 in range(1, second)
        for l3 in range(second + 1, num_layers)
        if divides_evenly((l1, l3 - l1, num_layers - l3))
    ]
    if not candidates:
        return scaled
    return min(candidates, key=lambda c: (abs(c[0] - first) + abs(c[2] - third), -c[0] - c[2]))
