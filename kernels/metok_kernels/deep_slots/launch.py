"""Checks and launches of `deep_slots` and `slots_at`."""

from __future__ import annotations

import torch

from metok_kernels.checks import INDEX, expect, require
from metok_kernels.deep_slots.groups import DeepGroups
from metok_kernels.deep_slots.kernel import deep_slots_kernel, slots_at_kernel
from metok_kernels.launch import Launch, ceil_div

BLOCK_TOKENS = 128


def _check_shift(groups: DeepGroups, shift: torch.Tensor, device: torch.device) -> None:
    expect("shift", shift, (None, None), (torch.int32,), device, layout="rows")
    require(shift.shape[0] >= groups.num_kinds, f"shift has {shift.shape[0]} rows for {groups.num_kinds} kinds")
    require(groups.fields.device == device, f"groups are on {groups.fields.device}, expected {device}")


def prepare(
    groups: DeepGroups,
    shift: torch.Tensor,
    state_row: torch.Tensor,
    total: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> Launch:
    """Check the arguments of `deep_slots` and build its launch."""
    device = slot_mapping.device
    _check_shift(groups, shift, device)
    expect("state_row", state_row, (None,), INDEX, device)
    batch = state_row.shape[0]
    expect("total", total, (None,), INDEX, device)
    expect("query_start", query_start, (None,), INDEX, device)
    expect("seq_lens", seq_lens, (None, None), (torch.int32,), device, layout="rows")
    expect("slot_mapping", slot_mapping, (None, None), (torch.int64,), device, layout="rows")
    require(total.shape[0] >= batch, f"total has {total.shape[0]} entries for {batch} requests")
    require(
        query_start.shape[0] > batch, f"query_start has {query_start.shape[0]} entries, {batch} requests need one more"
    )
    require(seq_lens.shape[0] >= groups.num_kinds, f"seq_lens has {seq_lens.shape[0]} rows, {groups.num_kinds} needed")
    require(seq_lens.shape[1] >= batch, f"seq_lens has {seq_lens.shape[1]} columns for {batch} requests")
    require(
        slot_mapping.shape[0] >= groups.num_slot_rows,
        f"slot_mapping has {slot_mapping.shape[0]} rows, {groups.num_slot_rows} needed",
    )
    require(groups.table_rows >= batch, f"the block tables have {groups.table_rows} rows for {batch} requests")
    return Launch(
        deep_slots_kernel,
        (len(groups), batch + 1, 1),
        {
            "p_groups": groups.fields, "p_shift": shift, "p_state_row": state_row,
            "p_total": total, "p_query_start": query_start, "p_seq_lens": seq_lens, "p_slots": slot_mapping,
            "stride_shift": shift.stride(0), "stride_seq_lens": seq_lens.stride(0),
            "stride_slots": slot_mapping.stride(0), "batch": batch, "table_rows": groups.table_rows,
            "num_requests": shift.shape[1], "max_requests": seq_lens.shape[1], "max_tokens": slot_mapping.shape[1],
        },
        {"BLOCK_T": BLOCK_TOKENS},
    )  # fmt: skip


def deep_slots(
    groups: DeepGroups,
    shift: torch.Tensor,
    state_row: torch.Tensor,
    total: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write the sequence lengths of every kind and the slots of every deep KV group for one step,
    in one launch.

    For tokens behind a pruned prompt, and for requests without pruned tokens, `slot index = position -
    shift`: the visual tokens of the prompt that own no slot in that kind of group. Batch row `b` brings the
    last `query_start[b + 1] - query_start[b]` of its request's `total[b]` tokens, and then

    - `seq_lens[kind, b] = total[b] - shift[kind, state_row[b]]`;
    - a token of slot index i gets `table[b, i // block_size] * block_size + i % block_size`.

    Every element of both outputs is written, in the rows that belong to a group: rows from `len(state_row)`
    on get 0 and tokens from `query_start[-1]` on get -1, so that a CUDA graph captured at a larger batch may
    replay over the buffers. Rows of `slot_mapping` and `seq_lens` that belong to no group are left alone.

    Args:
        groups: the deep groups, built once.
        shift: [kinds, requests] int32, of each request by its row of state. Row stride free.
        state_row: [batch] int32 or int64: row of state of each batch row; outside `0 .. requests - 1` it is
            padding, with length 0 and slots -1.
        total: [>= batch] int32 or int64, tokens of each request, those of this step included.
        query_start: [> batch] int32 or int64, cumulative tokens of this step.
        seq_lens: [>= kinds, >= batch] int32, out; row stride free.
        slot_mapping: [>= rows of the groups, >= tokens] int64, out; row stride free.

    Slot indices below 0 or past the block table get -1: nothing is read out of range.
    Raises TypeError or ValueError for wrong dtypes, shapes or devices.
    Cost: per group, 8 bytes written and 4 read a token, 4 written a row; no FLOPs to speak of.
    """
    prepare(groups, shift, state_row, total, query_start, seq_lens, slot_mapping).run()


def prepare_slots_at(
    groups: DeepGroups,
    shift: torch.Tensor,
    state_row: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[Launch, torch.Tensor]:
    """Check the arguments of `slots_at`; returns its launch and the tensor it fills."""
    device = tokens.device
    _check_shift(groups, shift, device)
    expect("state_row", state_row, (None,), INDEX, device)
    expect("positions", positions, (None,), INDEX, device)
    expect("tokens", tokens, (3, None), (torch.int32,), device, layout="rows")
    rows, size = state_row.shape[0], tokens.shape[1]
    require(groups.table_rows >= rows, f"the block tables have {groups.table_rows} rows for {rows} requests")
    out = torch.empty(len(groups), size, dtype=torch.int64, device=device)
    launch = Launch(
        slots_at_kernel,
        (ceil_div(size, BLOCK_TOKENS), len(groups), 1),
        {
            "p_groups": groups.fields, "p_shift": shift, "p_state_row": state_row,
            "p_positions": positions, "p_tokens": tokens, "p_out": out,
            "stride_shift": shift.stride(0), "stride_tokens": tokens.stride(0), "size": size, "num_rows": rows,
            "num_requests": shift.shape[1], "num_positions": positions.shape[0],
        },
        {"BLOCK": BLOCK_TOKENS},
    )  # fmt: skip
    return launch, out


def slots_at(
    groups: DeepGroups,
    shift: torch.Tensor,
    state_row: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Slots of any tokens of a step, in any order, in every deep KV group, in one launch.

    A token is named either by its row in the batch, and its slot index is then its position less its
    request's shift; or by its slot index itself, as are the text and the retained visual tokens of a prompt
    that is pruned in this step.

    Args:
        groups: the deep groups, built once.
        shift: [kinds, requests] int32, as in `deep_slots`.
        state_row: [batch] int32 or int64, row of state of each batch row.
        positions: [>= tokens of the step] int32 or int64, position in its request of each token of the batch.
        tokens: [3, n] int32, row stride free. Row 0: batch row of the token's request. Row 1: the token's row
            in the batch, or -1. Row 2: where row 1 is -1 the slot index; not read otherwise.

    Returns:
        [groups, n] int64, in the order of the groups. -1 for batch rows, tokens or rows of state that do not
        exist, and for slot indices below 0 or past the block table.

    Raises TypeError or ValueError for wrong dtypes, shapes or devices.
    Cost: per group, about 24 bytes read and 8 written a token.
    """
    launch, out = prepare_slots_at(groups, shift, state_row, positions, tokens)
    launch.run()
    return out
