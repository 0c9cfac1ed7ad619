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

KEYS_PER_SPLIT = 1024
"""Keys of one partial log-sum-exp."""


def prepare(
    q: torch.Tensor, keys: torch.Tensor, row_keys: torch.Tensor, visual: torch.Tensor, *, scale: float
) -> tuple[tuple[Launch, Launch, Launch], torch.Tensor]:
    """Check the arguments of `text_to_visual_scores`; returns its launches in order and what they fill."""
    device = q.device
    expect("q", q, (None, None, None), FLOATS, device, layout="rows")
    rows, heads, head_dim = q.shape
    expect("keys", keys, (None, None, head_dim), (q.dtype,), device, layout="rows")
    expect("row_keys", row_keys, (rows,), INDEX, device)
    expect("visual", visual, (None,), INDEX, device)
    count, kv_heads = keys.shape[:2]
    require(kv_heads > 0 and heads % kv_heads == 0, f"{heads} heads do not divide over {kv_heads} KV heads")

    group, size = heads // kv_heads, visual.shape[0]
    splits = max(ceil_div(count, KEYS_PER_SPLIT), 1)
    partial = torch.empty(splits, heads, rows, dtype=torch.float32, device=device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=device)
    out = torch.empty(size, dtype=torch.float32, device=device)
    common: dict[str, Argument] = {
        "p_q": q, "p_row_keys": row_keys, "p_k": keys, "stride_q_row": q.stride(0), "stride_q_head": q.stride(1),
        "stride_k_row": keys.stride(0), "stride_k_head": keys.stride(1),
        "num_rows": rows, "num_keys": count, "qk_scale": scale * math.log2(math.e),
    }  # fmt: skip
    constants: dict[str, Constant] = {
        "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": max(power_of_two(head_dim), 16),
        "WIDEN": interpreted(partial_lse_kernel) and q.dtype == torch.bfloat16,
    }  # fmt: skip
    # float32 blocks take twice the registers and shared memory.
    block_m, block_n, block_column = (64, 64, 32) if q.element_size() == 2 else (32, 16, 16)
    num_stages = 3 if q.element_size() == 2 else 2
    first = Launch(
        partial_lse_kernel,
        (ceil_div(rows * group, block_m), splits, kv_heads),
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
        (ceil_div(size, block_column), 1, 1),
        {**common, "p_visual": visual, "p_lse": lse, "p_out": out, "num_visual": size},
        {**constants, "BLOCK_M": block_m, "BLOCK_N": block_column},
        num_stages=num_stages,
    )
    return (first, second, third), out


def text_to_visual_scores(
    q: torch.Tensor, keys: torch.Tensor, row_keys: torch.Tensor, visual: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """`a_n = mean over heads, mean over text rows, of softmax(Q K^T * scale)[row, n]`
    (docs/method.md section 2), of one video.

    Each text row attends, causally, to every key alive in its request (text, other videos, images); the
    probabilities of the video's tokens are summed, in float32 throughout.

    Args:
        q: [rows, heads, head_dim] float, rotated; row and head strides are free.
        keys: [keys, kv_heads, head_dim] of the same dtype, rotated, all that are alive in the request; row
            and head strides are free. Query heads `g*group .. (g+1)*group - 1` share KV head `g`.
        row_keys: [rows] int: keys that a text row sees, its own included: its index among the keys plus one.
        visual: [visual] int: index among the keys of each of the video's tokens.
        scale: softmax scale, `head_dim ** -0.5`.

    Returns:
        [visual] float32. Higher = kept. 0 where there is no text row, and for an index that is not a key's:
        nothing is read out of range.

    Raises TypeError or ValueError for wrong dtypes, shapes or devices. Nothing is read from the device.
    Cost, for M = rows * heads: 2 * M * head_dim * (keys + visual) FLOPs. Must read the keys once
    (`keys * kv_heads * head_dim` elements) and the visual ones twice; writes 4 bytes a visual token. Scratch
    is `4 * M * (1 + ceil(keys / 1024))` bytes: no rows x keys tensor exists.
    """
    launches, out = prepare(q, keys, row_keys, visual, scale=scale)
    for launch in launches:
        launch.run()
    return out
