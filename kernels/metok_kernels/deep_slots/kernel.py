# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""One program a (group, batch row), one more a group for the padding that CUDA graphs replay over; and slots
of tokens in any order, one program a (block of tokens, group)."""

import triton
import triton.language as tl

FIELDS = tl.constexpr(6)  # of `groups.FIELDS`, whose docstring names the columns


@triton.jit
def load_group(p_groups, group):
    """(block table, its width, block size, kind, row of seq_lens or -1, row of slot_mapping) of one group."""
    first = group * FIELDS  # int64, as every offset that is added to a pointer
    p_table = tl.load(p_groups + first).to(tl.pointer_type(tl.int32))
    width = tl.load(p_groups + (first + 1))
    block_size = tl.load(p_groups + (first + 2))
    kind = tl.load(p_groups + (first + 3))
    return p_table, width, block_size, kind, tl.load(p_groups + (first + 4)), tl.load(p_groups + (first + 5))


@triton.jit
def load_slots(p_table, width, block_size, o_row, b_index, m):
    """Slot of each slot index (int64) in its row of the block table; -1 outside `m` and past the table."""
    o_page = b_index // block_size
    m = m & (b_index >= 0) & (o_page < width)
    b_block = tl.load(p_table + o_row * width + o_page, mask=m, other=0).to(tl.int64)
    return tl.where(m, b_block * block_size + b_index % block_size, -1)


@triton.jit(
    do_not_specialize=[
        "stride_shift", "stride_seq_lens", "stride_slots", "batch", "table_rows", "num_requests",
        "max_requests", "max_tokens",
    ],
    do_not_specialize_on_alignment=[
        "p_shift", "p_state_row", "p_total", "p_query_start", "p_seq_lens", "p_slots",
    ],
)  # fmt: skip
def deep_slots_kernel(
    p_groups, p_shift, p_state_row, p_total, p_query_start, p_seq_lens, p_slots,
    stride_shift, stride_seq_lens, stride_slots, batch, table_rows, num_requests, max_requests, max_tokens,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (groups, batch + 1). The last program of a group pads `seq_lens` with 0 and `slots` with -1."""
    row = tl.program_id(1).to(tl.int64)
    p_table, width, block_size, kind, seq_row, slot_row = load_group(p_groups, tl.program_id(0).to(tl.int64))
    p_slots += slot_row * stride_slots
    p_seq_lens += seq_row * stride_seq_lens
    if row == batch:
        for first in range(tl.load(p_query_start + row), max_tokens, BLOCK_T):
            o = first + tl.arange(0, BLOCK_T)
            tl.store(p_slots + o.to(tl.int64), tl.full([BLOCK_T], -1, tl.int64), mask=o < max_tokens)
        for first in range(batch, max_requests, BLOCK_T):
            o = first + tl.arange(0, BLOCK_T)
            m = (o < max_requests) & (seq_row >= 0)
            tl.store(p_seq_lens + o.to(tl.int64), tl.zeros([BLOCK_T], tl.int32), mask=m)
        return

    state_row = tl.load(p_state_row + row).to(tl.int64)
    real = (state_row >= 0) & (state_row < num_requests) & (row < table_rows)
    shift = tl.load(p_shift + kind * stride_shift + state_row, mask=real, other=0)
    total = tl.load(p_total + row).to(tl.int32)
    tl.store(p_seq_lens + row, tl.where(real, total - shift, 0), mask=seq_row >= 0)

    token = tl.load(p_query_start + row)
    token_end = tl.load(p_query_start + (row + 1))
    first_index = total - shift - (token_end - token)  # of the slot of the row's first token
    for first in range(token, token_end, BLOCK_T):
        o_token = first + tl.arange(0, BLOCK_T)
        m_token = o_token < token_end
        b_index = (first_index + o_token - token).to(tl.int64)
        b_slot = load_slots(p_table, width, block_size, row, b_index, m_token & real)
        tl.store(p_slots + o_token.to(tl.int64), b_slot, mask=m_token & (o_token < max_tokens))


@triton.jit(
    do_not_specialize=["stride_shift", "stride_tokens", "size", "num_rows", "num_requests", "num_positions"],
    do_not_specialize_on_alignment=["p_shift", "p_state_row", "p_positions", "p_tokens"],
)
def slots_at_kernel(
    p_groups, p_shift, p_state_row, p_positions, p_tokens, p_out,
    stride_shift, stride_tokens, size, num_rows, num_requests, num_positions, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[group, i] for tokens i. Grid (blocks of tokens, groups)."""
    group = tl.program_id(1).to(tl.int64)
    p_table, width, block_size, kind, _, _ = load_group(p_groups, group)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    o_row = tl.load(p_tokens + o, mask=m, other=-1).to(tl.int64)
    o_token = tl.load(p_tokens + (o + stride_tokens), mask=m, other=-1).to(tl.int64)
    b_index = tl.load(p_tokens + (o + stride_tokens + stride_tokens), mask=m, other=0).to(tl.int64)
    m_row = m & (o_row >= 0) & (o_row < num_rows)
    m_position = m_row & (o_token >= 0) & (o_token < num_positions)
    o_state = tl.load(p_state_row + o_row, mask=m_position, other=-1).to(tl.int64)
    m_state = m_position & (o_state >= 0) & (o_state < num_requests)
    b_shift = tl.load(p_shift + kind * stride_shift + o_state, mask=m_state, other=0)
    b_position = tl.load(p_positions + o_token, mask=m_state, other=0).to(tl.int64)
    b_index = tl.where(o_token >= 0, b_position - b_shift, b_index)
    m_owner = m_row & (m_state | (o_token < 0))
    tl.store(p_out + group * size + o, load_slots(p_table, width, block_size, o_row, b_index, m_owner), mask=m)
