"""What is reserved for pruned steps beside the KV cache: bounds by hand, and the reserve's life."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metok_vllm.worker import model_state
from metok_vllm.worker.memory import MemoryReserve, PruningMemory
from metok_vllm.worker.model_state import MetokModelState
from tests.support.fakes import kv_cache_config

Make = Callable[..., Any]


def test_the_bounds_of_a_known_model(make_config: Make) -> None:
    config = make_config(max_model_len=1000, max_num_batched_tokens=256, max_num_seqs=8, enable_chunked_prefill=True)
    text = config.model_config.hf_text_config
    hidden, heads, kv, mlp = (
        text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.intermediate_size
    )  # fmt: skip
    width = config.model_config.get_head_size()
    found = PruningMemory.of(config)
    state = 4 * (2 * hidden + (heads + kv) * width)  # float32: hidden, residual, queries and keys of one token
    assert found.deferred == 2 * 1000 * state, "two prompts of the longest length, by default"
    assert found.joined == 1000 * state
    assert found.gathered == 2 * (1000 + 256) * 2 * hidden * 4
    # Four layers are pruned before 1, 2 and 3: only layer 1 holds keys and values back.
    assert found.waiting == (1000 + 256) * 2 * kv * width * 4
    assert found.layers == 1000 * 4 * (2 * hidden + max(2 * (heads + kv) * width, 3 * mlp))
    assert found.total == found.deferred + found.joined + found.gathered + found.waiting + found.layers


def test_settings_lower_it(make_config: Make) -> None:
    def of(**options: Any) -> PruningMemory:
        return PruningMemory.of(make_config(max_num_batched_tokens=256, max_num_seqs=8, **options))

    whole = of(max_model_len=4096)
    assert of(max_model_len=1024).total < whole.total / 3
    bounded = of(max_model_len=4096, additional_config={"metok": {"max_deferred_bytes": 10**6}})
    assert bounded.deferred == 10**6
    assert bounded.joined == whole.joined


def test_the_reserve_is_held_until_the_kv_cache_exists(make_config: Make) -> None:
    config = make_config()
    reserve = MemoryReserve(config, torch.device("meta"))
    reserve.hold()
    held = reserve._ballast
    assert held is not None
    assert held.nbytes == PruningMemory.of(config).total
    reserve.hold()
    assert reserve._ballast is held, "every dummy run of the profile calls it"
    reserve.release()
    reserve.hold()
    assert reserve._ballast is None, "a dummy run of an idle rank must not allocate"


def test_nothing_is_reserved_on_cpu(make_config: Make) -> None:
    reserve = MemoryReserve(make_config(), torch.device("cpu"))
    reserve.hold()
    assert reserve._ballast is None
    assert reserve.needed == 0


def test_the_model_state_holds_and_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hooks that vLLM's runner calls in its profiling run and
    behind the allocation of the KV cache.
    """
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    monkeypatch.setattr(DefaultModelState, "dummy_inputs_embeds", lambda self, n: torch.zeros(n))
    monkeypatch.setattr(DefaultModelState, "initialize_kv_cache", lambda self, *_: None)
    calls: list[str] = []
    state = object.__new__(MetokModelState)
    reserve: Any = SimpleNamespace(hold=lambda: calls.append("hold"), release=lambda: calls.append("release"))
    object.__setattr__(state, "_reserve", reserve)
    assert state.dummy_inputs_embeds(3).shape == (3,)
    slots: Any = SimpleNamespace(bind=lambda *_: calls.append("bind"))
    for name, value in (("deep_slots", slots), ("warm_up", None), ("model", None), ("device", None)):
        object.__setattr__(state, name, value)
    monkeypatch.setattr(model_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(model_state.ModelShapes, "of", lambda model: model)
    monkeypatch.setattr(model_state, "warm_up", lambda *_: calls.append("warm up") or "ready")
    said: list[str] = []
    monkeypatch.setattr(model_state.logger, "info", lambda line, *values: said.append(line % values))
    nothing: Any = None
    for _ in range(2):  # vLLM comes twice where it measures the memory of CUDA graphs
        state.initialize_kv_cache(kv_cache_config(10), nothing)
    assert calls == ["hold", "bind", "release", "warm up", "bind", "release"]
    assert said == [
        "METok: 3 KV cache groups (1 layers for every token, blocks of 4 tokens; 1 layers for text and retained, "
        "blocks of 4 tokens; 1 layers for text, blocks of 4 tokens), 0.0 % padding"
    ]
