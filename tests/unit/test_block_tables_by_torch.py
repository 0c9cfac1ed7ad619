"""The CPU build's torch operations for block tables and slots (`cpu/`)
against vLLM's kernels in the interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.block_table import BlockTables

SIZES, WIDTHS, REQUESTS, TOKENS = [32, 128, 16], [9, 3, 17], 6, 96
CPU = torch.device("cpu")


def tables(seed: int) -> BlockTables:
    made = BlockTables(SIZES, REQUESTS, TOKENS, WIDTHS, CPU)
    rng = np.random.default_rng(seed)
    for i, (table, width) in enumerate(zip(made.block_tables, WIDTHS, strict=True)):
        table.gpu.copy_(torch.from_numpy(rng.integers(1, 1000, (REQUESTS, width))))
        made.num_blocks.np[i] = rng.integers(0, width + 1, REQUESTS)
    made.num_blocks.copy_to_uva()
    return made


@pytest.mark.parametrize("seed", range(6))
def test_equal_the_kernels(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.is_uva_available", lambda: False)
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, REQUESTS))
    rows = torch.from_numpy(rng.permutation(REQUESTS)[:batch])
    if seed % 2:
        rows[-1] = -1  # a dummy request
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(rng.integers(1, 14, batch))]).astype(np.int32))
    tokens = int(starts[-1])
    positions = torch.from_numpy(rng.integers(0, 9 * 16, TOKENS))
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv("METOK_CPU_KERNELS", choice)
        made = tables(seed)
        slots = made.compute_slot_mappings(rows, starts, positions, tokens + 3).clone()
        assert slots.shape == (len(SIZES), tokens + 3)
        known = rows[rows >= 0]
        gathered = made.gather_block_tables(known, batch + 1)
        blocks = []
        for i, table in enumerate(gathered):
            assert table.shape == (batch + 1, WIDTHS[i])
            assert not table[len(known) :].any(), "rows of padding"
            owned = torch.arange(WIDTHS[i]) < torch.from_numpy(made.num_blocks.np[i])[known][:, None]
            blocks.append(table[: len(known)] * owned)
        results.append((slots, made.slot_mappings.clone(), blocks))
    (slots, all_slots, blocks), (torch_slots, torch_all_slots, torch_blocks) = results
    assert torch.equal(slots, torch_slots)
    assert torch.equal(all_slots, torch_all_slots), "the tokens behind the batch too"
    for expected, observed in zip(blocks, torch_blocks, strict=True):
        assert torch.equal(expected, observed)


def test_the_torch_operations_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the comparison above would compare the kernels with themselves."""
    monkeypatch.delenv("METOK_CPU_KERNELS", raising=False)
    assert BlockTables.compute_slot_mappings.__module__ == "metok_cpu_engine.interpreter"
    assert BlockTables.gather_block_tables.__module__ == "metok_cpu_engine.interpreter"
