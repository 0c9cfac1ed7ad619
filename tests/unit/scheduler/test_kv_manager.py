"""The block tables of the layers from L1 up, driven directly over a real block pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from metok_vllm.contract.kv_spec import DeepAttentionSpec
from metok_vllm.contract.spans import pruned_spans
from metok_vllm.scheduler.kv_manager import DeepKVManager, register_kv_cache_spec
from metok_vllm.scheduler.slot_counts import SlotCounts
from tests.support.fakes import BLOCK, FULL, RETAINING, TEXT_ONLY, WINDOWED, Prompt, free_and_held, plan
from tests.unit.scheduler.test_slot_counts import prompts

SPECS = (FULL, RETAINING, TEXT_ONLY)
EQUAL = (BLOCK, BLOCK, BLOCK)
WINDOW_SPECS = tuple(WINDOWED.values())


class Groups:
    """One manager of each kind over one pool,
    called in the order in which vLLM's `KVCacheManager` calls them.
    """

    def __init__(
        self,
        blocks: int,
        hash_block_size: int = BLOCK,
        sizes: Sequence[int] = EQUAL,
        specs: Sequence[KVCacheSpec] = SPECS,
    ) -> None:
        self.pool = BlockPool(blocks, True, hash_block_size)
        self.sizes = sizes
        self.counts: dict[str, SlotCounts] = {}
        self.computed: dict[str, int] = {}
        self.released: set[str] = set()
        self.managers: list[SingleTypeKVCacheManager] = []
        for i, (spec, size) in enumerate(zip(specs, sizes, strict=True)):
            manager_class = DeepKVManager if isinstance(spec, DeepAttentionSpec) else FullAttentionManager
            manager = manager_class(replace(spec, block_size=size), self.pool, True, i, math.lcm(*sizes))
            if isinstance(manager, DeepKVManager):
                manager.slot_counts = self.counts
            self.managers.append(manager)

    def add(self, request: Request) -> None:
        spans = pruned_spans(request.mm_features, request.num_prompt_tokens)
        if spans:
            self.counts[request.request_id] = SlotCounts(request.num_prompt_tokens, spans)

    def allocate(self, request: Request, tokens: int) -> bool:
        """Room for the first `tokens` tokens, or False where the pool has too few blocks.

        As the scheduler does it before each step, released groups first give back what they can.
        """
        self.release()
        name, computed = request.request_id, request.num_computed_tokens
        needed = [m.get_num_blocks_to_allocate(name, tokens, (), computed, computed, tokens) for m in self.managers]
        if sum(needed) > self.pool.get_num_free_blocks():
            return False
        for manager, expected in zip(self.managers, needed, strict=True):
            assert len(manager.allocate_new_blocks(name, tokens, tokens)) == expected
        for manager in self.managers:
            manager.cache_blocks(request, min(tokens, request.num_tokens), replay_boundaries=())
        request.num_computed_tokens = self.computed[name] = tokens
        return True

    def release(self) -> None:
        for name, counts in self.counts.items():
            if self.computed.get(name) == counts.prompt_len:
                for manager in self.managers:
                    if isinstance(manager, DeepKVManager) and manager.releases:
                        manager.release(name)
                self.released.add(name)

    def free(self, request: Request) -> None:
        for manager in self.managers:
            manager.free(request.request_id)
        request.num_computed_tokens = self.computed[request.request_id] = 0
        self.released.discard(request.request_id)

    def blocks(self, request: Request) -> list[int]:
        return [len(manager.req_to_blocks.get(request.request_id, ())) for manager in self.managers]

    def published(self, group: int, request: Request) -> list[bool]:
        blocks = self.managers[group].req_to_blocks.get(request.request_id, ())
        return [block.block_hash is not None for block in blocks]

    def expected(self, request: Request) -> list[int]:
        counts, tokens = self.counts.get(request.request_id), request.num_computed_tokens
        slots = [tokens for _ in self.managers]
        for i, manager in enumerate(self.managers):
            if counts is not None and isinstance(manager, DeepKVManager):
                slots[i] = counts.slots(tokens, manager.kind)
                if manager.releases and tokens == counts.prompt_len and request.request_id in self.released:
                    slots[i] = counts.text_tokens
        return [-(-count // size) for count, size in zip(slots, self.sizes, strict=True)]

    def check_integrity(self, alive: Sequence[Request]) -> None:
        free, held = free_and_held(self.pool, self.managers)
        assert free + held + 1 == self.pool.num_gpu_blocks
        assert held == sum(sum(self.blocks(request)) for request in alive), "two requests share a block"
        for request in alive:
            assert self.blocks(request) == self.expected(request)
            counts = self.counts.get(request.request_id)
            if counts is None:
                continue
            complete = request.num_computed_tokens >= counts.prompt_len
            for group in range(1, len(self.managers)):
                publishable = counts.spans[0].start // self.sizes[group] if complete else 0
                shown = self.published(group, request)
                assert shown == [i < publishable for i in range(len(shown))]


class BlockTables(RuleBasedStateMachine):
    """Any order of arrivals, chunks, decodes, preemptions, resumptions and ends."""

    requests = Bundle("requests")
    sizes: Sequence[int] = EQUAL
    specs: Sequence[KVCacheSpec] = SPECS

    def __init__(self) -> None:
        super().__init__()
        self.groups = Groups(60, sizes=self.sizes, specs=self.specs)
        self.alive: list[Request] = []
        self.count = 0

    @rule(target=requests, prompt=prompts(0, 3))
    def arrive(self, prompt: Prompt) -> Request:
        self.count += 1
        request = prompt.request(f"r{self.count}")
        self.groups.add(request)
        self.alive.append(request)
        return request

    @rule(request=requests, tokens=st.integers(1, 40))
    def compute(self, request: Request, tokens: int) -> None:
        """A chunk of what is known, or one more token."""
        known = request.num_tokens - request.num_computed_tokens
        if known == 0:
            request.append_output_token_ids(7)
            known = 1
        self.groups.allocate(request, request.num_computed_tokens + min(tokens, known))

    @rule(request=requests)
    def preempt(self, request: Request) -> None:
        self.groups.free(request)

    @rule(request=consumes(requests))
    def finish(self, request: Request) -> None:
        self.groups.free(request)
        self.groups.counts.pop(request.request_id, None)
        self.alive.remove(request)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.groups.check_integrity(self.alive)

    def teardown(self) -> None:
        for request in self.alive:
            self.groups.free(request)
        assert self.groups.pool.get_num_free_blocks() == self.groups.pool.num_gpu_blocks - 1
        assert not any(manager.req_to_blocks for manager in self.groups.managers)


class BlockTablesByKind(BlockTables):
    """Few layers have many tokens a block, as `contract/kv_layout.py` gives them."""

    sizes = (6 * BLOCK, BLOCK, 2 * BLOCK)


class BlockTablesOfAWindow(BlockTables):
    """With `kv_layers`: what a released group gives back others get, and it keeps what text needs."""

    sizes = (BLOCK, BLOCK, BLOCK, BLOCK, BLOCK)
    specs = WINDOW_SPECS

    @rule()
    def release(self) -> None:
        """A step that none of them is in: it changes nothing to be asked again."""
        self.groups.release()


class BlockTablesOfAWindowByKind(BlockTablesOfAWindow):
    sizes = (2 * BLOCK, 6 * BLOCK, BLOCK, 3 * BLOCK, BLOCK)


TestBlockTablesOfAWindow = BlockTablesOfAWindow.TestCase
TestBlockTablesOfAWindow.settings = settings(max_examples=40, stateful_step_count=30)
TestBlockTablesOfAWindowByKind = BlockTablesOfAWindowByKind.TestCase
TestBlockTablesOfAWindowByKind.settings = settings(max_examples=40, stateful_step_count=30)
TestBlockTables = BlockTables.TestCase
TestBlockTables.settings = settings(max_examples=40, stateful_step_count=30)
TestBlockTablesByKind = BlockTablesByKind.TestCase
TestBlockTablesByKind.settings = settings(max_examples=40, stateful_step_count=30)


def test_by_hand() -> None:
    """10 text, 30 visual, 6 text; at most 8 survive L2 and all of them are retained."""
    groups = Groups(100)
    request = Prompt((10, 6), (plan(30, 8, 1_000_000),)).request("r")
    groups.add(request)
    seen = []
    for tokens in (9, 10, 25, 40, 45, 46):
        assert groups.allocate(request, tokens)
        seen.append(groups.blocks(request))
    assert seen == [[3, 3, 3], [3, 3, 3], [7, 3, 3], [10, 3, 3], [12, 4, 4], [12, 6, 4]]
    # Two whole blocks of text stand before the video; the third holds text from both sides of it.
    for group in (1, 2):
        assert groups.published(group, request)[:4] == [True, True, False, False]
    assert sum(groups.published(0, request)) == 46 // BLOCK


def test_a_window_by_hand() -> None:
    """10 text, 30 visual, 6 text; at most 19 survive L1 and 8 L2. The released group gives back 8 blocks."""
    groups = Groups(100, sizes=(BLOCK,) * 5, specs=WINDOW_SPECS)
    request = Prompt((10, 6), (plan(30, 8),)).request("r")
    groups.add(request)
    seen = []
    for tokens in (10, 45, 46):
        assert groups.allocate(request, tokens)
        seen.append(groups.blocks(request))
    assert seen == [[3, 3, 3, 3, 3], [12, 12, 4, 4, 4], [12, 12, 9, 6, 4]]
    assert groups.published(1, request) == [True, True] + [False] * 10
    kept = list(groups.managers[1].req_to_blocks["r"])
    free = groups.pool.get_num_free_blocks()
    for _ in range(2):
        groups.release()
        assert groups.blocks(request) == [12, 4, 9, 6, 4]
        assert groups.managers[1].req_to_blocks["r"] == kept[:4]
        assert groups.pool.get_num_free_blocks() == free + 8
    request.append_output_token_ids(7)
    assert groups.allocate(request, 47)
    assert groups.blocks(request) == [12, 5, 9, 7, 5]
    groups.free(request)
    assert groups.pool.get_num_free_blocks() == 99


def test_a_shared_block_outlives_its_release() -> None:
    """Text before the video that somebody else holds too; what the prompt gives back are its own blocks."""
    groups = Groups(100, sizes=(BLOCK,) * 5, specs=WINDOW_SPECS)
    request = Prompt((10, 1), (plan(30, 8),)).request("r")
    groups.add(request)
    groups.allocate(request, 41)
    manager = groups.managers[1]
    shared = manager.req_to_blocks["r"][:2]
    groups.pool.touch(shared)
    groups.release()
    assert len(manager.req_to_blocks["r"]) == 3
    assert [block.ref_cnt for block in shared] == [2, 2]
    groups.free(request)
    assert [block.ref_cnt for block in shared] == [1, 1]
    assert all(block.block_hash is not None for block in shared)


def test_a_resumed_request_must_find_room_for_its_whole_prompt() -> None:
    """Asked about all its tokens, a released group says what the prompt takes before it is complete."""
    groups = Groups(100, sizes=(BLOCK,) * 5, specs=WINDOW_SPECS)
    request = Prompt((10, 6), (plan(30, 8),)).request("r")
    groups.add(request)

    def needed(tokens: int, computed: int) -> int:
        ask = groups.managers[1].get_num_blocks_to_allocate
        return ask("r", tokens, (), computed, computed, tokens, apply_admission_cap=True)

    assert needed(50, 0) == 12, "46 tokens of its prompt, not 20 of text"
    assert groups.allocate(request, 46)
    groups.release()
    assert needed(50, 46) == 1


def test_nothing_is_published_before_the_deep_layers_ran() -> None:
    groups = Groups(100)
    request = Prompt((20, 6), (plan(30),)).request("r")
    groups.add(request)
    for tokens in (20, 55):
        groups.allocate(request, tokens)
        assert not any(groups.published(1, request) + groups.published(2, request))
        assert all(groups.published(0, request)[: tokens // BLOCK])
    groups.allocate(request, 56)
    assert sum(groups.published(1, request)) == sum(groups.published(2, request)) == 5


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Token ids of prompts that share beginnings of different lengths."""
    trunk = draw(st.lists(st.integers(0, 3), min_size=1, max_size=30))
    cuts = draw(st.lists(st.integers(0, len(trunk)), min_size=1, max_size=4))
    return [trunk[:cut] + draw(st.lists(st.integers(4, 6), min_size=1, max_size=15)) for cut in cuts]


@pytest.mark.parametrize("hash_block_size", [BLOCK, BLOCK // 2])
@given(family=families(), alignment=st.sampled_from([BLOCK, 2 * BLOCK]), spare=st.integers(0, 6))
def test_text_hits_as_with_full_attention(hash_block_size: int, family: Any, alignment: int, spare: int) -> None:
    """`hash_block_size` below the block size is what --prefix-match-unit asks for."""
    init_none_hash(sha256)
    groups = Groups(100, hash_block_size)
    hasher = get_request_block_hasher(hash_block_size, sha256)
    template = Prompt((1,)).request("template")
    requests = [
        Request(f"r{i}", ids, template.sampling_params, None, block_hasher=hasher) for i, ids in enumerate(family)
    ]
    for request in requests[1:]:
        assert groups.allocate(request, request.num_tokens)
    asked = requests[0]
    length = max(asked.num_tokens - spare, 0)
    hits = []
    for group, (spec, manager) in enumerate(zip(SPECS, groups.managers, strict=True)):
        (blocks,), tokens = type(manager).find_longest_cache_hit(
            asked.block_hashes, length, [group], groups.pool, spec, False, alignment
        )
        assert tokens == len(blocks) * BLOCK
        assert tokens <= length
        for i, block in enumerate(blocks):
            end = (i + 1) * BLOCK
            same = [r.request_id for r in requests[1:] if r.all_token_ids[:end] == asked.all_token_ids[:end]]
            assert block in [manager.req_to_blocks[name][i] for name in same]
        hits.append(tokens)
    assert hits[1] == hits[2] == hits[0]
    shared = max((common(asked, other) for other in requests[1:]), default=0)
    assert hits[0] == min(shared, length) // alignment * alignment


def common(a: Request, b: Request) -> int:
    """Whole blocks, in tokens, that two prompts share."""
    pairs = list(zip(a.all_token_ids, b.all_token_ids, strict=False))
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    return same // BLOCK * BLOCK


def test_one_lookup_serves_several_groups() -> None:
    """vLLM looks up all groups with one spec at once; a block that only one of them has is no hit."""
    pool = BlockPool(50, True, BLOCK)
    managers = [DeepKVManager(TEXT_ONLY, pool, True, i, BLOCK) for i in (0, 1)]
    request = Prompt((13,)).request("r")
    for manager, tokens in zip(managers, (12, 8), strict=True):
        manager.allocate_new_blocks("r", 13, 13)
        manager.cache_blocks(request, tokens, replay_boundaries=())
    blocks, tokens = DeepKVManager.find_longest_cache_hit(
        request.block_hashes, 13, [0, 1], pool, TEXT_ONLY, False, BLOCK
    )
    assert tokens == 8
    assert list(blocks) == [manager.req_to_blocks["r"][:2] for manager in managers]


def test_the_format_is_known_to_vllm() -> None:
    for _ in range(2):
        register_kv_cache_spec()
    assert KVCacheSpecRegistry.get_manager_class(TEXT_ONLY) is DeepKVManager
    assert KVCacheSpecRegistry.get_manager_class(FULL) is FullAttentionManager


def test_kinds_do_not_share_a_block_table() -> None:
    same = {"a": TEXT_ONLY, "b": TEXT_ONLY}
    assert TEXT_ONLY.is_uniform_with_collection(same)
    assert not TEXT_ONLY.is_uniform_with_collection(same | {"c": RETAINING})
    assert not TEXT_ONLY.is_uniform_with_collection(same | {"c": FULL})
    assert TEXT_ONLY.page_size_bytes == RETAINING.page_size_bytes == FULL.page_size_bytes


def test_text_of_the_longest_length_must_fit(make_config: Any) -> None:
    config = make_config(max_model_len=1001)
    assert TEXT_ONLY.max_memory_usage_bytes(config) == 251 * TEXT_ONLY.page_size_bytes
    assert FULL.max_memory_usage_bytes(config) == TEXT_ONLY.max_memory_usage_bytes(config)
