"""Block sizes by kind of layer: one group a kind, as vLLM's own code makes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import CacheConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from metok_vllm.compression.selection import KVLayers, PruneLayers, prune_layers
from metok_vllm.contract.kv_layout import (
    LARGEST_MULTIPLE,
    BlockShape,
    block_multiples,
    block_size,
    cheap_layers,
    check_window,
    chosen_layers,
    layer_kind,
    layers_by_kind,
    padding,
)
from metok_vllm.contract.kv_spec import EVERY_TOKEN, GROUP_KINDS, DeepAttentionSpec, group_kind
from metok_vllm.scheduler.kv_manager import register_kv_cache_spec

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups  # vLLM 0.33
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups  # vLLM 0.32

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


@st.composite
def pruned_models(draw: st.DrawFn) -> tuple[int, PruneLayers, KVLayers | None]:
    layers = draw(st.integers(3, 64))
    first, second, third = sorted(draw(st.sets(st.integers(1, layers), min_size=3, max_size=3)))
    start, end = sorted(draw(st.sets(st.integers(0, layers), min_size=2, max_size=2)))
    return layers, (first, second, third), draw(st.sampled_from([None, (start, end)]))


def groups_of_vllm(
    num_layers: int, layers: PruneLayers, layout: str, window: KVLayers | None = None
) -> Iterator[tuple[str, BlockShape]]:
    """Kind and shape of each group that vLLM makes of a model's layers."""
    register_kv_cache_spec()
    cache = CacheConfig(block_size=16)
    cache.kv_cache_layout = layout
    specs: dict[str, Any] = {}
    for i in range(num_layers):
        kind = layer_kind(i, layers, window)
        size = block_size(cache, num_layers, layers, kind, window)
        specs[f"layer.{i}"] = (
            FullAttentionSpec(block_size=size, **SHAPE)
            if kind == EVERY_TOKEN
            else DeepAttentionSpec(block_size=size, **SHAPE, kind=kind)
        )
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=cache,
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
    )
    for group in get_kv_cache_groups(config, specs):
        yield group_kind(group.kv_cache_spec), BlockShape(len(group.layer_names), group.kv_cache_spec.block_size)


@given(pruned_models())
def test_a_kind_is_one_group_where_blocks_are_outermost(model: tuple[int, PruneLayers, KVLayers | None]) -> None:
    num_layers, layers, window = model
    counts = layers_by_kind(num_layers, layers, window)
    assert sum(counts.values()) == num_layers
    shapes = list(groups_of_vllm(num_layers, layers, "BLNHC", window))
    multiples = block_multiples(counts)
    if len(set(multiples.values())) > 1:
        assert {kind: shape.layers for kind, shape in shapes} == {k: n for k, n in counts.items() if n}
        assert len(shapes) == sum(n > 0 for n in counts.values())
    assert all(shape.tokens == 16 * multiples[kind] for kind, shape in shapes)
    assert math.lcm(*multiples.values()) <= LARGEST_MULTIPLE


@given(pruned_models())
def test_no_worse_than_one_block_size(model: tuple[int, PruneLayers, KVLayers | None]) -> None:
    """One group a kind with equal blocks is among the choices."""
    counts = layers_by_kind(*model)
    kinds = [kind for kind in GROUP_KINDS if counts.get(kind)]

    def cost(multiples: dict[Any, int]) -> Fraction:
        shapes = [BlockShape(counts[kind], multiples[kind]) for kind in kinds]
        return padding(shapes) + Fraction(max(s.area for s in shapes), shapes[0].area)

    assert cost(block_multiples(counts)) <= cost(dict.fromkeys(counts, 1))


@pytest.mark.parametrize(
    ("num_layers", "layers", "sizes", "padded"),
    [
        (28, (3, 10, 19), [96, 16, 32], Fraction(1, 14)),
        (28, (4, 10, 20), [64, 16, 32], Fraction(0)),
        (24, (3, 9, 16), [80, 16, 32], Fraction(2, 15)),
        (24, (4, 9, 16), [96, 32, 48], Fraction(0)),
    ],
)
def test_by_hand(num_layers: int, layers: PruneLayers, sizes: list[int], padded: Fraction) -> None:
    shapes = [shape for _, shape in groups_of_vllm(num_layers, layers, "BLNHC")]
    assert [shape.tokens for shape in shapes] == sizes
    assert padding(shapes) == padded


@pytest.mark.parametrize(
    ("window", "kinds"),
    [
        (None, "eee rr rr t"),
        ((0, 8), "eee 11 22 t"),
        ((1, 6), "xee 11 2t t"),
        ((3, 7), "xxx 11 22 t"),
        ((4, 8), "xxx t1 22 t"),
        ((6, 7), "xxx tt t2 t"),
        ((0, 1), "exx tt tt t"),
    ],
)
def test_the_kind_of_each_layer_by_hand(window: KVLayers | None, kinds: str) -> None:
    """Eight layers, pruned before 3, 5, 7."""
    letters = {
        "every token": "e",
        "every token, then text": "x",
        "text and retained": "r",
        "text and survivors of L1": "1",
        "text and survivors of L2": "2",
        "text": "t",
    }
    found = [layer_kind(index, (3, 5, 7), window) for index in range(8)]
    assert [letters[kind] for kind in found] == list(kinds.replace(" ", ""))


def test_a_window_must_lie_in_the_model_and_hold_something() -> None:
    for window in (None, (0, 1), (6, 8)):
        check_window(8, (3, 5, 7), window)
    with pytest.raises(ValueError, match=r"must end at the model's 8 layers or before, not \[2, 9\]"):
        check_window(8, (3, 5, 7), (2, 9))
    with pytest.raises(ValueError, match=r"must start below the last of prune_layers, 7, .* not \[7, 8\]"):
        check_window(8, (3, 5, 7), (7, 8))


def test_another_layout_keeps_one_block_size() -> None:
    shapes = [shape for _, shape in groups_of_vllm(28, (3, 10, 19), "LBNHC")]
    assert len(shapes) == 10
    assert {shape.tokens for shape in shapes} == {16}


@given(st.integers(3, 128))
def test_cheap_layers(num_layers: int) -> None:
    first, second, third = cheap_layers(num_layers)
    scaled = prune_layers(num_layers)
    assert second == scaled[1]
    assert chosen_layers(num_layers, "cheap") == (first, second, third)
    counts = layers_by_kind(num_layers, (first, second, third))
    shapes = [BlockShape(counts[kind], side) for kind, side in block_multiples(counts).items() if counts[kind]]
    assert padding(shapes) == 0 or (first, second, third) == scaled


def test_cheap_layers_by_hand() -> None:
    assert cheap_layers(28) == (4, 10, 20)
    assert cheap_layers(24) == (4, 9, 16)
    assert chosen_layers(28, None) == (3, 10, 19)
    assert chosen_layers(28, (1, 2, 28)) == (1, 2, 28)
