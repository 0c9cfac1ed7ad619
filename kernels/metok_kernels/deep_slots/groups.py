"""What the slots are computed from: the block tables of the deep KV groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metok_kernels.checks import expect, require

PAD_SLOT = -1
"""Slot of a token that owns none; vLLM's cache writes skip it."""

FIELDS = 6
"""Columns of `DeepGroups.fields`: address and width of the table, block size, kind, row of `seq_lens` that
this group writes (-1: another group of its kind does), row of `slot_mapping`."""


class DeepGroups:
    """The block tables of the deep KV groups, and what they share. Build once: kernels keep the addresses.

    Args:
        tables: one a group, [rows, max_blocks] int32 contiguous, all with the same number of rows, row `b`
            that of batch row `b`. The caller keeps them alive and in place.
        block_sizes: tokens a block, one a group.
        kinds: one a group, 0 and up. Groups of one kind shift alike: they share a row of `shift` and of
            `seq_lens`.
        slot_rows: row of each group in `slot_mapping`; 0, 1, ... where nothing is given.

    Raises:
        ValueError: sequences of different length, a block without tokens, a negative kind or row, tables of
            another shape. TypeError: tables that are not int32.
    """

    def __init__(
        self,
        tables: Sequence[torch.Tensor],
        block_sizes: Sequence[int],
        kinds: Sequence[int],
        slot_rows: Sequence[int] | None = None,
    ) -> None:
        slot_rows = range(len(tables)) if slot_rows is None else slot_rows
        require(len(tables) > 0, "at least one deep group is needed")
        require(
            len(tables) == len(block_sizes) == len(kinds) == len(slot_rows),
            "tables, block_sizes, kinds and slot_rows differ in length",
        )
        require(min(block_sizes) > 0, "a block holds at least one token")
        require(min(kinds) >= 0 and min(slot_rows) >= 0, "kinds and slot_rows are not negative")
        device = tables[0].device
        for group, table in enumerate(tables):
            expect(f"tables[{group}]", table, (tables[0].shape[0], None), (torch.int32,), device)
        self.tables = tuple(tables)
        self.block_sizes = tuple(block_sizes)
        self.kinds = tuple(kinds)
        self.slot_rows = tuple(slot_rows)
        rows = [
            (
                0 if table.is_meta else table.data_ptr(),
                table.shape[1],
                block_size,
                kind,
                -1 if kind in self.kinds[:group] else kind,
                slot_row,
            )
            for group, (table, block_size, kind, slot_row) in enumerate(
                zip(tables, block_sizes, kinds, slot_rows, strict=True)
            )
        ]
        self.fields = torch.tensor(rows, dtype=torch.int64, device=device)
        """[groups, FIELDS] int64 on the tables' device: what the kernels read of each group."""

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def table_rows(self) -> int:
        """Rows of every block table."""
        return self.tables[0].shape[0]

    @property
    def num_kinds(self) -> int:
        """Rows that `shift` and `seq_lens` need at least."""
        return max(self.kinds) + 1

    @property
    def num_slot_rows(self) -> int:
        """Rows that `slot_mapping` needs at least."""
        return max(self.slot_rows) + 1
