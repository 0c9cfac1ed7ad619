# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""One program a (frame, block of its tokens, block of D); the programs after the frames copy separators."""

import triton
import triton.language as tl


@triton.jit
def tap(p_frame, o_y, o_x, o_d, m, stride_y, stride_x):
    """Grid cells (o_y, o_x) [BLOCK_T] of one frame, [BLOCK_T, BLOCK_D] float32."""
    o = o_y.to(tl.int64) * stride_y + o_x.to(tl.int64) * stride_x
    return tl.load(p_frame + o[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def source(o_out, size_in, size_out):
    """(lower cell, upper cell, weight of the upper) of bilinear resizing with corners not aligned."""
    scale = tl.div_rn(size_in.to(tl.float32), size_out.to(tl.float32))
    b = tl.maximum((o_out.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    o_low = tl.minimum(b.to(tl.int32), size_in - 1)
    return o_low, tl.minimum(o_low + 1, size_in - 1), b - o_low.to(tl.float32)


@triton.jit(
    do_not_specialize=["frames", "separators", "total", "height", "columns", "blocks"],
    do_not_specialize_on_alignment=["p_stride", "p_offset", "p_separator", "p_separator_offset"],
)
def tiered_pool_kernel(
    p_x, p_stride, p_offset, p_separator, p_separator_offset, p_out,
    stride_frame, stride_y, stride_x, frames, separators, total, width, height, columns, blocks,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BILINEAR: tl.constexpr, HAS_SEPARATOR: tl.constexpr,
    ROW_GAP: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Grid (frames * blocks + blocks of separators, blocks of D). TAPS loads are in flight at a time."""
    program = tl.program_id(0)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    frame = program // blocks
    if frame >= frames:
        if HAS_SEPARATOR:
            o_s = (program - frames * blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
            m_s = o_s < separators
            o_row = tl.load(p_separator_offset + o_s.to(tl.int64), mask=m_s, other=-1).to(tl.int64)
            m_row = (o_row >= 0) & (o_row < total)
            b_row = tl.load(p_separator + o_d, mask=m_d, other=0.0)
            b_rows = tl.broadcast_to(b_row[None, :], [BLOCK_T, BLOCK_D])
            o_out = o_row[:, None] * width + o_d[None, :]
            tl.store(p_out + o_out, b_rows, mask=m_row[:, None] & m_d[None, :])
        return

    s = tl.maximum(tl.load(p_stride + frame.to(tl.int64)), 1).to(tl.int32)
    size_y = (height + s - 1) // s
    size_x = (columns + s - 1) // s
    first = (program % blocks) * BLOCK_T
    if first >= size_y * size_x:
        return
    o_t = first + tl.arange(0, BLOCK_T)
    m_t = o_t < size_y * size_x
    m = m_t[:, None] & m_d[None, :]
    o_y = o_t // size_x
    o_x = o_t % size_x
    p_frame = p_x + frame.to(tl.int64) * stride_frame
    if BILINEAR:
        o_y0, o_y1, b_wy = source(o_y, height, size_y)
        o_x0, o_x1, b_wx = source(o_x, columns, size_x)
        b_00 = tap(p_frame, o_y0, o_x0, o_d, m, stride_y, stride_x)
        b_01 = tap(p_frame, o_y0, o_x1, o_d, m, stride_y, stride_x)
        b_10 = tap(p_frame, o_y1, o_x0, o_d, m, stride_y, stride_x)
        b_11 = tap(p_frame, o_y1, o_x1, o_d, m, stride_y, stride_x)
        b_wy, b_wx = b_wy[:, None], b_wx[:, None]
        b_upper = b_00 * (1.0 - b_wx) + b_01 * b_wx
        b_lower = b_10 * (1.0 - b_wx) + b_11 * b_wx
        b = b_upper * (1.0 - b_wy) + b_lower * b_wy
    else:
        # The windows at the far edges may be cut.
        window_y = tl.minimum(s, height - o_y * s)
        window_x = tl.minimum(s, columns - o_x * s)
        most_x = tl.minimum(s, columns)
        cells = tl.minimum(s, height) * most_x
        b = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, cells, TAPS):
            for i in tl.static_range(TAPS):
                cell_y, cell_x = (start + i) // most_x, (start + i) % most_x
                m_cell = m & ((cell_y < window_y) & (cell_x < window_x))[:, None]
                b += tap(p_frame, o_y * s + cell_y, o_x * s + cell_x, o_d, m_cell, stride_y, stride_x)
        taken = tl.maximum(window_y * window_x, 1).to(tl.float32)
        b = tl.div_rn(b, tl.broadcast_to(taken[:, None], [BLOCK_T, BLOCK_D]))
    o_row = tl.load(p_offset + frame.to(tl.int64)).to(tl.int64) + o_t
    if ROW_GAP:
        o_row += o_y
    m_row = m_t & (o_row >= 0) & (o_row < total)
    b_out = b.to(p_out.dtype.element_ty)
    tl.store(p_out + o_row[:, None] * width + o_d[None, :], b_out, mask=m_row[:, None] & m_d[None, :])
