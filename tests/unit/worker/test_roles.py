"""What no layer can play METok's role says so by its class."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.layers.attention import Attention

from metok_vllm.worker.attention import MetokAttention
from metok_vllm.worker.decoder import Decoder


def test_only_vllms_attention_is_adopted() -> None:
    role: Any = None
    with pytest.raises(TypeError, match=r"^METok works on vLLM's Attention layers, not on Linear$"):
        MetokAttention.adopt(nn.Linear(2, 2), role)


def test_a_layer_of_another_cache_format_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = None
    layer = MetokAttention.__new__(MetokAttention)
    monkeypatch.setattr(Attention, "get_kv_cache_spec", lambda self, config: None)
    with pytest.raises(ValueError, match=r"^METok cannot prune a layer with the cache format NoneType\.$"):
        layer.get_kv_cache_spec(config)


def test_a_layer_has_an_mlp() -> None:
    body = SimpleNamespace(layers=[nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"^METok runs the MLP of a layer in slices, but Linear has no mlp$"):
        Decoder(body).mlp(0)
