# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""One program a (block of output rows, block of columns); the first of a row block moves the positions."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["stride_position_axis", "stride_position_axis_out", "num_out", "num_rows"],
    do_not_specialize_on_alignment=["p_index", "p_position"],
)
def gather_kernel(
    p_index, p_hidden, p_residual, p_position, p_hidden_out, p_residual_out, p_position_out,
    stride_hidden, stride_residual, stride_position_axis, stride_hidden_out, stride_residual_out,
    stride_position_axis_out, num_out, num_rows, width,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """out[r] = in[index[r]], or 0 where the index is outside the input."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_out
    o_in = tl.load(p_index + o_r, mask=m_r, other=-1).to(tl.int64)
    m_in = m_r & (o_in >= 0) & (o_in < num_rows)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    read, write = m_in[:, None] & m_d[None, :], m_r[:, None] & m_d[None, :]
    b = tl.load(p_hidden + o_in[:, None] * stride_hidden + o_d[None, :], mask=read, other=0.0)
    tl.store(p_hidden_out + o_r[:, None] * stride_hidden_out + o_d[None, :], b, mask=write)
    b = tl.load(p_residual + o_in[:, None] * stride_residual + o_d[None, :], mask=read, other=0.0)
    tl.store(p_residual_out + o_r[:, None] * stride_residual_out + o_d[None, :], b, mask=write)
    if tl.program_id(1) == 0:
        for axis in tl.static_range(AXES):
            o_axis = tl.full([BLOCK_R], axis, tl.int64)
            b_position = tl.load(p_position + o_axis * stride_position_axis + o_in, mask=m_in, other=0)
            tl.store(p_position_out + o_axis * stride_position_axis_out + o_r, b_position, mask=m_r)
