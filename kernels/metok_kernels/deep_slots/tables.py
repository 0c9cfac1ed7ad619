"""What the slots are computed from: each request's visual spans, and the deep groups' block tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metok_kernels.checks import expect, require

PAD_SLOT = -1
"""Slot of a token that owns none; vLLM's cache writes skip it."""


@dataclass(frozen=True)
class SpanTables:
    """Visual spans of every request, in prompt order and without overlap, those of a request in a row.

    Request `r` owns rows `begin[r] .. end[r] - 1`. For packed tables with cumulative counts `cu` pass
    `cu[:-1]` and `cu[1:]`; for a persistent table with room for `n` spans a request, `n * r` and
    `n * r + count`.
    """

    start: torch.Tensor
    """[spans] int32: prompt position of the span's first visual token."""
    length: torch.Tensor
    """[spans] int32: visual tokens in the span."""
    retained: torch.Tensor
    """[spans] int32: retained visual tokens booked on this span (docs/method.md section 4,
    `decode_retention`). Clamped to 0 .. length. May be written on the device, by the forward pass that
    chooses them, for the steps that follow."""
    begin: torch.Tensor
    """[requests] int32."""
    end: torch.Tensor
    """[requests] int32."""

    def check(self, device: torch.device) -> None:
        """Check shapes, dtypes and devices; raises TypeError or ValueError."""
        spans, requests = self.start.shape[0], self.begin.shape[0]
        for name in ("start", "length", "retained"):
            expect(f"spans.{name}", getattr(self, name), (spans,), (torch.int32,), device)
        for name in ("begin", "end"):
            expect(f"spans.{name}", getattr(self, name), (requests,), (torch.int32,), device)


class DeepGroups:
    """The block tables of the deep KV groups. Build once: kernels keep the tables' addresses.

    Args:
        tables: one a group, [rows, max_blocks] int32 contiguous, all with the same number of rows. The caller
            keeps them alive and in place.
        block_sizes: tokens a block, one a group.
        retains: one a group: whether it holds the retained visual tokens (layers `L1 .. L3-1`) or text alone
            (from `L3` up).
    """

    def __init__(self, tables: Sequence[torch.Tensor], block_sizes: Sequence[int], retains: Sequence[bool]) -> None:
        require(len(tables) > 0, "at least one deep group is needed")
        require(len(tables) == len(block_sizes) == len(retains), "tables, block_sizes, retains differ")
        require(min(block_sizes) > 0, "a block holds at least one token")
        device = tables[0].device
        for group, table in enumerate(tables):
            expect(f"tables[{group}]", table, (tables[0].shape[0], None), (torch.int32,), device)
        self.tables = tuple(tables)
        self.block_sizes = tuple(block_sizes)
        self.retains = tuple(retains)
        self.addresses = torch.tensor(
            [0 if table.is_meta else table.data_ptr() for table in tables], dtype=torch.int64, device=device
        )
        self.widths = torch.tensor([table.shape[1] for table in tables], dtype=torch.int32, device=device)
        self.sizes = torch.tensor(self.block_sizes, dtype=torch.int32, device=device)
        self.retain_flags = torch.tensor([int(flag) for flag in retains], dtype=torch.int32, device=device)

    def __len__(self) -> int:
        return len(self.tables)
