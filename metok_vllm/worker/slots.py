"""Where a pruned request's tokens lie in the pruned groups, once its prompt is complete.

Slots of a request there are ranked: text of the prompt, retained visual tokens, generated tokens. So for whatever is computed
after the prompt, ``rank = position - shift`` with one shift per request and kind of group. All state lives on the device in
tensors that never move, since captured CUDA graphs read `seq_lens` at their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch

from metok_vllm.scheduler.kv_manager import PrunedAttentionSpec
from metok_vllm.worker import ops

KINDS = (False, True)
"""Kinds of pruned group, by `PrunedAttentionSpec.retains`; also the index of a kind's row in the tensors below."""


@dataclass(frozen=True)
class PrunedGroup:
    """One KV cache group without pruned tokens."""

    index: int  # among all KV cache groups
    retains: bool
    block_size: int
    layer_names: tuple[str, ...]


def pruned_groups(kv_cache_config: KVCacheConfig) -> tuple[PrunedGroup, ...]:
    """The groups of the layers from L1 up."""
    return tuple(
        PrunedGroup(i, spec.retains, spec.block_size, tuple(group.layer_names))
        for i, group in enumerate(kv_cache_config.kv_cache_groups)
        if isinstance(spec := group.kv_cache_spec, PrunedAttentionSpec)
    )


class SlotRanks:
    """Shifts of all requests, and the sequence lengths and slots that follow from them."""

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.device = device
        self.shift = torch.zeros(len(KINDS), max_num_reqs, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(len(KINDS), max_num_reqs, dtype=torch.int32, device=device)
        # The same facts as the kernel takes them: one span a request, with what is retained of it.
        self._start = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._length = torch.zeros_like(self._start)
        self._kept = torch.zeros_like(self._start)
        self._begin = torch.arange(max_num_reqs, dtype=torch.int32, device=device)

    def reset(self, index: int) -> None:
        """A request without pruned tokens, or one whose prompt is not complete, has taken row `index`."""
        self.shift[:, index] = 0
        self._length[index] = 0
        self._kept[index] = 0

    def complete(self, index: int, start: int, visual: int, retained: int) -> None:
        """The prompt of the request in row `index` is complete: `visual` tokens from `start` on, `retained` of them kept.

        The text between several videos lies before the end of the prompt, so one span of their total length ranks whatever
        is computed after the prompt as the videos themselves would.
        """
        self.shift[int(False), index] = visual
        self.shift[int(True), index] = visual - retained
        self._start[index] = start
        self._length[index] = visual
        self._kept[index] = retained

    def unshifted(self, seq_lens: torch.Tensor) -> None:
        """No request in the batch has pruned tokens: its pruned groups are as long as its others."""
        self.seq_lens[:, : seq_lens.shape[0]].copy_(seq_lens)

    def write(
        self,
        input_batch: InputBatch,
        block_tables: Sequence[torch.Tensor],
        slot_mappings: torch.Tensor,
        groups: Sequence[PrunedGroup],
    ) -> None:
        """Sequence lengths of both kinds, and the pruned groups' slots in place, for a step without prompts in pruning.

        The per-layer views of `slot_mappings` that vLLM has already made see the change.
        """
        if ops.uses_triton(self.device):
            self._write_by_kernel(input_batch, block_tables, slot_mappings, groups)
            return
        self.unshifted(input_batch.seq_lens)
        self.seq_lens[:, : input_batch.num_reqs] -= self.shift[:, input_batch.idx_mapping]
        n = input_batch.num_tokens
        rows = token_rows(input_batch).to(self.device)
        shift = self.shift[:, input_batch.idx_mapping][:, rows]
        for group in groups:
            ranks = input_batch.positions[:n] - shift[int(group.retains)]
            slot_mappings[group.index, :n] = slots_of(block_tables[group.index], rows, ranks, group.block_size)

    def _write_by_kernel(
        self,
        input_batch: InputBatch,
        block_tables: Sequence[torch.Tensor],
        slot_mappings: torch.Tensor,
        groups: Sequence[PrunedGroup],
    ) -> None:
        from metok_kernels.pruned_slots import PrunedGroups, SpanTables, pruned_slots

        n = input_batch.num_reqs
        starts = input_batch.query_start_loc[: n + 1]
        tables = PrunedGroups(
            [block_tables[group.index] for group in groups],
            [group.block_size for group in groups],
            [group.retains for group in groups],
        )
        spans = SpanTables(
            self._start, self._length, self._kept, self._begin, self._begin + (self._length > 0).to(torch.int32)
        )
        first, last = groups[0].index, groups[-1].index + 1
        if [group.index for group in groups] != list(range(first, last)):
            raise RuntimeError("METok: the pruned KV cache groups do not stand in a row")
        lengths = torch.empty(len(groups), self.seq_lens.shape[1], dtype=torch.int32, device=self.device)
        pruned_slots(
            tables,
            spans,
            input_batch.seq_lens[:n] - (starts[1:] - starts[:-1]),
            starts,
            lengths,
            slot_mappings[first:last],
            span_row=input_batch.idx_mapping.to(torch.int32),
        )
        for i, group in enumerate(groups):
            self.seq_lens[int(group.retains)].copy_(lengths[i])


def token_rows(input_batch: InputBatch) -> torch.Tensor:
    """Batch row of every token of the step, int64 [tokens], on the host."""
    counts = input_batch.num_scheduled_tokens[: input_batch.num_reqs]
    return torch.from_numpy(np.repeat(np.arange(input_batch.num_reqs), counts))


def slots_of(table: torch.Tensor, rows: torch.Tensor, ranks: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slot of each token: `table` int32 [batch, blocks], `rows` and `ranks` int64 [n], to int64 [n]."""
    return table[rows, ranks // block_size].to(torch.int64) * block_size + ranks % block_size
