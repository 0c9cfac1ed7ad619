"""Checks and launch of `deep_slots`."""

from __future__ import annotations

import torch

from metok_kernels.checks import INDEX, expect, require
from metok_kernels.deep_slots.kernel import deep_slots_kernel
from metok_kernels.deep_slots.tables import DeepGroups, SpanTables
from metok_kernels.launch import Launch


def prepare(
    groups: DeepGroups,
    spans: SpanTables,
    num_computed: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    span_row: torch.Tensor | None = None,
    table_row: torch.Tensor | None = None,
) -> Launch:
    """Check the arguments of `deep_slots` and build its launch."""
    device = slot_mapping.device
    expect("num_computed", num_computed, (None,), INDEX, device)
    batch = num_computed.shape[0]
    expect("query_start", query_start, (batch + 1,), INDEX, device)
    expect("seq_lens", seq_lens, (len(groups), None), (torch.int32,), device, layout="rows")
    expect("slot_mapping", slot_mapping, (len(groups), None), (torch.int64,), device, layout="rows")
    require(groups.sizes.device == device, f"groups are on {groups.sizes.device}, expected {device}")
    require(seq_lens.shape[1] >= batch, f"seq_lens has {seq_lens.shape[1]} columns for {batch} requests")
    spans.check(device)
    for name, rows, size in (("span_row", span_row, spans.begin.shape[0]), ("table_row", table_row, None)):
        if rows is not None:
            expect(name, rows, (batch,), INDEX, device)
        elif size is not None:
            require(size >= batch, f"without span_row, the table needs {batch} requests and has {size}")
    return Launch(
        deep_slots_kernel,
        (len(groups), batch + 1, 1),
        {
            "p_addresses": groups.addresses, "p_widths": groups.widths, "p_block_sizes": groups.sizes,
            "p_retains": groups.retain_flags,
            "p_start": spans.start, "p_length": spans.length, "p_retained": spans.retained,
            "p_begin": spans.begin, "p_end": spans.end, "p_span_row": span_row, "p_table_row": table_row,
            "p_num_computed": num_computed, "p_query_start": query_start,
            "p_seq_lens": seq_lens, "p_slots": slot_mapping,
            "stride_seq_lens": seq_lens.stride(0), "stride_slots": slot_mapping.stride(0),
            "batch": batch, "table_rows": groups.tables[0].shape[0], "num_requests": spans.begin.shape[0],
            "max_requests": seq_lens.shape[1], "max_tokens": slot_mapping.shape[1],
        },
        {
            "BLOCK_T": 128, "BLOCK_S": 16,
            "HAS_SPAN_ROW": span_row is not None, "HAS_TABLE_ROW": table_row is not None,
        },
    )  # fmt: skip


def deep_slots(
    groups: DeepGroups,
    spans: SpanTables,
    num_computed: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    span_row: torch.Tensor | None = None,
    table_row: torch.Tensor | None = None,
) -> None:
    """Write `seq_lens` and `slot_mapping` of every deep KV group for one step, in one launch.

    Batch row `b` brings the tokens at prompt positions `num_computed[b] + i`, `i < query_start[b+1] -
    query_start[b]`. With `slot_index` as the reference defines it (text owns a slot each, a span owns
    `retained`, laid at its front; 0 in a group that retains nothing):

    - `seq_lens[g, b] = slot_index(num_computed[b] + query length)`;
    - text token at position p: slot `table[g][b, slot_index(p) // block_size] * block_size + slot_index(p) %
      block_size`;
    - visual token of this step: -1, always. The retained ones own the slots of indices `slot_index(start) ..
      slot_index(start) + retained - 1`, which are written when layer L2 has chosen them.

    Every element of both outputs is written: rows from `len(num_computed)` on get 0 and tokens from
    `query_start[-1]` on get -1, so that a CUDA graph captured at a larger batch may replay over the buffers.

    Args:
        groups: block tables, block sizes and retention of the deep groups (built once).
        spans: visual spans of the requests. A request without any (text only) has `begin == end`.
        num_computed: [batch] int, tokens of each row's request before this step.
        query_start: [batch + 1] int, cumulative tokens of this step.
        seq_lens: [groups, >= batch] int32, out.
        slot_mapping: [groups, >= tokens] int64, out.
        span_row: [batch] int: request of `spans` of each batch row; -1 for a padding row. Without it, b is b.
        table_row: [batch] int: row of the block tables; -1 for a padding row. Without it, row b is b.

    Tokens whose slot_index lies past their block table get -1: nothing is read out of range.
    Cost: per group, 8 bytes written a token and 4 a row, 4 read a text token; no FLOPs to speak of.
    """
    outputs = seq_lens, slot_mapping
    prepare(groups, spans, num_computed, query_start, *outputs, span_row=span_row, table_row=table_row).run()
