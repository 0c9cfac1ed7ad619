"""How much memory the prompts being deferred may take.

A pruned prompt that spans several steps keeps, until its last chunk, the hidden state and the residual of every token at L1,
and the keys and queries by which L1 scores. The scheduler reserves by these numbers, the front end refuses by them, the worker
allocates by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from metok_vllm.contract.server_choices import server_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig

DEFAULT_PROMPTS = 2
"""By default as many prompts of the longest length as this may be deferred at once."""


def bytes_per_token(model_config: ModelConfig) -> int:
    """Bytes that one deferred token takes, all tensor-parallel ranks' heads counted (an upper bound for one rank)."""
    text = model_config.hf_text_config
    head_dim = model_config.get_head_size()
    width = 2 * text.hidden_size + (text.num_attention_heads + text.num_key_value_heads) * head_dim
    dtype = model_config.dtype
    assert isinstance(dtype, torch.dtype)
    return int(width) * dtype.itemsize


def deferral_limit(model_config: ModelConfig) -> int:
    """Most bytes that all deferred prompts may take together on one worker."""
    limit = server_settings(model_config.hf_config).max_deferred_bytes
    if limit is not None:
        return limit
    return DEFAULT_PROMPTS * model_config.max_model_len * bytes_per_token(model_config)
