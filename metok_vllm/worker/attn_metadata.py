"""Attention metadata of a step in which a prompt is being pruned:
where its tokens stand, and what the others attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch

from metok_vllm.contract.kv_spec import DEEP_KINDS, EVERY_TOKEN, GroupKind
from metok_vllm.worker.batch import PromptChunk, PrunedBatch
from metok_vllm.worker.requests import PrunedRequests
from metok_vllm.worker.slots import DeepGroup, DeepSlots, request_of_token, slots_of

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup


def of_kind(
    attn_groups: list[list[AttentionGroup]], groups: Sequence[DeepGroup], kind: GroupKind
) -> list[list[AttentionGroup]]:
    """The attention groups of the KV cache groups of one kind; vLLM's builder skips a group that has none."""
    kinds = {group.index: group.kind for group in groups}
    return [layers if kinds.get(i, EVERY_TOKEN) == kind else [] for i, layers in enumerate(attn_groups)]


def prompt_chunks(input_batch: InputBatch, pruned: PrunedRequests) -> list[PromptChunk]:
    """The chunks of pruned prompts that are not complete before this step.

    Raises:
        RuntimeError: a chunk crosses the end of its prompt, which the scheduler never allows.
    """
    chunks = []
    for i, req_id in enumerate(input_batch.req_ids[: input_batch.num_reqs]):
        request = pruned.get(req_id)
        if request is None:
            continue
        computed = int(input_batch.num_computed_tokens_np[i])
        if computed < request.prompt_len:
            start = int(input_batch.query_start_loc_np[i])
            length = int(input_batch.num_scheduled_tokens[i])
            if computed + length > request.prompt_len:
                raise RuntimeError(f"METok: a chunk of {req_id} crosses the end of its prompt")
            chunks.append(PromptChunk(request, i, start, length, computed))
    return chunks


def pruned_batch(
    chunks: Sequence[PromptChunk],
    input_batch: InputBatch,
    block_tables: Sequence[torch.Tensor],
    groups: Sequence[DeepGroup],
    deep_slots: DeepSlots,
) -> PrunedBatch:
    """What the pruned step needs to know of the batch."""
    of_others = np.ones(input_batch.num_tokens, dtype=bool)
    for chunk in chunks:
        of_others[chunk.rows] = False
    others = torch.from_numpy(np.flatnonzero(of_others))
    requests = request_of_token(input_batch)[others].to(deep_slots.device)
    rows = others.to(deep_slots.device)
    shift = deep_slots.shift[:, input_batch.idx_mapping]
    slots, tables = {}, {}
    for group in groups:
        indices = input_batch.positions[rows] - shift[group.row][requests]
        group_slots = slots_of(block_tables[group.index], requests, indices, group.block_size)
        for name in group.layer_names:
            slots[name] = group_slots
            tables[name] = block_tables[group.index]
    return PrunedBatch(chunks, input_batch.num_tokens, rows, slots, tables, groups[0].block_size)


def others_metadata(
    batch: PrunedBatch,
    input_batch: InputBatch,
    block_tables: Sequence[torch.Tensor],
    groups: Sequence[DeepGroup],
    attn_groups: list[list[AttentionGroup]],
    kv_cache_config: KVCacheConfig,
    deep_slots: DeepSlots,
) -> dict[str, Any]:
    """Metadata of the deep layers for the requests that are not being pruned in this step."""
    device = deep_slots.device
    pruned = {chunk.batch_index for chunk in batch.chunks}
    keep = np.array([i for i in range(input_batch.num_reqs) if i not in pruned])
    index = torch.from_numpy(keep).to(device)
    counts = input_batch.num_scheduled_tokens[keep]
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    bounds = input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(keep)]
    tables, slot_mappings = list(block_tables), [batch.others] * len(block_tables)
    for group in groups:
        tables[group.index] = block_tables[group.index][index]
        slot_mappings[group.index] = batch.others_slots[group.layer_names[0]]
    metadata: dict[str, Any] = {}
    for row, kind in enumerate(DEEP_KINDS):
        shift = deep_slots.shift[row][input_batch.idx_mapping[index]]
        metadata |= build_attn_metadata(
            attn_groups=of_kind(attn_groups, groups, kind),
            num_reqs=len(keep),
            num_tokens=batch.num_others,
            query_start_loc_gpu=starts.to(device),
            query_start_loc_cpu=starts,
            max_query_len=int(counts.max()),
            seq_lens=input_batch.seq_lens[index] - shift,
            max_seq_len=int(bounds.max()),
            block_tables=tables,
            slot_mappings=slot_mappings,  # type: ignore[arg-type]  # indexed by group, as a tensor would be
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=bounds,
            positions=input_batch.positions[batch.others],
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np[keep]),
            req_idx=input_batch.idx_mapping_np[keep],
        )
    return metadata
