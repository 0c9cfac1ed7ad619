"""The slot index, seq_lens and slots, on the host, one token at a time. This is the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metok_kernels.deep_slots.tables import PAD_SLOT, DeepGroups, SpanTables


def slot_index(position: int, spans: Sequence[tuple[int, int, int]]) -> int:
    """How many of a prompt's first `position` tokens own a slot, for spans (start, length, retained).

    Text owns one slot a token. A span owns `retained`, and for counting they lie at its front: the indices
    `slot_index(start) .. slot_index(start) + retained - 1` are the span's, whichever of its tokens were
    retained, and the text after it goes on from `slot_index(start) + retained`. So the slot index grows by 0
    or 1 a token, and no two owners share a slot. A request's KV order is free, since rotation has been
    applied before the cache is written.
    """
    owned = position
    for start, length, retained in spans:
        before = min(max(position - start, 0), length)
        owned -= before - min(before, max(retained, 0))
    return owned


def reference(
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
    """Same arguments and effect as `deep_slots`. Reads everything on the host."""
    seq_lens.zero_()
    slot_mapping.fill_(PAD_SLOT)
    starts = query_start.tolist()
    for row, computed in enumerate(num_computed.tolist()):
        request = row if span_row is None else int(span_row[row])
        table_at = row if table_row is None else int(table_row[row])
        if not (0 <= request < spans.begin.shape[0] and 0 <= table_at < groups.tables[0].shape[0]):
            continue
        owned = slice(int(spans.begin[request]), int(spans.end[request]))
        columns = (spans.start[owned], spans.length[owned], spans.retained[owned])
        triples = list(zip(*(column.tolist() for column in columns), strict=True))
        length = starts[row + 1] - starts[row]
        for group, (table, block_size) in enumerate(zip(groups.tables, groups.block_sizes, strict=True)):
            known = [(start, size, retained * groups.retains[group]) for start, size, retained in triples]
            seq_lens[group, row] = slot_index(computed + length, known)
            for token in range(length):
                position = computed + token
                if any(start <= position < start + size for start, size, _ in known):
                    continue
                page, offset = divmod(slot_index(position, known), block_size)
                if page < table.shape[1]:
                    slot = int(table[table_at, page]) * block_size + offset
                    slot_mapping[group, starts[row] + token] = slot
