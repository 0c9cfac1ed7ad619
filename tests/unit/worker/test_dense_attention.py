"""METok's own attention follows the backend and the flash attention version that vLLM gave the layer;
layers that it would attend to wrongly are refused.

The layers are vLLM's own, built on this CPU; where a GPU's backend is needed, its name is put into one. Flash
attention, which no CPU has, is a function that notes how it was called. Triton's kernel is the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.ops import triton_prefill_attention

from metok_vllm.contract.attention_backends import ATTENTION_BACKENDS
from metok_vllm.worker import ops
from metok_vllm.worker.attention import LayerRole, MetokAttention, RunningStep
from metok_vllm.worker.dense_attention import DenseAttention

Make = Callable[..., Any]
HEADS, KV_HEADS, WIDTH = 4, 2, 32
LENGTHS = [7, 1, 12]


@pytest.fixture
def layer(make_config: Make) -> Callable[..., Attention]:
    def make(**options: Any) -> Attention:
        config = make_config()
        with set_current_vllm_config(config):
            return Attention(
                HEADS, WIDTH, WIDTH**-0.5, KV_HEADS, cache_config=config.cache_config, prefix="model.layers.3.self_attn.attn",
                **options,
            )  # fmt: skip

    return make


def adopted(attention: Attention) -> MetokAttention:
    return MetokAttention.adopt(attention, LayerRole(3, 4, (1, 2, 3), RunningStep()))


def with_backend(attention: Attention, name: str, **impl: Any) -> Attention:
    """The layer as vLLM would build it for another backend, as far as METok asks."""
    attention.attn_backend = type("Backend", (), {"get_name": staticmethod(lambda: name)})
    attention.impl = SimpleNamespace(alibi_slopes=None, logits_soft_cap=0, **impl)  # type: ignore[assignment]
    return attention


# --- which ---


def test_the_cpu_layer_that_vllm_builds(layer: Callable[..., Attention]) -> None:
    assert adopted(layer()).dense == DenseAttention("CPU_ATTN", None)


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_in_the_version_of_the_layer(layer: Callable[..., Attention], version: int) -> None:
    attention = adopted(with_backend(layer(), "FLASH_ATTN", vllm_flash_attn_version=version))
    assert attention.dense == DenseAttention("FLASH_ATTN", version)


def test_triton_where_it_was_chosen(layer: Callable[..., Attention]) -> None:
    assert adopted(with_backend(layer(), "TRITON_ATTN")).dense == DenseAttention("TRITON_ATTN", None)


def test_a_backend_that_vllm_chose_by_itself(layer: Callable[..., Attention]) -> None:
    with pytest.raises(ValueError, match="METok") as error:
        adopted(with_backend(layer(), "FLASHINFER"))
    assert str(error.value) == (
        "METok does not support the attention backend FLASHINFER, which vLLM chose for this device and KV cache: "
        "use FLASH_ATTN or TRITON_ATTN in --attention-backend."
    )


def test_flash_attention_that_compiles_in_live_traffic(layer: Callable[..., Attention]) -> None:
    with pytest.raises(ValueError, match="METok") as error:
        adopted(with_backend(layer(), "FLASH_ATTN", vllm_flash_attn_version=4))
    assert str(error.value) == (
        "METok does not support version 4 of flash attention: use TRITON_ATTN in --attention-backend."
    )


def test_a_backend_without_a_version_for_the_device(layer: Callable[..., Attention]) -> None:
    with pytest.raises(ValueError, match="METok") as error:
        adopted(with_backend(layer(), "FLASH_ATTN", vllm_flash_attn_version=None))
    assert str(error.value) == (
        "METok needs flash attention for heads of 32 on this device, and vLLM has none: "
        "use TRITON_ATTN in --attention-backend, or remove the version from --attention-config."
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"per_layer_sliding_window": 64}, "a sliding window"),
        ({"sinks": torch.zeros(HEADS)}, "attention sinks"),
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap on its logits"),
        ({"attn_type": "encoder_only"}, "no causal mask"),
        ({"head_size_v": 64}, "values of another width than its keys"),
        ({"per_layer_sliding_window": 64, "logits_soft_cap": 30.0}, "a sliding window, a soft cap on its logits"),
    ],
)
def test_more_than_causal_attention(layer: Callable[..., Attention], options: dict[str, Any], what: str) -> None:
    attention = layer(**options)
    with pytest.raises(ValueError, match="METok") as error:
        adopted(attention)
    assert str(error.value) == (
        f"METok prunes plain causal attention alone, but model.layers.3.self_attn.attn has {what}."
    )
    assert type(attention) is Attention, "a layer that is refused stays vLLM's"


def test_a_layer_with_the_kv_of_another(layer: Callable[..., Attention]) -> None:
    attention = layer()
    attention.kv_sharing_target_layer_name = "model.layers.2.self_attn.attn"
    with pytest.raises(ValueError, match=r"alone, but model.layers.3.self_attn.attn has another layer's KV.$"):
        adopted(attention)


def test_the_names_are_vllms_own() -> None:
    for name in ATTENTION_BACKENDS:
        assert AttentionBackendEnum[name].get_class().get_name() == name


# --- how it is called ---


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    query, key, value = (torch.randn(total, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return query, key, value, torch.tensor([0, 7, 8, 20], dtype=torch.int32)


def attended(dense: DenseAttention) -> torch.Tensor:
    query, key, value, starts = packed()
    out = torch.full_like(query, float("nan"))
    ops.causal_attention(query, key, value, LENGTHS, starts, max(LENGTHS), WIDTH**-0.5, out, dense)
    return out


@pytest.fixture
def expected() -> torch.Tensor:
    """By the definition, head by head and row by row."""
    query, key, value, starts = packed()
    out = torch.empty_like(query)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for row in range(start, end):
            for head in range(HEADS):
                k, v = (t[start : row + 1, head // (HEADS // KV_HEADS)] for t in (key, value))
                out[row, head] = torch.softmax(k @ query[row, head] * WIDTH**-0.5, 0) @ v
    return out


def test_plain_torch(expected: torch.Tensor) -> None:
    torch.testing.assert_close(attended(DenseAttention("CPU_ATTN")), expected)


@pytest.mark.parametrize("version", [2, 3])
def test_the_flash_attention_call(monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor, version: int) -> None:
    calls = []

    def flash(**arguments: Any) -> None:
        calls.append(arguments)
        arguments["out"].copy_(expected)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: pytest.fail("asked again, without a config"))
    torch.testing.assert_close(attended(DenseAttention("FLASH_ATTN", version)), expected)
    (call,) = calls
    assert call["fa_version"] == version
    assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, 7, 8, 20]
    assert call["cu_seqlens_q"].dtype == torch.int32
    assert (call["max_seqlen_q"], call["max_seqlen_k"], call["causal"]) == (12, 12, True)
    assert call["softmax_scale"] == WIDTH**-0.5


def test_the_triton_kernel(monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor) -> None:
    """vLLM's kernel itself, on a CPU in Triton's interpreter."""
    calls, kernel = [], triton_prefill_attention.context_attention_fwd

    def noted(*tensors: Any, **arguments: Any) -> None:
        calls.append(arguments)
        kernel(*tensors, **arguments)

    monkeypatch.setattr(triton_prefill_attention, "context_attention_fwd", noted)
    torch.testing.assert_close(attended(DenseAttention("TRITON_ATTN")), expected)
    (call,) = calls
    assert (call["b_start_loc"].tolist(), call["b_seq_len"].tolist()) == ([0, 7, 8], LENGTHS)
    assert (call["max_input_len"], call["is_causal"], call["softmax_scale"]) == (12, True, WIDTH**-0.5)
