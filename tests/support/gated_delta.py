"""The gated delta rule in float32, for engines of models with linear attention.

vLLM's CPU kernel of it takes bfloat16 alone (vllm/model_executor/layers/mamba/ops/cpu/gdn_attention.py),
whose rounding hides faults of a hundredth. This one, token by token, reads and writes the same states in
vLLM's cache, by the same metadata; all else of the engine runs as it is. What vLLM's own kernel gives is
looked at too, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import register_cpu_gdn_attention_ops
from vllm.utils.torch_utils import _resolve_layer_name


@contextmanager
def in_float32() -> Iterator[list[int]]:
    """Engines of this process compute it in float32. Gives the tokens of each call, which grow."""
    seen: list[int] = []

    def core(mixed: Tensor, b: Tensor, a: Tensor, out: Tensor, name: Any) -> None:
        context = get_forward_context()
        layer: Any = context.no_compile_layers[_resolve_layer_name(name)]
        if not context.attn_metadata:  # vLLM measures memory
            return
        assert mixed.dtype == torch.float32
        metadata: Any = context.attn_metadata[layer.prefix]  # type: ignore[index, call-overload]  # by layer
        bounds = metadata.non_spec_query_start_loc.tolist()
        slots = metadata.non_spec_state_indices_tensor.tolist()
        known = metadata.has_initial_state
        for i in range(metadata.num_decodes + metadata.num_prefills):
            rows = slice(bounds[i], bounds[i + 1])
            fresh = i >= metadata.num_decodes and not bool(known[i])
            out[rows] = _sequence(layer, mixed[rows], b[rows], a[rows], slots[i], fresh)
        seen.append(bounds[metadata.num_decodes + metadata.num_prefills])

    register_cpu_gdn_attention_ops()  # once a process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.vllm, "cpu_gdn_attention_core", core)
        yield seen


def _sequence(layer: Any, mixed: Tensor, b: Tensor, a: Tensor, slot: int, fresh: bool) -> Tensor:
    """One request's tokens, [n, heads, channels] from projections [n, ...]; moves its states in `slot` on."""
    windows, states = layer.kv_cache[0], layer.kv_cache[1]  # [slots, width - 1, channels], [slots, heads, v, k]
    if fresh:
        windows[slot], states[slot] = 0, 0
    width = layer.conv1d.weight.shape[-1]
    line = torch.cat([windows[slot], mixed])
    windows[slot] = line[-(width - 1) :]
    mixed = F.silu(F.conv1d(line.T[None], layer.conv1d.weight, layer.conv1d.bias, groups=line.shape[1]))[0].T
    query, key, value = (rows[0] for rows in layer.rearrange_mixed_qkv(mixed))
    group = value.shape[1] // key.shape[1]
    query = F.normalize(query, dim=-1).repeat_interleave(group, 1) / key.shape[-1] ** 0.5
    key = F.normalize(key, dim=-1).repeat_interleave(group, 1)
    fade = torch.exp(-layer.A_log.exp() * F.softplus(a + layer.dt_bias))
    rate, state, found = b.sigmoid(), states[slot], []
    for t in range(len(value)):
        state = state * fade[t, :, None, None]
        wrong = value[t] - (state @ key[t, :, :, None])[..., 0]
        state = state + rate[t, :, None, None] * wrong[:, :, None] * key[t, :, None, :]
        found.append((state @ query[t, :, :, None])[..., 0])
    states[slot] = state
    return torch.stack(found)
