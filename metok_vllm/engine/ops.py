"""The token-sized operations of a pruned step, by device: plain torch on CPU, Triton and flash attention on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from metok_vllm.compression.scoring import text_to_visual_scores


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    visual_index: torch.Tensor,
    row_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`a_n` of method.md section 2 for one video; see `compression.scoring.text_to_visual_scores`."""
    return text_to_visual_scores(query, key, visual_index, row_positions, key_positions, scale)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float, out: torch.Tensor
) -> None:
    """Dense causal attention inside each of several packed sequences, into `out`.

    Args:
        query: [sum of lengths, Hq, d].
        key: [sum of lengths, Hkv, d], `Hq` a multiple of `Hkv`.
        value: like `key`.
        lengths: tokens of each sequence.
        scale: factor of the logits.
        out: like `query`.
    """
    start = 0
    for length in lengths:
        q, k, v = (t[start : start + length].transpose(0, 1)[None] for t in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out[start : start + length] = attended[0].transpose(0, 1)
        start += length
