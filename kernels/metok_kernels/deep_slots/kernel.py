# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""One program a (group, batch row); one more a group for the padding that CUDA graphs replay over."""

import triton
import triton.language as tl


@triton.jit
def slot_index_of(
    o_position, p_start, p_length, p_retained, span_begin, span_end, retains,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(slots owned before it [BLOCK_T], spans around it [BLOCK_T], 0 for text) of each prompt position."""
    b_index = o_position
    b_inside = tl.zeros([BLOCK_T], tl.int32)
    for first in range(span_begin, span_end, BLOCK_S):
        o_span = first + tl.arange(0, BLOCK_S)
        m_span = o_span < span_end
        b_start = tl.load(p_start + o_span.to(tl.int64), mask=m_span, other=0)
        b_length = tl.load(p_length + o_span.to(tl.int64), mask=m_span, other=0)
        b_retained = tl.load(p_retained + o_span.to(tl.int64), mask=m_span, other=0) * retains
        b_retained = tl.minimum(tl.maximum(b_retained, 0), b_length)
        b_before = tl.maximum(o_position[:, None] - b_start[None, :], 0)
        b_visual = tl.minimum(b_before, b_length[None, :])
        b_owned = tl.minimum(b_before, b_retained[None, :])
        b_index -= tl.sum(b_visual - b_owned, axis=1)
        m_inside = (o_position[:, None] >= b_start[None, :]) & (b_before < b_length[None, :])
        b_inside += tl.sum(m_inside.to(tl.int32), axis=1)
    return b_index, b_inside


@triton.jit(do_not_specialize=["batch", "table_rows", "num_requests", "max_requests", "max_tokens"])
def deep_slots_kernel(
    p_addresses, p_widths, p_block_sizes, p_retains, p_start, p_length, p_retained, p_begin, p_end,
    p_span_row, p_table_row, p_num_computed, p_query_start, p_seq_lens, p_slots,
    stride_seq_lens, stride_slots, batch, table_rows, num_requests, max_requests, max_tokens,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_SPAN_ROW: tl.constexpr, HAS_TABLE_ROW: tl.constexpr,
):  # fmt: skip
    """Grid (groups, batch + 1). The last program of a group pads `seq_lens` with 0 and `slots` with -1."""
    group = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    p_slots += group * stride_slots
    p_seq_lens += group * stride_seq_lens
    if row == batch:
        for first in range(tl.load(p_query_start + row), max_tokens, BLOCK_T):
            o = first + tl.arange(0, BLOCK_T)
            tl.store(p_slots + o.to(tl.int64), tl.full([BLOCK_T], -1, tl.int64), mask=o < max_tokens)
        for first in range(batch, max_requests, BLOCK_T):
            o = first + tl.arange(0, BLOCK_T)
            tl.store(p_seq_lens + o.to(tl.int64), tl.zeros([BLOCK_T], tl.int32), mask=o < max_requests)
        return

    span_row = row
    if HAS_SPAN_ROW:
        span_row = tl.load(p_span_row + row).to(tl.int64)
    table_row = row
    if HAS_TABLE_ROW:
        table_row = tl.load(p_table_row + row).to(tl.int64)
    real = (span_row >= 0) & (span_row < num_requests) & (table_row >= 0) & (table_row < table_rows)
    span_begin = tl.load(p_begin + span_row, mask=real, other=0)
    span_end = tl.load(p_end + span_row, mask=real, other=0)
    retains = tl.load(p_retains + group)
    width = tl.load(p_widths + group)
    pages = tl.where(real, width, 0)
    block_size = tl.load(p_block_sizes + group)
    p_table = tl.load(p_addresses + group).to(tl.pointer_type(tl.int32)) + table_row * width

    token = tl.load(p_query_start + row)
    token_end = tl.load(p_query_start + (row + 1))
    computed = tl.load(p_num_computed + row).to(tl.int32)
    o_end = tl.full([1], 0, tl.int32) + computed + token_end - token
    b_total, _ = slot_index_of(o_end, p_start, p_length, p_retained, span_begin, span_end, retains, 1, BLOCK_S)
    tl.store(p_seq_lens + row + tl.arange(0, 1).to(tl.int64), tl.where(real, b_total, 0))

    for first in range(token, token_end, BLOCK_T):
        o_token = first + tl.arange(0, BLOCK_T)
        m_token = o_token < token_end
        o_position = computed + o_token - token
        b_index, b_inside = slot_index_of(
            o_position, p_start, p_length, p_retained, span_begin, span_end, retains, BLOCK_T, BLOCK_S
        )
        o_page = b_index // block_size
        m_owner = m_token & (b_inside == 0) & (o_page < pages)
        b_block = tl.load(p_table + o_page.to(tl.int64), mask=m_owner, other=0).to(tl.int64)
        b_slot = tl.where(m_owner, b_block * block_size + b_index % block_size, -1)
        tl.store(p_slots + o_token.to(tl.int64), b_slot, mask=m_token & (o_token < max_tokens))
