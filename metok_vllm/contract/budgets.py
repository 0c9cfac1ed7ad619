"""How many tokens and bytes deferred prompts may take.

A pruned prompt that spans several steps is deferred: until its last chunk it keeps the hidden state and the
residual of every token at L1, and the keys and queries that L1 scores by; with `kv_layers` also the keys and
values of its text in the layers below L1 that keep the KV of text alone. The front end refuses by these
numbers, the scheduler reserves by them, the worker allocates by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from metok_vllm.contract.kv_layout import layer_kind
from metok_vllm.contract.kv_spec import RELEASED
from metok_vllm.contract.server_choices import server_choices

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SchedulerConfig, VllmConfig

DEFAULT_PROMPTS = 2
"""So many prompts of the longest length may be deferred at once where `max_deferred_bytes` says nothing."""


def bytes_per_token(model_config: ModelConfig) -> int:
    """Bytes of one deferred token.

    Every token is counted as text, and all tensor-parallel ranks' heads are: an upper bound for one rank. Its
    rotary positions, 8 bytes an axis, are not counted.
    """
    text = model_config.hf_text_config
    head_dim = model_config.get_head_size()
    released = 2 * released_layers(model_config)  # keys and values
    width = 2 * text.hidden_size + (text.num_attention_heads + (1 + released) * text.num_key_value_heads) * head_dim
    dtype = model_config.dtype
    assert isinstance(dtype, torch.dtype)
    return int(width) * dtype.itemsize


def released_layers(model_config: ModelConfig) -> int:
    """Layers below L1 whose visual tokens lose their slots when a prompt is complete."""
    choices = server_choices(model_config.hf_config)
    if choices.prune_layers is None or choices.window is None:
        return 0
    kinds = [layer_kind(index, choices.prune_layers, choices.window) for index in range(choices.prune_layers[0])]
    return kinds.count(RELEASED)


def deferral_limit(model_config: ModelConfig) -> int:
    """Most bytes that all deferred prompts may take together on one worker."""
    limit = server_choices(model_config.hf_config).settings.max_deferred_bytes
    if limit is not None:
        return limit
    return DEFAULT_PROMPTS * model_config.max_model_len * bytes_per_token(model_config)


def ending_limit(vllm_config: VllmConfig) -> int:
    """Most tokens, whole prompts counted, of the deferred prompts that end in one step;
    a single one may always end.
    """
    return int(vllm_config.scheduler_config.max_num_batched_tokens)


def step_tokens(scheduler: SchedulerConfig) -> int:
    """Longest prompt that never has to be deferred: one step takes it however busy the server is."""
    # Decodes of all other requests take one token each of a step.
    whole = (scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens) - scheduler.max_num_seqs
    return min(whole, scheduler.long_prefill_token_threshold or whole)
