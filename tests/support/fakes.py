"""Requests, KV cache layouts and a scheduler without an engine around them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from metok_vllm.contract.fields import FRAME_TEXT_FIELD, PLAN_FIELD, QUESTION_FIELD
from metok_vllm.contract.frame_text import FrameText, to_field
from metok_vllm.contract.kv_spec import AFTER_L1, AFTER_L2, RELEASED, TEXT, TEXT_AND_RETAINED, DeepAttentionSpec
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.scheduler.scheduler import MetokScheduler

BLOCK = 4
SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
RETAINING = DeepAttentionSpec(**SHAPE, kind=TEXT_AND_RETAINED)
TEXT_ONLY = DeepAttentionSpec(**SHAPE, kind=TEXT)
WINDOWED = {
    "full": FULL,
    "released": DeepAttentionSpec(**SHAPE, kind=RELEASED),
    "after L1": DeepAttentionSpec(**SHAPE, kind=AFTER_L1),
    "after L2": DeepAttentionSpec(**SHAPE, kind=AFTER_L2),
    "text": TEXT_ONLY,
}
"""The kinds of group of a server with `kv_layers`."""


def plan(
    tokens: int, most_after_l2: int = 0, retention: int = 0, pruned: bool = True, text: int = 0, final: int = 0
) -> VideoPlan:
    """A plan with the counts that the scheduler reads; the others are plausible.

    `text` of the `tokens` are text inside the span.
    """
    return VideoPlan(
        compressed=pruned,
        pruned=pruned,
        frames=4,
        events=2,
        key_events=1,
        key_frames=1,
        strides=(2, 4, 8),
        frames_per_tier=(1, 1, 2),
        tokens=tokens,
        text_tokens=text,
        stock_tokens=tokens,
        keep_ratio_micro=760_000,
        whole_video=False,
        smoothing_micro=0,
        retention_micro=retention,
        final_micro=final,
        most_after_l1=(most_after_l2 + tokens - text) // 2,
        most_after_l2=most_after_l2,
        aligner="embedding",
        report=False,
    )


def item(fields: dict[str, Any]) -> MultiModalKwargsItem:
    """An item of these fields, which stay on the host."""
    on_host = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem({name: MultiModalFieldElem(data=data, field=on_host) for name, data in fields.items()})


def feature(offset: int, video: VideoPlan, name: str = "", modality: str = "video") -> MultiModalFeatureSpec:
    """A multimodal item at `offset` of the prompt, as it reaches the engine."""
    fields = {PLAN_FIELD: video.to_tensor(), QUESTION_FIELD: torch.tensor([1, 7])}
    if video.text_tokens:
        labels = [FrameText(before=(5,) * video.text_tokens), *[FrameText()] * (video.frames - 1)]
        fields[FRAME_TEXT_FIELD] = to_field(labels)
    identifier = name or f"{modality}-{offset}-{video.tokens}"
    data = item(fields if modality == "video" else {})
    return MultiModalFeatureSpec(data, modality, identifier, PlaceholderRange(offset, video.tokens))


@dataclass(frozen=True)
class Prompt:
    """Alternating runs: `text[0]`, video 0, `text[1]`, video 1, ..., `text[-1]`."""

    text: tuple[int, ...]
    videos: tuple[VideoPlan, ...] = ()
    answer: int = 2  # tokens to generate
    priority: int = 0
    prompt_logprobs: int | None = None

    @property
    def length(self) -> int:
        return sum(self.text) + sum(video.tokens for video in self.videos)

    def features(self, name: str) -> list[MultiModalFeatureSpec]:
        found, offset = [], 0
        for i, video in enumerate(self.videos):
            offset += self.text[i]
            found.append(feature(offset, video, f"{name}/{i}"))
            offset += video.tokens
        return found

    def request(self, name: str) -> Request:
        init_none_hash(sha256)
        params = SamplingParams(max_tokens=self.answer, ignore_eos=True, prompt_logprobs=self.prompt_logprobs)
        params.update_from_generation_config({}, None)
        return Request(
            name,
            [hash((name, i)) % 1000 for i in range(self.length)],
            params,
            None,
            mm_features=self.features(name),
            priority=self.priority,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )


def kv_cache_config(blocks: int, windowed: bool = False) -> KVCacheConfig:
    """The kinds of group that a pruned model has, one layer each: three, or those of `kv_layers`."""
    specs = WINDOWED if windowed else {"full": FULL, "retaining": RETAINING, "text": TEXT_ONLY}
    return KVCacheConfig(blocks, [], [KVCacheGroupSpec([name], spec) for name, spec in specs.items()])


@dataclass(frozen=True)
class Limits:
    """What decides how a prompt is cut."""

    step_tokens: int = 64  # max_num_batched_tokens
    requests: int = 4  # max_num_seqs
    blocks: int = 200
    encoder_tokens: int = 64  # encoder cache and compute budget
    deferred_tokens: int = 10_000  # max_deferred_bytes, in prompt tokens
    long_prefill: int = 0  # long_prefill_token_threshold
    policy: str = "fcfs"
    windowed: bool = False  # kv_layers


def make_scheduler(base: Any, limits: Limits, monkeypatch: Any) -> MetokScheduler:
    """The scheduler under the given limits; `base` is a vLLM configuration with METok."""
    config = copy.copy(base)
    config.scheduler_config = copy.copy(base.scheduler_config)
    config.cache_config = copy.copy(base.cache_config)
    scheduling = config.scheduler_config
    scheduling.max_num_batched_tokens = scheduling.max_num_scheduled_tokens = limits.step_tokens
    scheduling.max_num_seqs = limits.requests
    scheduling.long_prefill_token_threshold = limits.long_prefill
    scheduling.policy = limits.policy
    config.cache_config.num_gpu_blocks = limits.blocks
    config.cache_config.block_size = BLOCK
    config.cache_config.enable_prefix_caching = True
    budget = SimpleNamespace(encoder_compute_budget=limits.encoder_tokens, encoder_cache_size=limits.encoder_tokens)
    monkeypatch.setattr("vllm.v1.core.sched.scheduler.MultiModalBudget", lambda *_: budget)
    scheduler = MetokScheduler(
        config, kv_cache_config(limits.blocks, limits.windowed), StructuredOutputManager(config), BLOCK
    )
    scheduler.deferral.limit = limits.deferred_tokens * scheduler.deferral.bytes_per_token
    return scheduler


@dataclass(frozen=True)
class Step:
    """One step as it was scheduled; `finish` is the worker's answer,
    which may come after further steps were scheduled.
    """

    scheduler: MetokScheduler
    output: Any
    sampling: tuple[str, ...]  # requests whose tokens are all computed with this step

    @property
    def tokens(self) -> dict[str, int]:
        return dict(self.output.num_scheduled_tokens)

    def finish(self) -> None:
        names = list(self.tokens)
        sampled = [[7] if name in self.sampling else [] for name in names]
        answer = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        self.scheduler.update_from_output(self.output, answer)


def schedule(scheduler: MetokScheduler) -> Step:
    """Schedule one step."""
    output = scheduler.schedule()
    sampling = [name for name in output.num_scheduled_tokens if not scheduler.requests[name].is_prefill_chunk]
    return Step(scheduler, output, tuple(sampling))


def free_and_held(pool: Any, managers: Sequence[Any]) -> tuple[int, int]:
    """Blocks that are free, and different blocks that requests hold."""
    held = {block.block_id for m in managers for blocks in m.req_to_blocks.values() for block in blocks}
    return pool.get_num_free_blocks(), len(held)
