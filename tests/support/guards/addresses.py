"""Every address that the CPU's attention is given, checked before its kernels,
which check nothing, read or write there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def check_write(key: torch.Tensor, key_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Rows [rows, Hkv, d] to slots int64 [n] of a cache [blocks, Hkv, block size, d]:
    inside it, no two rows in one slot.
    """
    assert slot_mapping.shape[0] <= key.shape[0], f"{slot_mapping.shape[0]} slots for {key.shape[0]} rows"
    slots = slot_mapping[slot_mapping >= 0]
    assert ((slot_mapping >= -1) & (slot_mapping < key_cache.shape[0] * key_cache.shape[2])).all(), (
        "a slot outside the cache"
    )
    assert slots.unique().shape == slots.shape, "two rows in one slot"


def check_read(
    query: torch.Tensor,
    output: torch.Tensor,
    key_cache: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
) -> None:
    """Queries [rows, Hq, d] of requests that begin at `starts` int32 [n + 1], over `lengths` int32 [n] tokens
    in the blocks of `table` int32 [n, blocks].
    """
    count, (blocks, _, size, _) = starts.shape[0] - 1, key_cache.shape
    assert output.shape[0] == query.shape[0] >= int(starts[-1])
    assert min(lengths.shape[0], table.shape[0]) >= count
    lengths, table = lengths[:count], table[:count]
    assert (lengths >= starts.diff()).all(), "more queries than tokens"
    used = torch.arange(table.shape[1]) < (-(-lengths // size))[:, None]
    assert (-(-lengths // size) <= table.shape[1]).all(), "more tokens than the block table has room for"
    assert ((table >= 0) & (table < blocks))[used].all(), "a block outside the cache"


def guarded(write: Callable[..., None], attend: Callable[..., None]) -> tuple[Callable[..., None], Callable[..., None]]:
    """vLLM's two operations (`vllm/_custom_ops.py`) with the checks before them."""

    def checked_write(
        key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slot_mapping: torch.Tensor,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_write(key, key_cache, slot_mapping)
        write(key, value, key_cache, value_cache, slot_mapping, *args, **kwargs)

    def checked_attend(**kwargs: Any) -> None:
        names = ("query", "output", "key_cache", "query_start_loc", "seq_lens", "block_table")
        check_read(*(kwargs[name] for name in names))
        attend(**kwargs)

    return checked_write, checked_attend
