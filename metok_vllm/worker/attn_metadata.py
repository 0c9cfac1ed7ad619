"""Attention metadata of a METok model's groups: what a pruned step needs to know of the batch,
and one metadata a kind of group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch

from metok_vllm.contract.kv_spec import AFTER_L1, AFTER_L2, SHIFTED_KINDS, GroupKind, group_kind
from metok_vllm.contract.spans import final_bound, retained_bound, survivors_bound
from metok_vllm.worker.batch import PromptChunk, PrunedBatch
from metok_vllm.worker.requests import PrunedRequests
from metok_vllm.worker.slots import DeepSlots

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup

Groups = list[list["AttentionGroup"]]
"""vLLM's: for each KV cache group its attention groups."""


def once_a_kind(
    attn_groups: Groups,
    kv_cache_config: KVCacheConfig,
    kinds: Sequence[GroupKind],
    block_tables: Sequence[torch.Tensor],
    slot_mappings: Any,
    build: Callable[[GroupKind, Groups], dict[str, Any]],
    ubatch: int = 0,
) -> dict[str, Any]:
    """Metadata of all layers of some kinds, built once for each kind and cache format.

    Groups of one kind have the same sequence lengths. They differ in block table and slots alone, and these
    are put into copies, which all read what the first group's builder keeps for CUDA graphs.

    Args:
        attn_groups: of all KV cache groups.
        kv_cache_config: the groups.
        kinds: those to build.
        block_tables: by KV cache group, int32 [requests, blocks].
        slot_mappings: by KV cache group, int64 [tokens].
        build: vLLM's builder on the attention groups that it is given; it skips a KV cache group without any.
        ubatch: vLLM's micro-batch, whose builders are used.

    Returns:
        Layer name to metadata.
    """
    of_group = [group_kind(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    metadata: dict[str, Any] = {}
    for kind in kinds:
        firsts: dict[Any, str] = {}  # backend and format -> a layer that has its metadata
        to_build: Groups = [[] for _ in attn_groups]
        to_copy: list[tuple[str, int, AttentionGroup]] = []
        for i, layers in enumerate(attn_groups):
            if of_group[i] != kind:
                continue
            for attn_group in layers:
                alike = (attn_group.backend, attn_group.kv_cache_spec)
                if alike in firsts:
                    to_copy.append((firsts[alike], i, attn_group))
                else:
                    firsts[alike] = attn_group.layer_names[0]
                    to_build[i].append(attn_group)
        metadata |= build(kind, to_build)
        for first, i, attn_group in to_copy:
            builder = attn_group.get_metadata_builder(ubatch)
            if builder.supports_update_block_table:
                copied = builder.update_block_table(metadata[first], block_tables[i], slot_mappings[i])
            else:
                copied = replace(metadata[first], block_table=block_tables[i], slot_mapping=slot_mappings[i])
            metadata |= dict.fromkeys(attn_group.layer_names, copied)
    return metadata


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
    slot_mappings: torch.Tensor,
    deep_slots: DeepSlots,
) -> PrunedBatch:
    """What the pruned step needs to know of the batch."""
    of_others = np.ones(input_batch.num_tokens, dtype=np.bool_)
    for chunk in chunks:
        of_others[chunk.rows] = False
    others = async_tensor_h2d(np.flatnonzero(of_others), deep_slots.device)
    others_slots: dict[str, torch.Tensor] = {}
    if others.shape[0] or deep_slots.releases:  # released groups are read for the whole batch
        deep_slots.write(input_batch, slot_mappings)
    if others.shape[0]:
        slots = slot_mappings.index_select(1, others)
        others_slots = {
            name: slots[group.index] for group in deep_slots.groups if group.is_deep for name in group.layer_names
        }
    keeps_survivors = any(group.kind in (AFTER_L1, AFTER_L2) for group in deep_slots.groups)
    text, kept = _prompt_slots(chunks, input_batch, deep_slots, keeps_survivors)
    return PrunedBatch(
        chunks, input_batch.num_tokens, others, others_slots, deep_slots.group_rows, text, kept, keeps_survivors
    )


def _prompt_slots(
    chunks: Sequence[PromptChunk], input_batch: InputBatch, deep_slots: DeepSlots, keeps_survivors: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`text_slots` and `kept_slots` of a `PrunedBatch`.

    What is kept lies behind the text in either kind of group: retained tokens in one, those that pass L3 in
    the other. Of the larger number slots are laid out in all groups; no layer is asked for more than its own.
    With the window `kv_layers` layers inside it lie beside layers outside, in whose groups the slots are
    nobody's.
    """
    complete = [chunk for chunk in chunks if chunk.completes]
    texts = [chunk.request.text_tokens for chunk in complete]
    spans = [chunk.request.spans for chunk in complete]
    bounds = [
        survivors_bound(of_prompt, 1) if keeps_survivors else max(retained_bound(of_prompt), final_bound(of_prompt))
        for of_prompt in spans
    ]

    def runs(values: Sequence[tuple[int, int]]) -> list[NDArray[np.int32]]:
        return [np.arange(start, end, dtype=np.int32) for start, end in values]

    sizes = [*texts, *bounds]
    rows = np.array([chunk.batch_index for chunk in complete] * 2, dtype=np.int32)
    text_ends = [(0, text) for text in texts]
    kept_ends = [(text, text + bound) for text, bound in zip(texts, bounds, strict=True)]
    indices = np.concatenate([np.empty(0, np.int32), *runs(text_ends), *runs(kept_ends)])
    slots = deep_slots.at(input_batch, np.repeat(rows, sizes), indices)
    text, kept = torch.split(slots, [sum(texts), sum(bounds)], dim=1)
    for of_group, group in zip(kept, deep_slots.groups, strict=True):
        if keeps_survivors and group.kind not in (AFTER_L1, AFTER_L2):
            of_group.fill_(-1)
    return text, torch.split(kept, bounds, dim=1)


def others_metadata(
    batch: PrunedBatch,
    input_batch: InputBatch,
    block_tables: Sequence[torch.Tensor],
    attn_groups: Groups,
    kv_cache_config: KVCacheConfig,
    deep_slots: DeepSlots,
) -> dict[str, Any]:
    """Metadata of the deep layers for the requests that are not being pruned in this step."""
    device = deep_slots.device
    pruned = {chunk.batch_index for chunk in batch.chunks}
    keep = np.array([i for i in range(input_batch.num_reqs) if i not in pruned])
    index = async_tensor_h2d(keep, device)
    counts = input_batch.num_scheduled_tokens[keep]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    starts_on_device = async_tensor_h2d(starts, device)
    bounds = input_batch.seq_lens_cpu_upper_bound.numpy()[keep]  # vLLM keeps it on the host
    positions = input_batch.positions.index_select(0, batch.others)
    tables: list[torch.Tensor] = list(block_tables)
    slot_mappings: list[torch.Tensor] = [batch.others] * len(block_tables)
    kinds = dict.fromkeys(group.kind for group in deep_slots.groups if group.is_deep)
    for group in deep_slots.groups:
        if not group.is_deep:
            continue
        tables[group.index] = block_tables[group.index].index_select(0, index)
        slot_mappings[group.index] = batch.others_slots[group.layer_names[0]]

    def build(kind: GroupKind, to_build: Groups) -> dict[str, Any]:
        return build_attn_metadata(
            attn_groups=to_build,
            num_reqs=len(keep),
            num_tokens=batch.num_others,
            query_start_loc_gpu=starts_on_device,
            query_start_loc_cpu=torch.from_numpy(starts),
            max_query_len=int(counts.max()),
            seq_lens=deep_slots.seq_lens[SHIFTED_KINDS.index(kind)].index_select(0, index),
            max_seq_len=int(bounds.max()),
            block_tables=tables,
            slot_mappings=slot_mappings,  # type: ignore[arg-type]  # indexed by group, as a tensor would be
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=torch.from_numpy(bounds),
            positions=positions,
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np[keep]),
            req_idx=input_batch.idx_mapping_np[keep],
        )

    return once_a_kind(attn_groups, kv_cache_config, tuple(kinds), tables, slot_mappings, build)
