"""Where a pruned request's tokens lie in the KV cache of layers that keep few visual tokens or none, once its
prompt is complete.

A prompt with one pruned video, and its answer (t text, V visual, g generated)::

    position          0 1 2 3 4 5 6 7 8 9 10 11
                      t t V V V V V t t t g  g

    its slots in layers below L1      [ t t V V V V V t t t g g ]     slot index = position: vLLM's own layout
    layers L1 .. L3-1                 [ t t t t t | V V | g g ]       text, retained visual tokens, generated
    layers from L3 up                 [ t t t t t | V | g g ]         text, what passed L3, generated

With the window `kv_layers` there are other kinds of layer (`contract/kv_layout.py: layer_kind`)::

    below L1, inside the window       [ t t V V V V V t t t g g ]     slot index = position
    below L1, outside it: in prefill  [ t t V V V V V t t t ]         the same, as these layers read the cache
                          later       [ t t t t t | g g ]             text, moved; the rest is given back
    L1 .. L2-1, inside                [ t t t t t | V V V | g g ]     text, survivors of L1, generated
    L2 .. L3-1, inside                [ t t t t t | V V | g g ]       text, survivors of L2, generated
    from L1 up, outside               [ t t t t t | g g ]             text, generated

The order of KV within a request does not matter to attention, since rotary positions are applied before. So
text never depends on what L2 retains or L3 lets pass, and for whatever is computed after the prompt ``slot
index = position - shift``, with one shift a request and kind of group: the visual tokens that own no slot
there. Until the prompt is complete it is 0, so that a released group has vLLM's own layout.

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
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch

from metok_vllm.contract.kv_spec import (
    AFTER_L1,
    AFTER_L2,
    DEEP_KINDS,
    EVERY_TOKEN,
    RELEASED,
    SHIFTED_KINDS,
    TEXT,
    TEXT_AND_RETAINED,
    GroupKind,
    group_kind,
)
from metok_vllm.worker import ops
from metok_vllm.worker.requests import PruningResult

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.block_table import BlockTables


@dataclass(frozen=True)
class DeepGroup:
    """One KV cache group in which visual tokens may own no slot."""

    index: int  # among all KV cache groups
    kind: GroupKind
    block_size: int
    layer_names: tuple[str, ...]

    @property
    def row(self) -> int:
        """Of its kind, in the tensors of `DeepSlots`."""
        return SHIFTED_KINDS.index(self.kind)

    @property
    def is_deep(self) -> bool:
        """Whether its layers are those from L1 up; else a released group's."""
        return self.kind in DEEP_KINDS


def deep_groups(kv_cache_config: KVCacheConfig) -> tuple[DeepGroup, ...]:
    """The groups of all kinds but "every token"."""
    return tuple(
        DeepGroup(i, kind, group.kv_cache_spec.block_size, tuple(group.layer_names))
        for i, group in enumerate(kv_cache_config.kv_cache_groups)
        if (kind := group_kind(group.kv_cache_spec)) != EVERY_TOKEN
    )


class DeepSlots:
    """Shifts of all requests, and the sequence lengths and slots that follow from them.

    The first dimension of `shift` and `seq_lens` is that of `SHIFTED_KINDS`.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.device = device
        self.shift = torch.zeros(len(SHIFTED_KINDS), max_num_reqs, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(len(SHIFTED_KINDS), max_num_reqs, dtype=torch.int32, device=device)
        self.groups: tuple[DeepGroup, ...] = ()
        self.group_rows: Mapping[str, int] = {}  # name of a layer in one of them -> its group's place in `groups`
        self._blocks_held: NDArray[np.int32] = np.empty((0, 0), np.int32)
        self._tables: Sequence[torch.Tensor] = ()
        self._kernel_groups: Any = None  # what the kernels take in place of `groups` and `_tables`

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Take the KV cache's groups and the block tables that a forward pass reads, which never move.

        vLLM calls this again where it allocates another KV cache.
        """
        self.groups = deep_groups(kv_cache_config)
        self.group_rows = {name: row for row, group in enumerate(self.groups) for name in group.layer_names}
        self._tables = [block_tables.input_block_tables[group.index] for group in self.groups]
        self._blocks_held = block_tables.num_blocks.np  # int32 [all groups, requests], vLLM's own count
        if not ops.uses_triton(self.device):
            return
        from metok_kernels.deep_slots import DeepGroups

        self._kernel_groups = DeepGroups(
            self._tables,
            [group.block_size for group in self.groups],
            [group.row for group in self.groups],
            [group.index for group in self.groups],
        )

    @property
    def releases(self) -> bool:
        """Whether any group's visual tokens lose their slots when a prompt is complete."""
        return any(group.kind == RELEASED for group in self.groups)

    def reset(self, index: int) -> None:
        """A request without pruned tokens, or one whose prompt is not complete, has taken row `index`."""
        self.shift[:, index] = 0

    def complete(self, index: int, text: int, result: PruningResult) -> None:
        """The prompt of the request in row `index` is complete: in each kind of group the next token comes
        behind its `text` tokens and the visual ones that are kept there.

        The scheduler gives the other blocks of a released group back with the next step
        (`DeepKVManager.release`), so the block that vLLM appends then comes behind those for text.
        """
        kept = {
            TEXT: result.after_l3,
            TEXT_AND_RETAINED: result.retained,
            AFTER_L1: result.after_l1,
            AFTER_L2: result.after_l2,
            RELEASED: 0,
        }
        for kind in dict.fromkeys(group.kind for group in self.groups):
            self.shift[SHIFTED_KINDS.index(kind), index] = result.encoded - kept[kind]
        for group in self.groups:
            if group.kind == RELEASED:
                self._blocks_held[group.index, index] = cdiv(text, group.block_size)

    def unshifted(self, seq_lens: torch.Tensor) -> None:
        """No request in the batch has pruned tokens: its groups of all kinds are equally long."""
        self.seq_lens[:, : seq_lens.shape[0]].copy_(seq_lens)

    def write(self, input_batch: InputBatch, slot_mappings: torch.Tensor) -> None:
        """Sequence lengths of all kinds, and the slots of their groups in place.

        The per-layer views of `slot_mappings` that vLLM has already made see the change. For the tokens of a
        prompt that is being pruned both mean nothing in a deep group, and in a released one what they mean to
        vLLM.
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
        """Slots by slot index, in every group of `groups`.

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
