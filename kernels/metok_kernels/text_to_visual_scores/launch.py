"""Checks and launches of the scoring kernels."""

from __future__ import annotations

import math

import torch

from metok_kernels.checks import FLOATS, INDEX, expect, require
from metok_kernels.launch import Argument, Constant, Launch, ceil_div, interpreted, power_of_two
from metok_kernels.text_to_visual_scores.kernel import (
    column_sum_kernel,
    combine_lse_kernel,
    partial_lse_kernel,
)
from metok_kernels.text_to_visual_scores.keys import Keys, PackedKeys, check_keys

KEYS_PER_SPLIT = 1024
"""Keys of one partial log-sum-exp. Fixed: a request's scores must not depend on its neighbours' lengths."""


def prepare(
    q: torch.Tensor,
    keys: Keys,
    row_keys: torch.Tensor,
    cu_rows: torch.Tensor,
    visual: torch.Tensor,
    cu_visual: torch.Tensor,
    *,
    scale: float,
    max_rows: int,
    max_visual: int,
    max_keys: int,
    row_index: torch.Tensor | None = None,
) -> tuple[tuple[Launch, Launch, Launch], torch.Tensor]:
    """Check the arguments of `text_to_visual_scores`; returns its launches in order and what they fill."""
    device, heads = q.device, q.shape[1]
    expect("q", q, (None, None, None), FLOATS, device, layout="rows")
    expect("cu_rows", cu_rows, (None,), INDEX, device)
    items, rows = cu_rows.shape[0] - 1, row_keys.shape[0]
    expect("row_keys", row_keys, (None,), INDEX, device)
    expect("visual", visual, (None,), INDEX, device)
    expect("cu_visual", cu_visual, (items + 1,), INDEX, device)
    if row_index is not None:
        expect("row_index", row_index, (rows,), INDEX, device)
    require(row_index is not None or rows <= q.shape[0], f"{rows} text rows, but q has {q.shape[0]} tokens")
    kv_heads = check_keys(keys, items, q.shape[2], q.dtype, device)
    require(kv_heads > 0 and heads % kv_heads == 0, f"{heads} heads do not divide over {kv_heads} KV heads")
    require(min(max_rows, max_visual, max_keys) >= 0, "max_rows, max_visual, max_keys: not negative")

    group, head_dim = heads // kv_heads, q.shape[2]
    splits = max(ceil_div(max_keys, KEYS_PER_SPLIT), 1)
    partial = torch.empty(splits, heads, rows, dtype=torch.float32, device=device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=device)
    out = torch.empty(visual.shape[0], dtype=torch.float32, device=device)
    common: dict[str, Argument] = {
        "p_q": q, "p_row_index": row_index, "p_row_keys": row_keys, "p_cu_rows": cu_rows,
        "stride_q_token": q.stride(0), "stride_q_head": q.stride(1),
        "num_tokens": q.shape[0], "num_rows": rows, "qk_scale": scale * math.log2(math.e),
        **_key_arguments(keys),
    }  # fmt: skip
    constants: dict[str, Constant] = {
        "KV_HEADS": kv_heads, "GROUP": group,
        "HEAD_DIM": head_dim, "BLOCK_D": max(power_of_two(head_dim), 16),
        "HAS_ROW_INDEX": row_index is not None, "PAGED": not isinstance(keys, PackedKeys),
        "PAGE_SIZE": 1 if isinstance(keys, PackedKeys) else keys.cache.shape[1],
        "HAS_SCALE": not isinstance(keys, PackedKeys) and keys.scale is not None,
        "WIDEN": interpreted(partial_lse_kernel) and q.dtype == torch.bfloat16,
    }  # fmt: skip
    # float32 blocks take twice the registers and shared memory.
    block_m, block_n, block_column = (64, 64, 32) if q.element_size() == 2 else (32, 16, 16)
    num_stages = 3 if q.element_size() == 2 else 2
    first = Launch(
        partial_lse_kernel,
        (ceil_div(max_rows * group, block_m), splits, items * kv_heads),
        {**common, "p_partial": partial, "keys_per_split": KEYS_PER_SPLIT},
        {**constants, "BLOCK_M": block_m, "BLOCK_N": block_n},
        num_stages=num_stages,
    )
    block = 256
    second = Launch(
        combine_lse_kernel,
        (ceil_div(heads * rows, block), 1, 1),
        {"p_partial": partial, "p_lse": lse, "size": heads * rows, "splits": splits},
        {"BLOCK": block},
    )
    third = Launch(
        column_sum_kernel,
        (ceil_div(max_visual, block_column), items, 1),
        {**common, "p_visual": visual, "p_cu_visual": cu_visual, "p_lse": lse, "p_out": out},
        {**constants, "BLOCK_M": block_m, "BLOCK_N": block_column},
        num_stages=num_stages,
    )
    return (first, second, third), out


def _key_arguments(keys: Keys) -> dict[str, Argument]:
    """Pointers, strides and bounds of the keys, by the kernels' names. A packed row is a page of one key."""
    if isinstance(keys, PackedKeys):
        outer, head = keys.keys.stride()[:2]
        return {
            "p_k": keys.keys, "p_scale": None, "p_table": None, "p_where": keys.start,
            "stride_k_outer": outer, "stride_k_inner": 0, "stride_k_head": head,
            "stride_s_outer": 0, "stride_s_inner": 0, "stride_s_head": 0,
            "stride_table": 0, "table_width": 0, "num_outer": keys.keys.shape[0],
        }  # fmt: skip
    outer, inner, head = keys.cache.stride()[:3]
    scales = keys.scales()
    s_outer, s_inner, s_head = (0, 0, 0) if scales is None else scales.stride()
    return {
        "p_k": keys.cache, "p_scale": scales, "p_table": keys.block_table, "p_where": keys.table_row,
        "stride_k_outer": outer, "stride_k_inner": inner, "stride_k_head": head,
        "stride_s_outer": s_outer, "stride_s_inner": s_inner, "stride_s_head": s_head,
        "stride_table": keys.block_table.stride(0), "table_width": keys.block_table.shape[1],
        "num_outer": keys.cache.shape[0],
    }  # fmt: skip


def text_to_visual_scores(
    q: torch.Tensor,
    keys: Keys,
    row_keys: torch.Tensor,
    cu_rows: torch.Tensor,
    visual: torch.Tensor,
    cu_visual: torch.Tensor,
    *,
    scale: float,
    max_rows: int,
    max_visual: int,
    max_keys: int,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """`a_n = mean over heads, mean over text rows, of softmax(Q K^T * scale)[row, n]`
    (docs/method.md section 2).

    An item is one video of one request. Each text row attends, causally, to every key alive in its request
    (text, other videos, images); the probabilities of the item's visual tokens are summed, in float32
    throughout.

    Args:
        q: [tokens, heads, head_dim] float, rotated; token and head strides are free.
        keys: `PackedKeys` or `PagedKeys`; query heads `g*group .. (g+1)*group - 1` share KV head `g`.
        row_keys: [rows] int: keys that a text row sees, its own included. In the paged cache of a shallow
            layer that is its position in the prompt plus one; among packed survivors, its index among them
            plus one.
        cu_rows: [items + 1] int, cumulative text rows.
        visual: [visual] int: key number, within its request, of each visual token of each item.
        cu_visual: [items + 1] int, cumulative visual tokens.
        scale: softmax scale, `head_dim ** -0.5`.
        max_rows, max_visual, max_keys: host bounds on rows and visual tokens of one item and on `row_keys`;
            they size the grid and may be generous. Keys past `max_keys` would not be seen.
        row_index: [rows] int: token of `q` of each text row; without it row i is token i.

    Returns:
        [visual] float32. Higher = kept. 0 for an item without text rows. Entries past `cu_visual[-1]`
        are not written.

    Cost, for M = rows * heads: 2 * M * head_dim * (keys + visual) FLOPs. Must read the keys once
    (`keys * kv_heads * head_dim` elements) and the visual ones twice; writes 4 bytes a visual token. Scratch
    is `4 * M * (1 + ceil(max_keys / 1024))` bytes: no rows x keys tensor exists.

    A visual index without a key of its own (outside the table, the cache or the tensor) is not read and
    scores 0.
    """
    launches, out = prepare(
        q, keys, row_keys, cu_rows, visual, cu_visual, scale=scale, max_rows=max_rows, max_visual=max_visual,
        max_keys=max_keys, row_index=row_index,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return out
