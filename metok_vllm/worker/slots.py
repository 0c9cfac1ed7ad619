"""Where a pruned request's tokens lie in the KV cache of the deep layers, once its prompt is complete.

A prompt with one pruned video, and its answer (t text, V visual, g generated)::

    position          0 1 2 3 4 5 6 7 8 9 10 11
                      t t V V V V V t t t g  g

    its slots in layers below L1      [ t t V V V V V t t t g g ]     slot index = position: vLLM's own layout
    layers L1 .. L3-1                 [ t t t t t | V V | g g ]       text, retained visual tokens, generated
    layers from L3 up                 [ t t t t t | V | g g ]         text, what passed L3, generated

The order of KV within a request does not matter to attention, since rotary positions are applied before. So
text never depends on what L2 retains or L3 lets pass, and for whatever is computed after the prompt ``slot
index = position - shift``, with one shift a request and kind of group: the visual tokens that own no slot
there.

All state lives on the device in tensors that never move, since captured CUDA graphs read `seq_lens` at their
addresses. Nothing here makes the host wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch

from metok_vllm.contract.kv_spec import DEEP_KINDS, EVERY_TOKEN, TEXT, TEXT_AND_RETAINED, GroupKind, group_kind
from metok_vllm.worker import ops

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.block_table import BlockTables


@dataclass(frozen=True)
class DeepGroup:
    """One KV cache group of deep layers."""

    index: int  # among all KV cache groups
    kind: GroupKind
    block_size: int
    layer_names: tuple[str, ...]

    @property
    def row(self) -> int:
        """Of its kind, in the tensors of `DeepSlots`."""
        return DEEP_KINDS.index(self.kind)


def deep_groups(kv_cache_config: KVCacheConfig) -> tuple[DeepGroup, ...]:
    """The groups of the layers from L1 up."""
    return tuple(
        DeepGroup(i, kind, group.kv_cache_spec.block_size, tuple(group.layer_names))
        for i, group in enumerate(kv_cache_config.kv_cache_groups)
        if (kind := group_kind(group.kv_cache_spec)) != EVERY_TOKEN
    )


class DeepSlots:
    """Shifts of all requests, and the sequence lengths and slots that follow from them.

    The first dimension of `shift` and `seq_lens` is that of `DEEP_KINDS`.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.device = device
        self.shift = torch.zeros(len(DEEP_KINDS), max_num_reqs, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(len(DEEP_KINDS), max_num_reqs, dtype=torch.int32, device=device)
        self.groups: tuple[DeepGroup, ...] = ()
        self.group_rows: Mapping[str, int] = {}  # name of a deep layer -> its group's place in `groups`
        self._tables: Sequence[torch.Tensor] = ()
        self._kernel_groups: Any = None  # what the kernels take in place of `groups` and `_tables`

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Take the KV cache's groups and the block tables that a forward pass reads, which never move.

        vLLM calls this again where it allocates another KV cache.
        """
        self.groups = deep_groups(kv_cache_config)
        self.group_rows = {name: row for row, group in enumerate(self.groups) for name in group.layer_names}
        self._tables = [block_tables.input_block_tables[group.index] for group in self.groups]
        if not ops.uses_triton(self.device):
            return
        from metok_kernels.deep_slots import DeepGroups

        self._kernel_groups = DeepGroups(
            self._tables,
            [group.block_size for group in self.groups],
            [group.row for group in self.groups],
            [group.index for group in self.groups],
        )

    def reset(self, index: int) -> None:
        """A request without pruned tokens, or one whose prompt is not complete, has taken row `index`."""
        self.shift[:, index] = 0

    def complete(self, index: int, visual: int, retained: int, after_l3: int) -> None:
        """The prompt of the request in row `index` is complete: `visual` tokens, of which layers L1 .. L3-1
        keep `retained`, and the layers from L3 up `after_l3`.
        """
        self.shift[DEEP_KINDS.index(TEXT), index] = visual - after_l3
        self.shift[DEEP_KINDS.index(TEXT_AND_RETAINED), index] = visual - retained

    def unshifted(self, seq_lens: torch.Tensor) -> None:
        """No request in the batch has pruned tokens: its deep groups are as long as the others."""
        self.seq_lens[:, : seq_lens.shape[0]].copy_(seq_lens)

    def write(self, input_batch: InputBatch, slot_mappings: torch.Tensor) -> None:
        """Sequence lengths of both kinds, and the deep groups' slots in place.

        The per-layer views of `slot_mappings` that vLLM has already made see the change. For the tokens of a
        prompt that is being pruned both mean nothing.
        """
        if self._kernel_groups is not None:
            from metok_kernels.deep_slots import deep_slots

            deep_slots(
                self._kernel_groups,
                self.shift,
                input_batch.idx_mapping,
                input_batch.seq_lens,
                input_batch.query_start_loc,
                self.seq_lens,
                slot_mappings,
            )
            return
        self.unshifted(input_batch.seq_lens)
        self.seq_lens[:, : input_batch.num_reqs] -= self.shift[:, input_batch.idx_mapping]
        n = input_batch.num_tokens
        counts = input_batch.num_scheduled_tokens[: input_batch.num_reqs]
        requests = async_tensor_h2d(np.repeat(np.arange(input_batch.num_reqs), counts), self.device)
        shift = self.shift[:, input_batch.idx_mapping[requests]]
        for group, table in zip(self.groups, self._tables, strict=True):
            indices = input_batch.positions[:n] - shift[group.row]
            slot_mappings[group.index, :n] = slots_of(table, requests, indices, group.block_size)

    def at(self, input_batch: InputBatch, requests: NDArray[np.int32], indices: NDArray[np.int32]) -> torch.Tensor:
        """Slots by slot index, in every deep group.

        Args:
            input_batch: the step's.
            requests: int32 [n], batch index of each slot's request.
            indices: int32 [n], slot indices.

        Returns:
            int64 [groups, n], in the order of `groups`.
        """
        host = np.stack((requests, np.full_like(requests, -1), indices))
        tokens = async_tensor_h2d(host, self.device)
        if self._kernel_groups is not None:
            from metok_kernels.deep_slots import slots_at

            return slots_at(self._kernel_groups, self.shift, input_batch.idx_mapping, input_batch.positions, tokens)
        of_request, _, index = tokens.to(torch.int64)
        return torch.stack(
            [
                slots_of(table, of_request, index, group.block_size)
                for group, table in zip(self.groups, self._tables, strict=True)
            ]
        )


def slots_of(table: torch.Tensor, requests: torch.Tensor, indices: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slot of each token: block `table` int32 [requests, blocks],
    `requests` and slot `indices` int64 [n], to int64 [n].
    """
    return table[requests, indices // block_size].to(torch.int64) * block_size + indices % block_size
