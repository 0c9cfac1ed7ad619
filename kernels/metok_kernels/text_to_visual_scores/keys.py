"""Where the keys of a layer lie: one after the other, or in vLLM's paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metok_kernels.checks import FLOATS, INDEX, expect, require

QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@dataclass(frozen=True)
class PackedKeys:
    """Keys computed in this step: the dense prefill of the survivors."""

    keys: torch.Tensor
    """[rows, kv_heads, head_dim], rotated; float; last axis contiguous."""
    start: torch.Tensor
    """[items] int32: row of key 0 of the item's request. Items of one request share it."""


@dataclass(frozen=True)
class PagedKeys:
    """Keys in the cache. For vLLM's `[blocks, kv_heads, block_size, 2 * head_size]` the cache given here is
    `kv_cache.transpose(1, 2)[..., :head_size]`: strides are free, so every physical layout is served."""

    cache: torch.Tensor
    """[blocks, block_size, kv_heads, head_dim], rotated; float, or float8 / int8 with `scale`; last axis
    contiguous."""
    block_table: torch.Tensor
    """[rows, max_blocks] int32: the blocks of each request, in order."""
    table_row: torch.Tensor
    """[items] int32: row of `block_table` of the item's request."""
    scale: torch.Tensor | None = None
    """float32, key = stored value * scale: one number for the tensor ([] or [1]), or one a cached vector
    ([blocks, block_size, kv_heads], any strides) for the per-token-head formats."""

    def scales(self) -> torch.Tensor | None:
        """`scale` expanded to [blocks, block_size, kv_heads] without a copy, or None."""
        return None if self.scale is None else self.scale.expand(self.cache.shape[:3])


Keys = PackedKeys | PagedKeys


def check_keys(keys: Keys, items: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Check shapes, dtypes and devices; returns kv_heads. `dtype` is that of the queries."""
    if isinstance(keys, PackedKeys):
        expect("keys.keys", keys.keys, (None, None, head_dim), (dtype,), device, layout="rows")
        expect("keys.start", keys.start, (items,), INDEX, device)
        return keys.keys.shape[1]
    cache = keys.cache
    quantised = cache.dtype in QUANTISED
    expect("keys.cache", cache, (None, None, None, head_dim), (dtype, *QUANTISED), device, layout="rows")
    expect("keys.block_table", keys.block_table, (None, None), (torch.int32,), device, layout="rows")
    expect("keys.table_row", keys.table_row, (items,), INDEX, device)
    require(quantised == (keys.scale is not None), "a float8 or int8 cache needs `scale`, any other none")
    if keys.scale is not None:
        shape = cache.shape[:3] if keys.scale.dim() == 3 else (1,) * keys.scale.dim()
        expect("keys.scale", keys.scale, shape, (torch.float32,), device, layout="any")
    require(dtype in FLOATS, f"queries are {dtype}, expected float32, float16 or bfloat16")
    return cache.shape[2]
