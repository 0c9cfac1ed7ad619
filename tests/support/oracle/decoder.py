"""One decoder layer in plain eager PyTorch: the model's own weights, everything materialised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` [heads, tokens, width] by angles [tokens, width]; pairs (i, i + width / 2)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def project(model: Any, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [heads, tokens, width], k and v [kv_heads, tokens, width] of `hidden` [tokens, D]; q, k rotated.

    `positions`: [tokens], or [axes, tokens].
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)

    def heads_first(linear: Any) -> Tensor:
        return linear(normed).view(len(normed), -1, attention.head_dim).transpose(0, 1)

    query, key = heads_first(attention.q_proj), heads_first(attention.k_proj)
    if hasattr(attention, "q_norm"):  # Qwen3: each head by itself
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = model.model.language_model.rotary_emb(hidden.unsqueeze(0), positions.unsqueeze(-2))
    return rotate(query, cos[0], sin[0]), rotate(key, cos[0], sin[0]), heads_first(attention.v_proj)


def attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Causal attention: output rows [queries, heads * width] and probabilities [heads, queries, keys].

    A key is visible to the queries at its own position and later; there is no other mask.
    """
    group = layer.self_attn.num_key_value_groups
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    logits = query @ key.transpose(1, 2) * layer.self_attn.scaling
    hidden_from = key_positions[None, :] > query_positions[:, None]
    probabilities = logits.masked_fill(hidden_from, float("-inf")).float().softmax(-1)
    output = probabilities.to(value.dtype) @ value
    return output.transpose(0, 1).flatten(1), probabilities


def finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of the layer after attention: output projection, both residuals, the MLP. [tokens, D]."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    # Experts want a batch.
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden).unsqueeze(0)).squeeze(0)


def log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    """Next-token log-probabilities, float32 [vocabulary], of one last-layer row [D]."""
    return model.lm_head(model.model.language_model.norm(hidden)).float().log_softmax(-1)
