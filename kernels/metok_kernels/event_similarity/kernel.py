# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""The input is read once, by the means; the cosines read only the means, `tokens` times smaller."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def frame_mean_kernel(
    p_x, p_mean, stride_frame, stride_token, tokens, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """mean[frame, d] over the frame's tokens. Grid (frames, blocks of D)."""
    frame = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        o_x = frame * stride_frame + o_n.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_sum += tl.load(p_x + o_x, mask=(o_n < tokens)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    tl.store(p_mean + frame * width + o_d, tl.div_rn(tl.sum(b_sum, axis=0), tokens.to(tl.float32)), mask=m_d)


@triton.jit
def adjacent_cosine_kernel(p_mean, p_similarity, width, BLOCK_D: tl.constexpr):
    """similarity[i] = cos(mean[i], mean[i + 1]). Grid (frames - 1,)."""
    frame = tl.program_id(0).to(tl.int64)
    b_dot = tl.zeros([BLOCK_D], tl.float32)
    b_here = tl.zeros([BLOCK_D], tl.float32)
    b_next = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        o = frame * width + o_d
        b_a = tl.load(p_mean + o, mask=o_d < width, other=0.0)
        b_b = tl.load(p_mean + (o + width), mask=o_d < width, other=0.0)
        b_dot += b_a * b_b
        b_here += b_a * b_a
        b_next += b_b * b_b
    norm = tl.maximum(tl.sqrt_rn(tl.sum(b_here)), 1e-12) * tl.maximum(tl.sqrt_rn(tl.sum(b_next)), 1e-12)
    tl.store(p_similarity + frame, tl.div_rn(tl.sum(b_dot), norm))
