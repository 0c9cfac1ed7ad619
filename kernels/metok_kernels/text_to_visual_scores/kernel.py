# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""Three passes: log-sum-exp of every text row by ranges of keys, their sum, column sums of the probabilities.

The M axis of a block is (text row, query head of one KV group), row major: `m = row * GROUP + group`, so that
a group of any size (7 for Qwen2) fills a block, and a key is read once for all the query heads that share it.
"""

import triton
import triton.language as tl


@triton.jit
def load_queries(p_q, o_m, m_m, kv_head, o_d, m_d, stride_q_row, stride_q_head, GROUP: tl.constexpr):
    """(queries [BLOCK_M, BLOCK_D], row [BLOCK_M], query head [BLOCK_M]); rows and heads are int64."""
    o_row = (o_m // GROUP).to(tl.int64)
    o_head = (kv_head * GROUP + o_m % GROUP).to(tl.int64)
    o_q = o_row * stride_q_row + o_head * stride_q_head
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    return b_q, o_row, o_head


@triton.jit
def load_keys(p_k, o_key, m_key, kv_head, o_d, m_d, stride_k_row, stride_k_head, num_keys):
    """(keys [BLOCK_N, BLOCK_D], valid [BLOCK_N]); keys that do not exist come back as zeros and invalid."""
    valid = m_key & (o_key >= 0) & (o_key < num_keys)
    o_k = o_key.to(tl.int64) * stride_k_row + kv_head.to(tl.int64) * stride_k_head
    return tl.load(p_k + o_k[:, None] + o_d[None, :], mask=valid[:, None] & m_d[None, :], other=0.0), valid


@triton.jit
def logits(b_q, b_k, qk_scale, WIDEN: tl.constexpr):
    """Base-2 logits [BLOCK_M, BLOCK_N] in float32; float32 inputs keep their precision (three tf32 products).

    WIDEN is for Triton's interpreter alone, whose `dot` multiplies bfloat16 bit patterns as integers. The
    result is that of tensor cores: products of bfloat16 numbers are exact in float32.
    """
    if WIDEN:
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    return tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * qk_scale


@triton.jit(
    do_not_specialize=["num_rows", "num_keys"],
    do_not_specialize_on_alignment=["p_row_keys"],
)
def partial_lse_kernel(
    p_q, p_row_keys, p_k, p_partial, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    num_rows, num_keys, keys_per_split, qk_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """partial[split, head, row] = log2 sum of exp2(logit) over the keys of that split that the row may see.

    Grid (blocks of M, splits, KV_HEADS).
    """
    kv_head = tl.program_id(2)
    split = tl.program_id(1)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_rows * GROUP
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = o_d < HEAD_DIM
    b_q, o_row, o_head = load_queries(p_q, o_m, m_m, kv_head, o_d, m_d, stride_q_row, stride_q_head, GROUP)
    b_visible = tl.load(p_row_keys + o_row, mask=m_m, other=0).to(tl.int32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, tl.max(b_visible))
    for start in range(first, last, BLOCK_N):
        o_key = start + tl.arange(0, BLOCK_N)
        b_k, valid = load_keys(p_k, o_key, o_key < last, kv_head, o_d, m_d, stride_k_row, stride_k_head, num_keys)
        b_s = logits(b_q, b_k, qk_scale, WIDEN)
        b_s = tl.where(valid[None, :] & (o_key[None, :] < b_visible[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row that has seen no key yet
        b_sum = b_sum * tl.exp2(b_max - b_base) + tl.sum(tl.exp2(b_s - b_base[:, None]), axis=1)
        b_max = b_new
    b_partial = tl.where(b_max == float("-inf"), float("-inf"), b_max + tl.log2(tl.maximum(b_sum, 1e-37)))
    o_partial = (split.to(tl.int64) * KV_HEADS * GROUP + o_head) * num_rows + o_row
    tl.store(p_partial + o_partial, b_partial, mask=m_m)


@triton.jit(do_not_specialize=["size", "splits"])
def combine_lse_kernel(p_partial, p_lse, size, splits, BLOCK: tl.constexpr):
    """lse[i] = log2 sum over splits of exp2(partial[split, i]); grid (blocks of `size` = heads * rows,).

    One split after the other: the order of the sum is that of the keys, whatever the grid.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    o_split = o
    for _ in range(0, splits):
        b_max = tl.maximum(b_max, tl.load(p_partial + o_split, mask=m, other=float("-inf")))
        o_split += size
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([BLOCK], tl.float32)
    o_split = o
    for _ in range(0, splits):
        b_sum += tl.exp2(tl.load(p_partial + o_split, mask=m, other=float("-inf")) - b_base)
        o_split += size
    b_lse = tl.where(b_max == float("-inf"), float("-inf"), b_max + tl.log2(tl.maximum(b_sum, 1e-37)))
    tl.store(p_lse + o, b_lse, mask=m)


@triton.jit(
    do_not_specialize=["num_rows", "num_keys", "num_visual"],
    do_not_specialize_on_alignment=["p_row_keys", "p_visual"],
)
def column_sum_kernel(
    p_q, p_row_keys, p_visual, p_k, p_lse, p_out, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    num_rows, num_keys, num_visual, qk_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[n] = mean over heads and rows of exp2(logit[row, n] - lse[row]). Grid (blocks of N,).

    A program owns its columns for all heads and rows: no atomics, so the sum has one order only.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_visual
    o_key = tl.load(p_visual + o_n.to(tl.int64), mask=m_n, other=-1)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = o_d < HEAD_DIM
    size_m = num_rows * GROUP
    b_out = tl.zeros([BLOCK_N], tl.float32)
    for head in range(0, KV_HEADS):
        kv_head = tl.full([], head, tl.int32)
        b_k, valid = load_keys(p_k, o_key, m_n, kv_head, o_d, m_d, stride_k_row, stride_k_head, num_keys)
        for start in range(0, size_m, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < size_m
            b_q, o_row, o_head = load_queries(p_q, o_m, m_m, kv_head, o_d, m_d, stride_q_row, stride_q_head, GROUP)
            b_visible = tl.load(p_row_keys + o_row, mask=m_m, other=0)
            b_lse = tl.load(p_lse + (o_head * num_rows + o_row), mask=m_m, other=0.0)
            b_s = logits(b_q, b_k, qk_scale, WIDEN)
            seen = valid[None, :] & (o_key[None, :] < b_visible[:, None])
            b_out += tl.sum(tl.where(seen, tl.exp2(b_s - b_lse[:, None]), 0.0), axis=0)
    tl.store(p_out + o_n.to(tl.int64), b_out / tl.maximum(size_m * KV_HEADS, 1), mask=m_n)
