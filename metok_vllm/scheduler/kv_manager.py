"""KV blocks of the layers in which visual tokens may own no slot: a block table that skips them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from metok_vllm.contract.kv_spec import RELEASED, DeepAttentionSpec, group_kind
from metok_vllm.scheduler.slot_counts import SlotCounts

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.request import Request


class DeepKVManager(SingleTypeKVCacheManager):
    """Allocates blocks for the tokens that own a slot,
    and never publishes a block that a pruned video precedes.

    `slot_counts` is the scheduler's table of pruned requests; a request that is not in it is an ordinary one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slot_counts: dict[str, SlotCounts] = {}
        self.kind = group_kind(self.kv_cache_spec)

    def _slots(self, request_id: str, num_tokens: int) -> int:
        counts = self.slot_counts.get(request_id)
        return num_tokens if counts is None else counts.slots(num_tokens, self.kind)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        counts, slots = self.slot_counts.get(request_id), self._slots(request_id, num_tokens)
        if apply_admission_cap and counts is not None and total_computed_tokens < counts.prompt_len:
            # Asked whether all of a request will fit, which is resumed with tokens of its own: before these
            # come its prompt needs more in a released group.
            slots = counts.most_slots(num_tokens, self.kind)
        return super().get_num_blocks_to_allocate(
            request_id,
            slots,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(request_id, self._slots(request_id, num_tokens), num_tokens_main_model)

    @property
    def releases(self) -> bool:
        """Whether complete prompts give blocks back."""
        return self.kind == RELEASED

    def release(self, request_id: str) -> None:
        """Give back the blocks of a complete prompt's visual tokens: its text has been moved together.

        Called between the step that completes the prompt and the next one that the request is in; changes
        nothing when called again. What stays is what an allocation for its text would hold. Published blocks
        lie before the first video, so they are all among it.
        """
        blocks = self.req_to_blocks[request_id]
        kept = cdiv(self.slot_counts[request_id].text_tokens, self.block_size)
        released = blocks[kept:]
        del blocks[kept:]
        self.block_pool.free_blocks(reversed(released))

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Publish full blocks; of a pruned request only those before its first video.

        From there on a block holds the wrong tokens for its hash (text that stands behind the video), and
        what it holds depends on the question.
        """
        counts = self.slot_counts.get(request.request_id)
        if counts is not None:
            # Deep layers run once, with the prompt's last chunk. Until that step is scheduled nothing was
            # written there. In released groups it was, and nothing hits before the deep ones have it too.
            if max(num_tokens, request.num_computed_tokens) < counts.prompt_len:
                return
            num_tokens = min(num_tokens, counts.spans[0].start)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest run of cached full blocks from the start, as for full attention."""
        block_size = kv_cache_spec.block_size
        # Hashes may be finer than blocks (--prefix-match-unit); a block is known by the last hash inside it.
        block_hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        found: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        for block_hash in itertools.islice(block_hashes, max_length // block_size):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not cached:
                break
            for blocks, block in zip(found, cached, strict=True):
                blocks.append(block)
        hit = len(found[0]) * block_size
        hit -= hit % alignment_tokens
        for blocks in found:
            del blocks[hit // block_size :]
        return found, hit


def register_kv_cache_spec() -> None:
    """Make the spec and its manager known to vLLM, in every process.

    vLLM registers its own specs only while the registry is empty, so they go first.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(DeepAttentionSpec, DeepKVManager, uniform_type_base_spec=DeepAttentionSpec)
