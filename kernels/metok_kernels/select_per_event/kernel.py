# mypy: ignore-errors
# Triton's language has types of its own (pointers, blocks, constexpr) that mypy cannot follow.
"""One program an event: bisect the bits of the k-th largest score, then write the chosen in order.

Scores become unsigned keys of the same order, so the k-th largest key is found bit by bit with 32 counts and
no sort: the work is linear in the event, whatever its length, and every comparison is exact.
"""

import triton
import triton.language as tl


@triton.jit
def order_keys(b_score):
    """uint32 keys in the order of the scores (docs/method.md section 2): -0.0 is 0.0, NaN minus infinity."""
    b_score = tl.where(b_score == 0.0, 0.0, b_score)
    b_score = tl.where(b_score != b_score, float("-inf"), b_score)
    b_bits = b_score.to(tl.uint32, bitcast=True)
    negative = (b_bits >> 31) != 0
    return tl.where(negative, b_bits ^ 0xFFFFFFFF, b_bits ^ 0x80000000)


@triton.jit
def load_block(p_score, start, offset, length, BLOCK: tl.constexpr):
    """(keys [BLOCK], in-event mask [BLOCK]) from `offset` in the event; keys outside mean nothing."""
    o = offset + tl.arange(0, BLOCK)
    m = o < length
    return order_keys(tl.load(p_score + (start + o), mask=m, other=0.0)), m


@triton.jit(
    do_not_specialize=["num_events", "size"],
    do_not_specialize_on_alignment=["p_score", "p_length", "p_keep"],
)
def select_kernel(
    p_score, p_length, p_keep, p_index, num_events, size, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Grid (events + 1). The last program fills the rest of the indices with -1."""
    event = tl.program_id(0).to(tl.int64)
    b_before = tl.zeros([BLOCK_E], tl.int64)
    b_written = tl.zeros([BLOCK_E], tl.int64)
    for first in range(0, event, BLOCK_E):
        o_event = first + tl.arange(0, BLOCK_E).to(tl.int64)
        b_length = tl.load(p_length + o_event, mask=o_event < event, other=0).to(tl.int64)
        b_keep = tl.load(p_keep + o_event, mask=o_event < event, other=0).to(tl.int64)
        b_before += b_length
        b_written += tl.minimum(tl.maximum(b_keep, 0), b_length)
    start = tl.sum(b_before)
    base = tl.sum(b_written)
    if event == num_events:
        for offset in range(base, size, BLOCK):
            o = offset + tl.arange(0, BLOCK).to(tl.int64)
            tl.store(p_index + o, tl.full([BLOCK], -1, tl.int64), mask=o < size)
        return

    length = tl.load(p_length + event).to(tl.int32)
    keep = tl.minimum(tl.maximum(tl.load(p_keep + event), 0), length).to(tl.int32)
    if keep == 0:
        return

    # The largest threshold with at least `keep` keys at or above it is the keep-th largest key.
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    if length <= BLOCK:
        b_key, m = load_block(p_score, start, 0, length, BLOCK)  # stays in registers for all 32 counts
        for _ in range(32):
            count = tl.sum((m & (b_key >= (threshold | bit))).to(tl.int32))
            threshold = tl.where(count >= keep, threshold | bit, threshold)
            bit = bit >> 1
    else:
        for _ in range(32):
            counts = tl.zeros([BLOCK], tl.int32)
            for offset in range(0, length, BLOCK):
                b_key, m = load_block(p_score, start, offset, length, BLOCK)
                counts += (m & (b_key >= (threshold | bit))).to(tl.int32)
            threshold = tl.where(tl.sum(counts) >= keep, threshold | bit, threshold)
            bit = bit >> 1

    above = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, length, BLOCK):
        b_key, m = load_block(p_score, start, offset, length, BLOCK)
        above += (m & (b_key > threshold)).to(tl.int32)
    ties_wanted = keep - tl.sum(above)
    ties_seen = tl.full([], 0, tl.int32)
    kept = tl.full([], 0, tl.int32)
    for offset in range(0, length, BLOCK):
        b_key, m = load_block(p_score, start, offset, length, BLOCK)
        tie = (m & (b_key == threshold)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, 0) - tie
        chosen = (m & ((b_key > threshold) | ((tie != 0) & (tie_rank < ties_wanted)))).to(tl.int32)
        o_out = base + kept + tl.cumsum(chosen, 0) - chosen
        o_token = start + offset + tl.arange(0, BLOCK)
        tl.store(p_index + o_out, o_token, mask=(chosen != 0) & (o_out < size))
        ties_seen += tl.sum(tie)
        kept += tl.sum(chosen)
