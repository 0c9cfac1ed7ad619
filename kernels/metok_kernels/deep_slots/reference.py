"""Sequence lengths and slots on the host, one token at a time. This is the definition."""

from __future__ import annotations

import torch

from metok_kernels.deep_slots.groups import PAD_SLOT, DeepGroups


def slot_of(table: torch.Tensor, row: int, index: int, block_size: int) -> int:
    """The slot with index `index` of the request in row `row`; PAD_SLOT below 0 and past the table."""
    page, offset = divmod(index, block_size)
    return int(table[row, page]) * block_size + offset if 0 <= page < table.shape[1] else PAD_SLOT


def reference(
    groups: DeepGroups,
    shift: torch.Tensor,
    state_row: torch.Tensor,
    total: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Same arguments and effect as `deep_slots`. Reads everything on the host."""
    starts = query_start.tolist()
    for table, block_size, kind, slot_row in zip(
        groups.tables, groups.block_sizes, groups.kinds, groups.slot_rows, strict=True
    ):
        seq_lens[kind].zero_()
        slot_mapping[slot_row].fill_(PAD_SLOT)
        for row, state in enumerate(state_row.tolist()):
            if not 0 <= state < shift.shape[1]:
                continue
            owned = int(total[row]) - int(shift[kind, state])
            seq_lens[kind, row] = owned
            length = starts[row + 1] - starts[row]
            for token in range(length):
                slot = slot_of(table, row, owned - length + token, block_size)
                slot_mapping[slot_row, starts[row] + token] = slot


def reference_slots_at(
    groups: DeepGroups,
    shift: torch.Tensor,
    state_row: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Same arguments and result as `slots_at`. Reads everything on the host."""
    out = torch.full((len(groups), tokens.shape[1]), PAD_SLOT, dtype=torch.int64, device=tokens.device)
    states, of_token = state_row.tolist(), positions.tolist()
    for i, (row, token, index) in enumerate(tokens.T.tolist()):
        if not 0 <= row < len(states):
            continue
        if token >= 0 and not (token < len(of_token) and 0 <= states[row] < shift.shape[1]):
            continue
        for group, (table, block_size, kind) in enumerate(
            zip(groups.tables, groups.block_sizes, groups.kinds, strict=True)
        ):
            own = index if token < 0 else of_token[token] - int(shift[kind, states[row]])
            out[group, i] = slot_of(table, row, own, block_size)
    return out
