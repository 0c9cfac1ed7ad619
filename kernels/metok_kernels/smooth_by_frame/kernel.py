# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""One program a frame, which owns its run of tokens: no atomics, so all ranks get the same bits."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["p_score", "p_start", "p_out"])
def smooth_kernel(p_score, p_start, p_out, weight, BLOCK: tl.constexpr):
    """Grid (frames). A frame without tokens has nothing to read or to write."""
    frame = tl.program_id(0).to(tl.int64)
    start = tl.load(p_start + frame).to(tl.int64)
    end = tl.load(p_start + (frame + 1)).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for offset in range(start, end, BLOCK):
        o = offset + tl.arange(0, BLOCK).to(tl.int64)
        b_sum += tl.load(p_score + o, mask=o < end, other=0.0)
    mean = tl.sum(b_sum) / tl.maximum(end - start, 1).to(tl.float32)
    for offset in range(start, end, BLOCK):
        o = offset + tl.arange(0, BLOCK).to(tl.int64)
        b_score = tl.load(p_score + o, mask=o < end, other=0.0)
        tl.store(p_out + o, (1.0 - weight) * b_score + weight * mean, mask=o < end)
