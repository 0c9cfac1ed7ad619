# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""Three passes: log-sum-exp of every text row by ranges of keys, their sum, column sums of the probabilities.

The M axis of a block is (text row, query head of one KV group), row major: `m = row * GROUP + group`, so that
a group of any size (7 for Qwen2) fills a block, and a key is read once for all the query heads that share it.
"""

import triton
import triton.language as tl


@triton.jit
def load_queries(
    p_q, p_row_index, row_start, o_m, m_m, kv_head, o_d, m_d, stride_q_token, stride_q_head, num_tokens,
    GROUP: tl.constexpr, HAS_ROW_INDEX: tl.constexpr,
):  # fmt: skip
    """(queries [BLOCK_M, BLOCK_D], packed row [BLOCK_M], query head [BLOCK_M])."""
    o_row = row_start + o_m // GROUP
    o_head = (kv_head * GROUP + o_m % GROUP).to(tl.int64)
    token = o_row
    if HAS_ROW_INDEX:
        token = tl.load(p_row_index + o_row, mask=m_m, other=-1).to(tl.int64)
    m_token = m_m & (token >= 0) & (token < num_tokens)
    o_q = token * stride_q_token + o_head * stride_q_head
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_token[:, None] & m_d[None, :], other=0.0)
    return b_q, o_row, o_head


@triton.jit
def load_keys(
    p_k, p_scale, p_table, o_key, m_key, where, kv_head, o_d, m_d, stride_k_outer, stride_k_inner,
    stride_k_head, stride_s_outer, stride_s_inner, stride_s_head, stride_table, table_width, num_outer,
    PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """(keys [BLOCK_N, BLOCK_D], scales [BLOCK_N], valid [BLOCK_N]) of the request's keys number `o_key`.

    `where` is the row of the block table (paged) or the first row of the request (packed). Keys outside the
    table, the cache or the tensor are not read: they come back as zeros and invalid.
    """
    if PAGED:
        page = o_key // PAGE_SIZE
        valid = m_key & (o_key >= 0) & (page < table_width)
        o_table = where * stride_table + page.to(tl.int64)
        o_outer = tl.load(p_table + o_table, mask=valid, other=-1).to(tl.int64)
        o_inner = (o_key % PAGE_SIZE).to(tl.int64)
    else:
        valid = m_key & (o_key >= 0)
        o_outer = where + o_key.to(tl.int64)
        o_inner = tl.zeros_like(o_outer)
    valid = valid & (o_outer >= 0) & (o_outer < num_outer)
    head = kv_head.to(tl.int64)
    o_k = o_outer * stride_k_outer + o_inner * stride_k_inner + head * stride_k_head
    b_k = tl.load(p_k + o_k[:, None] + o_d[None, :], mask=valid[:, None] & m_d[None, :], other=0.0)
    if HAS_SCALE:
        o_s = o_outer * stride_s_outer + o_inner * stride_s_inner + head * stride_s_head
        b_scale = tl.load(p_scale + o_s, mask=valid, other=0.0)
    else:
        b_scale = tl.full(o_key.shape, 1.0, tl.float32)
    return b_k, b_scale, valid


@triton.jit
def logits(b_q, b_k, b_key_scale, qk_scale, WIDEN: tl.constexpr):
    """Base-2 logits [BLOCK_M, BLOCK_N] in float32; float32 inputs keep their precision (three tf32 products).

    WIDEN is for Triton's interpreter alone, whose `dot` multiplies bfloat16 bit patterns as integers. The
    result is that of tensor cores: products of bfloat16 numbers are exact in float32.
    """
    if b_k.dtype != b_q.dtype:
        b_k = b_k.to(tl.float32).to(b_q.dtype)  # the formats of quantised caches
    if WIDEN:
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    return b_s * (b_key_scale * qk_scale)[None, :]


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_width", "num_outer", "keys_per_split"])
def partial_lse_kernel(
    p_q, p_row_index, p_row_keys, p_cu_rows, p_k, p_scale, p_table, p_where, p_partial,
    stride_q_token, stride_q_head, stride_k_outer, stride_k_inner, stride_k_head,
    stride_s_outer, stride_s_inner, stride_s_head, stride_table,
    num_tokens, num_rows, table_width, num_outer, keys_per_split, qk_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_INDEX: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_SCALE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """partial[split, head, row] = log2 sum of exp2(logit) over the keys of that split that the row may see.

    Grid (blocks of M, splits, items * KV_HEADS).
    """
    item = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(2) % KV_HEADS
    split = tl.program_id(1)
    row_start = tl.load(p_cu_rows + item).to(tl.int64)
    size_m = ((tl.load(p_cu_rows + (item + 1)).to(tl.int64) - row_start) * GROUP).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= size_m:
        return
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < size_m
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = o_d < HEAD_DIM
    b_q, o_row, o_head = load_queries(
        p_q, p_row_index, row_start, o_m, m_m, kv_head, o_d, m_d, stride_q_token, stride_q_head, num_tokens,
        GROUP, HAS_ROW_INDEX,
    )  # fmt: skip
    b_visible = tl.load(p_row_keys + o_row, mask=m_m, other=0)
    where = tl.load(p_where + item).to(tl.int64)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, tl.max(b_visible))
    for start in range(first, last, BLOCK_N):
        o_key = start + tl.arange(0, BLOCK_N)
        b_k, b_key_scale, valid = load_keys(
            p_k, p_scale, p_table, o_key, o_key < last, where, kv_head, o_d, m_d,
            stride_k_outer, stride_k_inner, stride_k_head, stride_s_outer, stride_s_inner, stride_s_head,
            stride_table, table_width, num_outer, PAGED, PAGE_SIZE, HAS_SCALE,
        )  # fmt: skip
        b_s = logits(b_q, b_k, b_key_scale, qk_scale, WIDEN)
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

    One split after the other: a trailing split without keys adds an exact zero, so the result of a request
    does not depend on how long the other requests of the batch are.
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


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_width", "num_outer"])
def column_sum_kernel(
    p_q, p_row_index, p_row_keys, p_cu_rows, p_visual, p_cu_visual, p_k, p_scale, p_table, p_where, p_lse,
    p_out, stride_q_token, stride_q_head, stride_k_outer, stride_k_inner, stride_k_head,
    stride_s_outer, stride_s_inner, stride_s_head, stride_table,
    num_tokens, num_rows, table_width, num_outer, qk_scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ROW_INDEX: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_SCALE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """out[n] = mean over heads and rows of exp2(logit[row, n] - lse[row]). Grid (blocks of N, items).

    A program owns its columns for all heads and rows: no atomics, so the sum has one order only.
    """
    item = tl.program_id(1).to(tl.int64)
    column_start = tl.load(p_cu_visual + item).to(tl.int64)
    size_n = (tl.load(p_cu_visual + (item + 1)).to(tl.int64) - column_start).to(tl.int32)
    if tl.program_id(0) * BLOCK_N >= size_n:
        return
    row_start = tl.load(p_cu_rows + item).to(tl.int64)
    size_m = ((tl.load(p_cu_rows + (item + 1)).to(tl.int64) - row_start) * GROUP).to(tl.int32)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < size_n
    o_column = column_start + o_n
    o_key = tl.load(p_visual + o_column, mask=m_n, other=-1)
    where = tl.load(p_where + item).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_d = o_d < HEAD_DIM
    b_out = tl.zeros([BLOCK_N], tl.float32)
    for head in range(0, KV_HEADS):
        kv_head = tl.full([], head, tl.int32)
        b_k, b_key_scale, valid = load_keys(
            p_k, p_scale, p_table, o_key, m_n, where, kv_head, o_d, m_d,
            stride_k_outer, stride_k_inner, stride_k_head, stride_s_outer, stride_s_inner, stride_s_head,
            stride_table, table_width, num_outer, PAGED, PAGE_SIZE, HAS_SCALE,
        )  # fmt: skip
        for start in range(0, size_m, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < size_m
            b_q, o_row, o_head = load_queries(
                p_q, p_row_index, row_start, o_m, m_m, kv_head, o_d, m_d, stride_q_token, stride_q_head,
                num_tokens, GROUP, HAS_ROW_INDEX,
            )  # fmt: skip
            b_visible = tl.load(p_row_keys + o_row, mask=m_m, other=0)
            b_lse = tl.load(p_lse + (o_head * num_rows + o_row), mask=m_m, other=0.0)
            b_s = logits(b_q, b_k, b_key_scale, qk_scale, WIDEN)
            seen = valid[None, :] & (o_key[None, :] < b_visible[:, None])
            b_out += tl.sum(tl.where(seen, tl.exp2(b_s - b_lse[:, None]), 0.0), axis=0)
    tl.store(p_out + o_column, b_out / tl.maximum(size_m * KV_HEADS, 1), mask=m_n)
