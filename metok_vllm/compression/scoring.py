"""How much the question looks at each visual token:
the reference of the kernel (docs/method.md section 2).
"""

import torch
from torch import Tensor

from .ratios import MICRO

ROWS_PER_BLOCK = 16
"""Rows whose attention exists at once; memory is `rows * heads * keys` floats."""


def text_to_visual_scores(
    q: Tensor,
    k: Tensor,
    visual_index: Tensor,
    row_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    rows_per_block: int = ROWS_PER_BLOCK,
) -> Tensor:
    """Mean attention that the text rows after a video pay to each of its tokens, over rows and heads.

    The softmax of a row runs over every key alive in the layer that is not after the row: text, images, other
    videos. Only the probabilities on `visual_index` are kept.

    Args:
        q: [R, Hq, d], rotated queries of the text rows after the video. R = 0 gives scores of 0.
        k: [n, Hkv, d], rotated keys of all tokens alive, `Hq` a multiple of `Hkv` (grouped queries).
        visual_index: int64 [V], which of the n keys are the video's tokens.
        row_positions: int64 [R], position of each row in the prompt.
        key_positions: int64 [n], position of each key; each row sees at least one key (its own).
        scale: factor of the logits, `1 / sqrt(d)` for the usual models.
        rows_per_block: rows handled at once; changes memory, not the result.

    Returns:
        float32 [V], each in [0, 1].

    Raises:
        ValueError: `Hq` is not a multiple of `Hkv`, or the shapes do not fit one another.
    """
    rows, q_heads, dim = q.shape
    keys, kv_heads, k_dim = k.shape
    if q_heads % kv_heads or dim != k_dim:
        raise ValueError(f"queries {tuple(q.shape)} and keys {tuple(k.shape)} do not fit one another")
    if row_positions.shape != (rows,) or key_positions.shape != (keys,):
        raise ValueError("every row and every key needs exactly one position")

    grouped_q = q.to(torch.float32).reshape(rows, kv_heads, q_heads // kv_heads, dim)
    k = k.to(torch.float32)
    attended = torch.zeros(visual_index.shape[0], dtype=torch.float32, device=q.device)
    for start in range(0, rows, rows_per_block):
        block = slice(start, start + rows_per_block)
        logits = torch.einsum("rhgd,nhd->rhgn", grouped_q[block], k) * scale
        future = key_positions > row_positions[block, None]
        logits.masked_fill_(future[:, None, None, :], float("-inf"))
        probabilities = logits.softmax(dim=-1)
        # Sum rows and heads first: the result of the reduction is [n], and one gather picks the video.
        attended += probabilities.sum(dim=(0, 1, 2)).index_select(0, visual_index)
    return attended / max(rows * q_heads, 1)


def smooth_by_frame(scores: Tensor, frame: Tensor, frames: int, weight_micro: int) -> Tensor:
    """`frame_smoothing`: each score mixed with the mean over its frame's tokens (docs/method.md section 4.6).

    The rule of the kernel `smooth_by_frame`.

    Args:
        scores: float32 [n], of one video's tokens alive.
        frame: int64 [n], of each token, below `frames`.
        frames: of the video; some may have no token left.
        weight_micro: the mean's share in millionths (`ratios.to_micro`); 0 gives the scores themselves.

    Returns:
        float32 [n]. A score that is not a number makes those of its frame so.
    """
    if not weight_micro:
        return scores
    weight = weight_micro / MICRO
    sums = torch.zeros(frames, dtype=scores.dtype, device=scores.device).index_add_(0, frame, scores)
    counts = torch.zeros_like(sums).index_add_(0, frame, torch.ones_like(scores))
    return (1 - weight) * scores + weight * (sums / counts.clamp(min=1))[frame]
