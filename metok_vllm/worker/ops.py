"""The token-sized operations of a pruned step: plain torch on CPU,
METok's Triton kernels on CUDA. Attention is what each layer's own backend runs.

`METOK_KERNELS` chooses by hand: `auto` (the default: by device), `torch`, or `triton`, which on CPU means
Triton's interpreter and is what the tests force to run the kernels inside the real engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from metok_vllm.compression import events, pooling, scoring
from metok_vllm.compression.pooling import PooledVideo, PoolStyle, Strides
from metok_vllm.compression.ratios import MICRO
from metok_vllm.compression.scoring import text_to_visual_scores as torch_scores
from metok_vllm.compression.stage1 import Operations
from metok_vllm.compression.stage2 import select_survivors
from metok_vllm.compression.tiers import TierQuota
from metok_vllm.worker.agreement import agreed
from metok_vllm.worker.dense_attention import DenseAttention

VARIABLE = "METOK_KERNELS"
CHOICES = ("auto", "torch", "triton")


def uses_triton(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device.

    Raises:
        ValueError: `METOK_KERNELS` names something else than one of `CHOICES`.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, not {choice!r}.")
    return choice == "triton" or (choice == "auto" and device.type == "cuda")


def scores(
    query: torch.Tensor,
    key: torch.Tensor,
    visual_index: torch.Tensor,
    row_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`a_n` of docs/method.md section 2 for one video; see `compression.scoring.text_to_visual_scores`.

    Args:
        query: [R, Hq, d], of the text rows behind the video.
        key: [n, Hkv, d], of all tokens alive.
        visual_index: int64 [V], which of the n are the video's.
        row_positions: int64 [R]; every row is itself among the n.
        key_positions: int64 [n], ascending.
        scale: factor of the logits.

    Returns:
        float32 [V].
    """
    if not uses_triton(key.device):
        return torch_scores(query, key, visual_index, row_positions, key_positions, scale)
    from metok_kernels.text_to_visual_scores import text_to_visual_scores

    seen = torch.searchsorted(key_positions, row_positions, right=True)
    return text_to_visual_scores(query, key, seen, visual_index, scale=scale)


def smooth(scores: torch.Tensor, frame: torch.Tensor, frames: int, weight_micro: int) -> torch.Tensor:
    """One video's scores mixed with their frames' means; see `compression.scoring.smooth_by_frame`.

    Args:
        scores: float32 [n], frame after frame.
        frame: int64 [n], of each, below `frames` and never decreasing.
        frames: of the video.
        weight_micro: the mean's share in millionths.

    Returns:
        float32 [n].
    """
    if not uses_triton(scores.device):
        return scoring.smooth_by_frame(scores, frame, frames, weight_micro)
    from metok_kernels.smooth_by_frame import smooth_by_frame as kernel

    return kernel(scores, frame, frames, weight_micro / MICRO)


def select(scores: torch.Tensor, lengths: torch.Tensor, keep: torch.Tensor, total: int) -> torch.Tensor:
    """The `keep[e]` best of every event; see `compression.stage2.select_survivors`.

    Args:
        scores: float32 [n], event after event.
        lengths: int64 [events], of each event; they sum up to n.
        keep: int64 [events], at most `lengths`.
        total: sum of `keep`.

    Returns:
        int64 [total], ascending indices into `scores`.
    """
    if not uses_triton(scores.device):
        return select_survivors(scores, lengths, keep, total)
    from metok_kernels.select_per_event import select_per_event as kernel

    return kernel(scores, lengths, keep, total)


def event_similarity(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame vectors float32 [T, D] and adjacent similarities float32 [T - 1] of one video,
    `features` [T, N, D].
    """
    if not uses_triton(features.device):
        return events.similarity(features)
    from metok_kernels.event_similarity import event_similarity as kernel

    return kernel(features)


def pool_video(
    features: torch.Tensor,
    tiers: torch.Tensor,
    strides: Strides,
    quota: TierQuota,
    style: PoolStyle,
    separator: torch.Tensor | None,
    event_ids: torch.Tensor,
) -> PooledVideo:
    """Stage 1's tokens of one video; arguments and result as in `compression.pooling.pool_video`."""
    if not uses_triton(features.device):
        return pooling.pool_video(features, tiers, strides, quota, style, separator, event_ids)
    from metok_kernels.tiered_pool import tiered_pool

    pooling.check_video(features.shape[0], tiers, quota, style, separator, event_ids)
    grids = [pooling.pooled_grid(features.shape[1], features.shape[2], stride) for stride in strides]
    layout = pooling.lay_out(tiers, grids, quota, style.separators, event_ids)
    stride = pooling.by_tier(tiers, strides)
    tokens = tiered_pool(
        features,
        stride,
        layout.starts,
        mode=style.mode,
        total=layout.total,
        min_stride=min(strides),
        row_gap=style.separators == "row",
        separator=None if separator is None else separator.detach().to(features.dtype),
        separator_offset=None if separator is None else layout.separators,
    )
    return PooledVideo(tokens, event_ids[layout.token_frame], layout.token_frame)


STAGE_1 = Operations(event_similarity, pool_video, agreed)
"""The operations of `compression.stage1.compress_video`, by device, with one choice for all ranks."""


def gather(
    index: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `index` (int64 [n]) of hidden state [m, D], residual [m, D] and rotary positions int64 [m] or
    [axes, m], in one launch.
    """
    if not uses_triton(hidden.device):
        return hidden[index], residual[index], positions[..., index]
    from metok_kernels.gather_rows import gather_rows

    return gather_rows(index, hidden, residual, positions)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    starts: torch.Tensor,
    longest: int,
    scale: float,
    out: torch.Tensor,
    dense: DenseAttention,
) -> None:
    """Dense causal attention inside each of several packed sequences, into `out`.

    Args:
        query: [sum of lengths, Hq, d].
        key: [sum of lengths, Hkv, d], `Hq` a multiple of `Hkv`.
        value: like `key`.
        lengths: tokens of each of the n sequences.
        starts: int32 [n + 1], on the device of `query`: where each sequence starts, and the sum at the end.
        longest: the largest of `lengths`.
        scale: factor of the logits.
        out: like `query`.
        dense: which of vLLM's kernels, by the layer.
    """
    if dense.flash_version is not None:
        _flash_attention(query, key, value, starts, longest, scale, out, dense.flash_version)
    elif dense.backend == "TRITON_ATTN":
        _triton_attention(query, key, value, starts, longest, scale, out)
    else:
        _torch_attention(query, key, value, lengths, scale, out)


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    out: torch.Tensor,
    version: int,
) -> None:
    """vLLM's varlen flash attention, in the version that the layer's own backend runs."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func  # type: ignore[attr-defined]

    flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        fa_version=version,
    )


def _triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """vLLM's Triton kernel for prompts without a cache."""
    from vllm.v1.attention.ops.triton_prefill_attention import context_attention_fwd

    context_attention_fwd(
        query,
        key,
        value,
        out,
        b_start_loc=starts[:-1],
        b_seq_len=starts[1:] - starts[:-1],
        max_input_len=longest,
        is_causal=True,
        softmax_scale=scale,
    )


def _torch_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float, out: torch.Tensor
) -> None:
    start = 0
    for length in lengths:
        q, k, v = (t[start : start + length].transpose(0, 1)[None] for t in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out[start : start + length] = attended[0].transpose(0, 1)
        start += length
